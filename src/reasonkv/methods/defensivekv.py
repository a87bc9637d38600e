"""DefensiveKV: guard against the worst query instead of trusting the mean one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from reasonkv.methods.base import Method, Requirements, SlotState
from reasonkv.methods.ops import fill_window, newest_attention, top_k_slots, upcast
from reasonkv.methods.options import Kernel, Share, Size
from reasonkv.plan import Plan
from reasonkv.view import SlotView

_UNKNOWN = -1.0  # state of a slot whose norm has not been taken; norms are never negative
_SLOTS_AT_ONCE = 64


@dataclass(frozen=True)
class DefensiveKV(Method):
    """Keep what any recent query attends to, weighted by what its value adds to the output (Feng et al., 2025,
    "Taming the Fragility of KV Cache Eviction in LLM Inference", arXiv 2510.13334).

    1. Attention of the window's queries to the slots before it, pooled over neighbours; each query keeps its sum.
    2. Maximum over the query heads of a group and over the queries; not below the mean of that over slots.
    3. Times r / sum r, r the L1 norm of the value's contribution to the output, mean over the group (CriticalKV).
    4. The tokens that cover 90 % of the mean attention, the window's included, come before all others.

    The paper also divides the budget of a layer, or of the model, among heads.

    Args:
        variant: "corrected" - as above, the mean of step 2 over slots that may be evicted; "paper" - the authors' code
            where it differs: that mean is over all slots, it normalises r over KV heads instead of slots, takes the
            attention to the newest slots BEFORE the window for that to the window, compares the sums of step 4 with
            that on the scale of old slots alone, and leaves out the token that reaches it.
        window: newest queries that vote; their tokens are always kept.
        kernel: slots pooled together, odd; 1 turns pooling off.
        mass: share of attention that step 4 covers; 0 turns it off.
        output_norm: step 3. It reads the layer's output projection, once for every token.
    """

    variant: Literal["corrected", "paper"] = "corrected"
    window: Size = 32
    kernel: Kernel = 5
    mass: Share = 0.9
    output_norm: bool = True

    @property
    def needs(self) -> Requirements:
        return Requirements(
            queries=self.window,
            recent=self.window,
            slot_state={"output_norm": SlotState(_UNKNOWN)} if self.output_norm else {},
            output_projection=self.output_norm,
        )

    def plan(self, view: SlotView, keep: int) -> Plan:
        norms_BHN = self.norms(view) if self.output_norm else None
        kept_BHK = top_k_slots(self.score(view, norms_BHN), keep, view.is_protected_BHN)
        return Plan(kept_BHK, state={} if norms_BHN is None else {"output_norm": norms_BHN.gather(2, kept_BHK)})

    def score(self, view: SlotView, norms_BHN: Tensor | None = None) -> Tensor:
        """Return scores by steps 1 to 4, float32 [B, H, N]; without step 3 if `norms_BHN` is None."""
        worst_BHn, mean_BHn = self.attention(view)
        score_BHn = worst_BHn.maximum(self.floor(worst_BHn, view))
        if norms_BHN is not None:
            r_BHn = norms_BHN[..., : score_BHn.shape[-1]]
            total = r_BHn.sum(-1 if self.variant == "corrected" else 1, keepdim=True)
            score_BHn = score_BHn * (r_BHn / total.clamp(min=torch.finfo(total.dtype).tiny))
        if self.mass:
            covering_BHn, rank_BHn = self.covering(mean_BHn)
            first_BHn = score_BHn.amax(-1, keepdim=True) + 1.0 + rank_BHn
            score_BHn = torch.where(covering_BHn & ~score_BHn.isnan(), first_BHn, score_BHn)
        return fill_window(score_BHn, view.positions_BHN.shape[-1])

    def floor(self, worst_BHn: Tensor, view: SlotView) -> Tensor:
        """Return what no score of step 2 is below: the mean over slots, corrected: over those that may be evicted."""
        if self.variant == "paper":
            return worst_BHn.mean(-1, keepdim=True)
        is_open_BHn = ~view.is_protected_BHN[..., : worst_BHn.shape[-1]]
        return (worst_BHn * is_open_BHn).sum(-1, keepdim=True) / is_open_BHn.sum(-1, keepdim=True).clamp(min=1)

    def attention(self, view: SlotView) -> tuple[Tensor, Tensor]:
        """Return pooled attention to old slots, the maximum over queries and query heads, and its plain mean [B, H, n].

        The softmax runs over all slots, causally, as in the model.
        """
        n = view.positions_BHN.shape[-1] - view.queries_BHgTD().shape[3]

        def worst_and_mean(_: slice, attention_rgTN: Tensor) -> Tensor:
            attention_rgTn = attention_rgTN[..., :n]
            sums_rgT1 = attention_rgTn.sum(-1, keepdim=True)
            pooled_rgTn = neighbour_sums(attention_rgTn, self.kernel)
            least = torch.finfo(pooled_rgTn.dtype).tiny  # a query without any attention to old slots stays without
            scale_rgT1 = sums_rgT1 / pooled_rgTn.sum(-1, keepdim=True).clamp(min=least)
            return torch.stack([pooled_rgTn.mul_(scale_rgT1).amax((1, 2)), attention_rgTn.mean((1, 2))], 1)

        both_BH2n = newest_attention(view, worst_and_mean)
        return both_BH2n[:, :, 0], both_BH2n[:, :, 1]

    def covering(self, mean_BHn: Tensor) -> tuple[Tensor, Tensor]:
        """Return step 4: which slots cover the mass, bool [B, H, n], and their rank by attention (highest: n - 1)."""
        old_BH1 = mean_BHn.sum(-1, keepdim=True)
        if self.variant == "corrected":
            target_BH1 = self.mass - (1.0 - old_BH1)
        else:
            edge_B11 = mean_BHn[..., -self.window :].sum(-1).mean(1)[:, None, None]
            mean_BHn, target_BH1 = mean_BHn / old_BH1, self.mass - edge_B11
        sorted_BHn, order_BHn = mean_BHn.sort(dim=-1, descending=True, stable=True)
        sums_BHn = sorted_BHn.cumsum(-1)
        covers_BHn = (sums_BHn - sorted_BHn if self.variant == "corrected" else sums_BHn) < target_BH1
        rank_BHn = mean_BHn.shape[-1] - 1 - order_BHn.argsort(-1)
        return torch.zeros_like(covers_BHn).scatter_(-1, order_BHn, covers_BHn), rank_BHn

    def norms(self, view: SlotView) -> Tensor:
        """Return L1 norms of values through the output projection, mean over the group, float32 [B, H, N].

        A norm is taken at the first compaction after its token and stored from then on.
        """
        assert view.output_projection_HqDM is not None
        stored_BHN = view.state["output_norm"]
        rows = []
        # By row: what is new is a row's own, and products then have the shapes the row has alone.
        for values_HND, stored_HN, is_new_N in zip(view.values_BHND, stored_BHN, (stored_BHN < 0).any(1), strict=True):
            slot_n = is_new_N.nonzero()[:, 0]
            new_Hn = projected_norms(values_HND[:, slot_n], view.output_projection_HqDM)
            rows.append(stored_HN.index_copy(1, slot_n, new_Hn.to(stored_HN.dtype)))
        return torch.stack(rows)


def projected_norms(values_HND: Tensor, projection_HqDM: Tensor) -> Tensor:
    """Return L1 norms of values through the output projection, mean over a KV head's query heads: float32 [H, N]."""
    weights_HgDM = torch.unflatten(projection_HqDM, 0, (len(values_HND), -1)).to(upcast(values_HND[:0]).dtype)
    parts = []
    for values_HnD in torch.split(values_HND, _SLOTS_AT_ONCE, 1):
        heads = [(upcast(values_HnD) @ weights_HDM).abs().sum(-1) for weights_HDM in weights_HgDM.unbind(1)]
        parts.append(torch.stack(heads).mean(0))
    return torch.cat(parts, dim=1)


def neighbour_sums(x: Tensor, kernel: int) -> Tensor:
    """Return the sum over `kernel` neighbouring slots [..., n], nothing beyond the ends: pooling up to a factor.

    By shifted additions, which on a CPU take a tenth of the time of a pooling kernel.
    """
    sums = x.clone()
    for shift in range(1, min(kernel // 2, x.shape[-1] - 1) + 1):
        sums[..., shift:] += x[..., :-shift]
        sums[..., :-shift] += x[..., shift:]
    return sums
