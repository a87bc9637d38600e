"""CurDKV: keep the tokens whose key and value are both long."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from reasonkv.methods.base import ScorerMethod
from reasonkv.methods.ops import random_projection, squared_norms
from reasonkv.methods.options import Count
from reasonkv.view import SlotView


@dataclass(frozen=True)
class CurDKV(ScorerMethod):
    """Keep the rows a CUR decomposition would pick by approximate leverage (Sengupta et al., 2025, "Value-Guided KV
    Compression for LLMs via Approximated CUR Decomposition", arXiv 2509.15038).

    The leverage of a token is taken as the squared norm of its key, or value, as a share of its window's; a token's
    score is the product of both. A model that normalises its keys (Qwen3) leaves the value's alone to decide.

    Args:
        leverage: "kv_product", "kv_avg" (mean of both), "key" or "value".
        window: neighbouring slots that norms are compared within; 0 compares over all slots.
        tail: what a last window of fewer slots is compared with: "scaled" - its own mean, as every other; "padded" -
            its own sum, as if zeros filled it up, which raises its shares (the public code).
        rank: dimensions that keys and values are projected to before their norms are taken, by one Gaussian matrix
            per sequence, layer and KV head that never changes; 0 takes the norms themselves.
        sinks: first tokens, which rank highest.
    """

    leverage: Literal["kv_product", "kv_avg", "key", "value"] = "kv_product"
    window: Count = 16
    tail: Literal["scaled", "padded"] = "scaled"
    rank: Count = 0
    sinks: Count = 4

    def score(self, view: SlotView) -> Tensor:
        projection = self.projection(view) if self.rank else None
        key_BHN, value_BHN = (
            self.shares(squared_norms(x_BHND, projection)) for x_BHND in (view.keys_BHND, view.values_BHND)
        )
        score_BHN = {
            "kv_product": key_BHN * value_BHN,
            "kv_avg": (key_BHN + value_BHN) / 2,
            "key": key_BHN,
            "value": value_BHN,
        }[self.leverage]
        score_BHN = score_BHN / score_BHN.sum(-1, keepdim=True)
        return score_BHN.masked_fill((view.positions_BHN < self.sinks) & ~score_BHN.isnan(), 1.0)

    def shares(self, squares_BHN: Tensor) -> Tensor:
        """Return squared norms over the sum of their window's, [B, H, N]; as they are where there are no windows."""
        if self.window == 0:
            return squares_BHN
        N = squares_BHN.shape[-1]
        windows_BHWw = torch.unflatten(functional.pad(squares_BHN, (0, -N % self.window)), -1, (-1, self.window))
        sums_BHW1 = windows_BHWw.sum(-1, keepdim=True)
        if self.tail == "scaled" and N % self.window:
            sums_BHW1[..., -1, :] *= self.window / (N % self.window)
        # A window of zeros has no shares to give; its tokens score 0.
        shares_BHWw = windows_BHWw / sums_BHW1.where(sums_BHW1 != 0, 1.0)
        return torch.flatten(shares_BHWw, -2)[..., :N]

    def projection(self, view: SlotView) -> Tensor:
        """Return normals of variance 1 / rank, float32 [B, H, D, rank]."""
        last_head = view.first_head + view.keys_BHND.shape[1]
        head_1H1 = torch.arange(view.first_head, last_head, device=view.keys_BHND.device)[None, :, None]
        return random_projection(view, self.rank, view.row_seed_B[:, None, None], head_1H1, 0)
