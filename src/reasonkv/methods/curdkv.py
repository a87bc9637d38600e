"""CurDKV: keep the tokens whose key and value are both long."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from reasonkv import noise
from reasonkv.methods.base import ScorerMethod
from reasonkv.methods.ops import head_blocks, upcast
from reasonkv.methods.options import Count
from reasonkv.view import SlotView

Leverage = Literal["kv_product", "kv_avg", "key", "value"]
Tail = Literal["scaled", "padded"]


@dataclass(frozen=True)
class CurDKV(ScorerMethod):
    """Keep the rows a CUR decomposition would pick by approximate leverage (Sengupta et al., 2025, "Value-Guided KV
    Compression for LLMs via Approximated CUR Decomposition", arXiv 2509.15038).

    The leverage of a token is taken as the squared norm of its key, or value, as a share of its window's; a token's
    score is the product of both. Squared norms are leverage scores only where columns are orthonormal. A model that
    normalises its keys (Qwen3) has nearly equal norms, and the score is then the value's.

    Args:
        leverage: "kv_product", "kv_avg" (mean of both), "key" or "value".
        window: neighbouring slots that norms are compared within; 0 compares over all slots.
        tail: what a last window of fewer slots is compared with: "scaled" - its own mean, as every other; "padded" -
            its own sum, as if zeros filled it up, which raises its shares (the public code).
        rank: dimensions that keys and values are projected to before their norms are taken, by one Gaussian matrix
            per row, layer and KV head that never changes; 0 takes the norms themselves.
        sinks: first tokens, which rank highest.

    """

    name: ClassVar[str] = "curdkv"
    title: ClassVar[str] = "Squared norms of key and value, relative to the neighbours"
    paper: ClassVar[str] = "CurDKV, arXiv 2509.15038"

    leverage: Leverage = "kv_product"
    window: Count = 16
    tail: Tail = "scaled"
    rank: Count = 0
    sinks: Count = 4

    def score(self, view: SlotView) -> Tensor:
        """Shares of keys and values, combined, normalised to sum 1 over all slots; 1 for sinks."""
        projection = self.projection(view) if self.rank else None

        def shares(x_BHND: Tensor) -> Tensor:
            return self.shares(squared_norms(x_BHND, projection))

        if self.leverage == "key":
            score_BHN = shares(view.keys_BHND)
        elif self.leverage == "value":
            score_BHN = shares(view.values_BHND)
        elif self.leverage == "kv_product":
            score_BHN = shares(view.keys_BHND) * shares(view.values_BHND)
        else:
            score_BHN = (shares(view.keys_BHND) + shares(view.values_BHND)) / 2
        score_BHN = score_BHN / score_BHN.sum(-1, keepdim=True)
        return score_BHN.masked_fill((view.positions_BHN < self.sinks) & ~score_BHN.isnan(), 1.0)

    def shares(self, squares_BHN: Tensor) -> Tensor:
        """Squared norms over the sum of their window's, [B, H, N]; as they are where there are no windows."""
        if self.window == 0:
            return squares_BHN
        N = squares_BHN.shape[-1]
        windows_BHWw = functional.pad(squares_BHN, (0, -N % self.window)).view(*squares_BHN.shape[:2], -1, self.window)
        sums_BHW1 = windows_BHWw.sum(-1, keepdim=True)
        if self.tail == "scaled" and N % self.window:
            sums_BHW1[..., -1, :] *= self.window / (N % self.window)
        # a window of zeros has no shares to give; its tokens score 0
        shares_BHWw = windows_BHWw / sums_BHW1.where(sums_BHW1 != 0, 1.0)
        return shares_BHWw.flatten(-2)[..., :N]

    def projection(self, view: SlotView) -> Tensor:
        """Normals of variance 1 / rank, float32 [B, H, D, rank]; hashed, so that a row has the same in any batch."""
        H, D, device = view.keys_BHND.shape[1], view.keys_BHND.shape[3], view.keys_BHND.device
        heads = torch.arange(view.first_head, view.first_head + H, device=device)
        uniform = noise.uniform(
            torch.arange(D * self.rank, device=device),
            seed=view.seed,
            row_seed=view.row_seed_B[:, None, None],
            layer=view.layer,
            head=heads[None, :, None],
            event=0,
        )
        normals: Tensor = noise.normal(uniform).view(-1, H, D, self.rank)
        scaled: Tensor = normals / self.rank**0.5
        return scaled


def squared_norms(x_BHND: Tensor, projection_BHDr: Tensor | None = None) -> Tensor:
    """Squared norms of keys or values, projected first if a projection is given: float32 [B, H, N]."""
    if projection_BHDr is None:
        dtype = torch.promote_types(x_BHND.dtype, torch.float32)
        norms_BHN: Tensor = torch.linalg.vector_norm(x_BHND, dim=-1, dtype=dtype)
        return norms_BHN.square()
    x_RND, projection_RDr, parts = x_BHND.flatten(0, 1), projection_BHDr.flatten(0, 1), []
    for block in head_blocks(len(x_RND), x_RND[0].numel(), x_RND.device):
        rows_RND = upcast(x_RND[block])
        parts.append((rows_RND @ projection_RDr[block].to(rows_RND.dtype)).square().sum(-1))
    return torch.cat(parts).view(x_BHND.shape[:3])
