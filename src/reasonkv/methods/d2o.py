"""D2O: slots that H2O evicts are merged into the most similar kept one, if they are similar enough."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from reasonkv.methods.base import Requirements, SlotState
from reasonkv.methods.h2o import H2O
from reasonkv.methods.ops import by_head
from reasonkv.methods.options import Share
from reasonkv.plan import Merge, Plan
from reasonkv.view import SlotView

_NONE = -2.0  # threshold before the first compaction; no cosine is that low


@dataclass(frozen=True)
class D2O(H2O):
    """Evict by H2O, and merge what is similar to a kept slot (Wan et al., 2024, "D2O: Dynamic Discriminative Operations
    for Efficient Generative Inference of Large Language Models", arXiv 2406.13035, and its code).

    1. H2O chooses what is kept. For every slot that goes, u is the largest cosine of its key with a kept one's.
    2. The threshold tau is the mean of u at the first compaction, then beta x tau + (1 - beta) x mean of u.
    3. Slots with u >= tau are merged into that kept one, key and value, with weights exp(u) beside exp(1) for the kept
       slot, which sum to 1; the others are dropped.

    A merged slot attends as one: the attention that several had is that of one (the log mass of `importance` and `cask`
    is not in the paper). The paper also gives layers budgets by the variance of their attention; here all are alike.

    Args:
        window, recent_share: H2O's.
        beta: weight of the threshold before.
        weights: "exp" - step 3; "cosine" - the authors' code: 1 for the kept slot and u for each other, divided by
            their number, so that vectors shrink.
    """

    beta: Share = 0.5
    weights: Literal["exp", "cosine"] = "exp"

    @property
    def needs(self) -> Requirements:
        # A number of the head, beside every slot: there is no other place that lasts from compaction to compaction.
        state = {**super().needs.slot_state, "threshold": SlotState(_NONE)}
        return replace(super().needs, merges=True, slot_state=state)

    def plan(self, view: SlotView, keep: int) -> Plan:
        plan = super().plan(view, keep)
        kept_BHK, before_BH1 = plan.kept_BHK, view.state["threshold"].amax(-1, keepdim=True)
        is_kept_BHN = torch.zeros_like(view.is_protected_BHN).scatter(2, kept_BHK, True)
        cosine_BHN, nearest_BHN = self.nearest(view.keys_BHND, kept_BHK)
        gone_BHN = (~is_kept_BHN).to(cosine_BHN.dtype)
        mean_BH1 = (cosine_BHN * gone_BHN).sum(-1, keepdim=True) / gone_BHN.sum(-1, keepdim=True)
        threshold_BH1 = self.beta * before_BH1 + (1.0 - self.beta) * mean_BH1
        threshold_BH1 = torch.where(before_BH1 == _NONE, mean_BH1, threshold_BH1).to(cosine_BHN.dtype)
        own_BHN, joins_BHN = is_kept_BHN.cumsum(-1) - 1, ~is_kept_BHN & (cosine_BHN >= threshold_BH1)
        into_BHN = torch.where(is_kept_BHN, own_BHN, nearest_BHN.masked_fill(~joins_BHN, -1))
        weights_BHN = self.merge_weights(cosine_BHN, is_kept_BHN, into_BHN, keep)
        state = {**plan.state, "threshold": threshold_BH1.expand(kept_BHK.shape)}
        return Plan(kept_BHK, Merge(into_BHN, weights_BHN, weights_BHN), state=state)

    def nearest(self, keys_BHND: Tensor, kept_BHK: Tensor) -> tuple[Tensor, Tensor]:
        """Return the largest cosine of every key with a kept one, float32 [B, H, N], and which, int64."""

        def of_heads(keys_rND: Tensor, kept_rKD: Tensor) -> Tensor:
            cosine_rNK = functional.normalize(keys_rND, dim=-1) @ functional.normalize(kept_rKD, dim=-1).mT
            best = cosine_rNK.max(-1)
            return torch.stack([best.values, best.indices.to(best.values.dtype)], 1)

        N, D = keys_BHND.shape[2:]
        held_BHKD = keys_BHND.gather(2, kept_BHK[..., None].expand(*kept_BHK.shape, D))
        both_BH2N = by_head(of_heads, keys_BHND, held_BHKD, elements=N * kept_BHK.shape[-1])
        return both_BH2N[:, :, 0], both_BH2N[:, :, 1].long()

    def merge_weights(self, cosine_BHN: Tensor, is_kept_BHN: Tensor, into_BHN: Tensor, keep: int) -> Tensor:
        """Return what every slot weighs in its group by step 3, 0 for dropped ones, as `Merge` has it."""
        member_BHN, group_BHN = (into_BHN >= 0).to(cosine_BHN.dtype), into_BHN.clamp(min=0)
        own_BHN = torch.where(is_kept_BHN, 1.0, cosine_BHN)
        raw_BHN = (own_BHN.exp() if self.weights == "exp" else own_BHN) * member_BHN
        part_BHN = raw_BHN if self.weights == "exp" else member_BHN
        total_BHK = torch.zeros(*into_BHN.shape[:2], keep, dtype=torch.float64, device=into_BHN.device)
        total_BHK.scatter_add_(2, group_BHN, part_BHN.double())
        return (raw_BHN / total_BHK.gather(2, group_BHN)).to(cosine_BHN.dtype)
