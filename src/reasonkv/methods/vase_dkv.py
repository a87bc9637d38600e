"""VaSE-DKV: the largest product of key and value norms, seen through a projection drawn anew at every event."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from reasonkv import noise
from reasonkv.methods.base import Requirements, ScorerMethod
from reasonkv.methods.ops import fill_window, head_blocks, upcast
from reasonkv.methods.options import Count
from reasonkv.view import SlotView

_NO_HEAD = -1  # the projection is shared by all KV heads, so it is hashed as that of none of them


@dataclass(frozen=True)
class VaseDKV(ScorerMethod):
    """Keep large ||k G||^2 ||v G||^2 for a Gaussian G that every event draws anew (Chang et al., 2026, "Value-Aware
    Stochastic KV Cache Eviction for Reasoning Models", arXiv 2606.03928, the variant VaSE-DKV; in the authors' code the
    mode `cur_resample_gauss`).

    No queries and no attention. The expected score is ||k||^2 ||v||^2 (1 + 2 cos(k, v)^2 / p); the draw adds noise of
    some tens of per cent, alike for tokens that point the same way, so that what is dropped changes between events.
    The paper's budget leaves the prompt compressible (`prompt="count"`).

    Args:
        window: newest tokens that always stay (the public code's residual length).
        n_sink: first slots, which get the largest score there is.
        projection: columns p of G; 0 - no projection: the product of the squared norms, without noise.
        redraw: True - a fresh G at every event; False - one G per row and layer for ever, which is CurDKV as VaSE's
            authors compare with it (an ablation).

    """

    name: ClassVar[str] = "vase-dkv"
    title: ClassVar[str] = "Product of key and value norms under a random projection"
    paper: ClassVar[str] = "VaSE, arXiv 2606.03928"

    window: Count = 64
    n_sink: Count = 4
    projection: Count = 20
    redraw: bool = True

    @property
    def needs(self) -> Requirements:
        """The newest tokens protected."""
        return Requirements(recent=self.window)

    def score(self, view: SlotView) -> Tensor:
        """Share of every slot in the sum over the slots before the window; 1 for sinks: float32 [B, H, N]."""
        N = view.positions_BHN.shape[-1]
        n = N - min(self.window, N - 1)
        product_BHn = self.product(view.keys_BHND[:, :, :n], view.values_BHND[:, :, :n], self.gaussian(view))
        least = torch.finfo(product_BHn.dtype).tiny  # where all keys or values are 0, all shares are
        share_BHn = product_BHn / product_BHn.sum(-1, keepdim=True).clamp(min=least)
        share_BHn[..., : self.n_sink] = 1.0
        return fill_window(share_BHn, N)

    def gaussian(self, view: SlotView) -> Tensor | None:
        """G [B, D, p] with independent entries of variance 1 / p, the same for all heads, keys and values.

        One per row, by its seeds; rows of equal seeds have equal matrices. None without projection.
        """
        if self.projection == 0:
            return None
        D = view.keys_BHND.shape[-1]
        event_B = view.event_B if self.redraw else torch.zeros_like(view.event_B)
        # Hashing costs more than multiplying, and in a server all requests have one seed unless they ask for another.
        drawn_U2, of_B = torch.unique(torch.stack([view.row_seed_B, event_B], 1), dim=0, return_inverse=True)
        uniform_Ue = noise.uniform(
            torch.arange(D * self.projection, device=view.keys_BHND.device).unsqueeze(0),
            seed=view.seed,
            row_seed=drawn_U2[:, :1],
            layer=view.layer,
            head=_NO_HEAD,
            event=drawn_U2[:, 1:],
        )
        normal_UDp = noise.normal(uniform_Ue).view(-1, D, self.projection)
        return normal_UDp[of_B] / math.sqrt(self.projection)

    def product(self, keys_BHND: Tensor, values_BHND: Tensor, gaussian_BDp: Tensor | None) -> Tensor:
        """||k G||^2 ||v G||^2 of every slot, G None for the identity: float32 [B, H, N]."""
        (B, H, N, D), device = keys_BHND.shape, keys_BHND.device
        gaussian_RpD = None
        if gaussian_BDp is not None:
            dtype = torch.float64 if keys_BHND.dtype == torch.float64 else torch.float32
            gaussian_RpD = gaussian_BDp.to(dtype).mT.repeat_interleave(H, dim=0)

        def squared_norms(vectors_RND: Tensor, block: slice) -> Tensor:
            seen_RDN = upcast(vectors_RND[block]).mT  # entries before slots, so that the sum runs over long rows
            return (seen_RDN if gaussian_RpD is None else gaussian_RpD[block] @ seen_RDN).square().sum(1)

        keys_RND, values_RND = keys_BHND.flatten(0, 1), values_BHND.flatten(0, 1)
        blocks = head_blocks(B * H, N * D, device)
        products = [squared_norms(keys_RND, block) * squared_norms(values_RND, block) for block in blocks]
        return torch.cat(products).view(B, H, N)
