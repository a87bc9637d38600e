"""LazyEviction: slots that were attended to again after long pauses are kept through such a pause."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reasonkv.methods.base import Method, Requirements, SlotState
from reasonkv.methods.ops import newest_attention, top_k_slots
from reasonkv.methods.options import Share, Size
from reasonkv.methods.received import FRESH, uncounted
from reasonkv.plan import Plan
from reasonkv.view import SlotView


@dataclass(frozen=True)
class LazyEviction(Method):
    """Keep slots whose last activation is recent on the scale of their own longest pause (Zhang et al., 2025,
    "LazyEviction: Lagged KV Eviction with Attention Pattern Observation for Efficient Long Reasoning", arXiv
    2506.15969, version 3).

    A query activates the slots that it pays at least `alpha` of its attention to. Every slot carries the token index TS
    of its last activation, its own at first, and MRI, the largest gap between two activations. At token t

        score = H1 + H2;   H1 = 2 sigmoid(-(t - TS) / MRI);   H2 = 2 sigmoid(-MRI - 1), 0 where MRI = 0.

    Without a gap (MRI = 0) H1 is 1 for a slot activated at t and 0 for others. Attention is the mean over a KV head's
    query heads; what the paper does with groups is not known to us. Version 1 had another H2.

    Args:
        alpha: attention that activates a slot. The paper's; it does not depend on the number of slots.
        window: newest queries that can be counted at a compaction; at least the budget's interval.
    """

    alpha: Share = 1e-4
    window: Size = 128

    @property
    def needs(self) -> Requirements:
        state = {"activated": SlotState(FRESH), "interval": SlotState(FRESH)}
        return Requirements(queries=self.window, slot_state=state)

    def plan(self, view: SlotView, keep: int) -> Plan:
        activated_BHN, interval_BHN = self.recurrence(view).unbind(2)
        age_BHN = (view.length_B[:, None, None] - 1) - activated_BHN
        first_BHN = 2.0 * torch.sigmoid(-age_BHN / interval_BHN.clamp(min=1e-6))  # an interval is at least 1, or 0
        second_BHN = torch.where(interval_BHN == 0, 0.0, 2.0 * torch.sigmoid(-interval_BHN - 1.0))
        kept_BHK = top_k_slots(first_BHN + second_BHN, keep, view.is_protected_BHN)
        state = {"activated": activated_BHN, "interval": interval_BHN}
        return Plan(kept_BHK, state={name: tensor.gather(2, kept_BHK) for name, tensor in state.items()})

    def recurrence(self, view: SlotView) -> Tensor:
        """Return TS and MRI of every slot, float32 [B, H, 2, N]; MRI is NaN where attention is."""
        stored_BHN, H = view.state["activated"], view.positions_BHN.shape[1]
        position_RT, is_new_RT = (x.repeat_interleave(H, 0) for x in uncounted(view, stored_BHN))
        before_RN = stored_BHN.where(stored_BHN >= 0, view.positions_BHN.to(stored_BHN.dtype)).flatten(0, 1)
        interval_RN = view.state["interval"].clamp(min=0.0).flatten(0, 1)

        def track(block: slice, attention_rgTN: Tensor) -> Tensor:
            attention_rTN = attention_rgTN.mean(1)
            is_active_rTN = (attention_rTN >= self.alpha) & is_new_RT[block, :, None]
            position_rT1 = position_RT[block, :, None].to(before_RN.dtype)
            at_rTN = position_rT1.where(is_active_rTN, FRESH)
            last_rTN = torch.cat([before_RN[block, None], at_rTN], 1).cummax(1).values  # before every query, and now
            gap_rTN = (position_rT1 - last_rTN[:, :-1]).where(is_active_rTN, 0.0) + 0.0 * attention_rTN  # NaN stays
            return torch.stack([last_rTN[:, -1], interval_RN[block].maximum(gap_rTN.amax(1))], 1)

        return newest_attention(view, track)
