"""VaSE-DKV: the largest product of key and value norms, seen through a projection drawn anew at every compaction."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reasonkv.methods.base import Requirements, ScorerMethod
from reasonkv.methods.ops import fill_window, random_projection, squared_norms
from reasonkv.methods.options import Count
from reasonkv.view import SlotView


@dataclass(frozen=True)
class VaseDKV(ScorerMethod):
    """Keep large ||k G||^2 ||v G||^2 for a Gaussian G drawn at every compaction (Chang et al., 2026, "Value-Aware
    Stochastic KV Cache Eviction for Reasoning Models", arXiv 2606.03928, the variant VaSE-DKV; in the authors' code the
    mode `cur_resample_gauss`).

    The expected score is ||k||^2 ||v||^2 (1 + 2 cos(k, v)^2 / p); the draw adds noise of some tens of per cent, so that
    what is evicted changes between compactions. The paper's budget leaves the prompt compressible (`prompt="count"`).

    Args:
        window: newest tokens that are always kept (the public code's residual length).
        n_sink: first slots, which get the largest score there is.
        projection: columns p of G; 0 - no projection: the product of the squared norms, without noise.
        redraw: True - a fresh G at every compaction; False - one G per sequence and layer for ever, which is CurDKV as
            VaSE's authors compare with it (an ablation).
    """

    window: Count = 64
    n_sink: Count = 4
    projection: Count = 20
    redraw: bool = True

    @property
    def needs(self) -> Requirements:
        return Requirements(recent=self.window)

    def score(self, view: SlotView) -> Tensor:
        N = view.positions_BHN.shape[-1]
        n = N - min(self.window, N - 1)
        gaussian_BHDp = self.gaussian(view)
        product_BHn = squared_norms(view.keys_BHND[:, :, :n], gaussian_BHDp)
        product_BHn = product_BHn * squared_norms(view.values_BHND[:, :, :n], gaussian_BHDp)
        least = torch.finfo(product_BHn.dtype).tiny  # where all keys or values are 0, all shares are
        share_BHn = product_BHn / product_BHn.sum(-1, keepdim=True).clamp(min=least)
        share_BHn[..., : self.n_sink] = 1.0
        return fill_window(share_BHn, N)

    def gaussian(self, view: SlotView) -> Tensor | None:
        """Return G, the same for keys, values and all heads of a sequence: float32 [B, H, D, p]; None without it."""
        if self.projection == 0:
            return None
        event_B = view.event_B if self.redraw else torch.zeros_like(view.event_B)
        # Hashing costs more than multiplying, and in a server all requests have one seed unless they ask for another.
        drawn_U2, of_B = torch.unique(torch.stack([view.row_seed_B, event_B], 1), dim=0, return_inverse=True)
        gaussian_UDp = random_projection(view, self.projection, drawn_U2[:, :1], -1, drawn_U2[:, 1:])  # -1: no head
        return gaussian_UDp[of_B, None].expand(-1, view.keys_BHND.shape[1], -1, -1)
