"""InertiaKV: attention smoothed over the steps, so that one odd query evicts nothing."""

from __future__ import annotations

from dataclasses import dataclass

from reasonkv.methods.base import Method, Requirements, SlotState
from reasonkv.methods.ops import top_k_slots, upcast
from reasonkv.methods.options import Share, Size
from reasonkv.methods.received import FRESH, received, uncounted
from reasonkv.plan import Plan
from reasonkv.view import SlotView


@dataclass(frozen=True)
class InertiaKV(Method):
    """Keep the largest moving averages of attention (2026, "What Matters for Aggressive Decoding-Time KV Eviction?
    Temporal Aggregation and Ranking Preservation", arXiv 2609.03515).

    Every slot carries m, and every query that refreshes it pays attention s (mean over a KV head's query heads):

        m = alpha x m before + (1 - alpha) x s,   m = 0 before its own token's query.

    The paper evicts at every step; here a compaction takes in all queries since the last one. Its code updates one m
    through all layers in turn, so that alpha mixes layers as well; here every layer has its own. What m is for a new
    slot is not known to us.

    Args:
        alpha: weight of the past.
        refresh: steps between two refreshes, at the positions that it divides; the paper's Lazy form uses 4.
        window: newest queries that can be counted at a compaction; at least the budget's interval.
    """

    alpha: Share = 0.8
    refresh: Size = 1
    window: Size = 128

    @property
    def needs(self) -> Requirements:
        return Requirements(queries=self.window, slot_state={"average": SlotState(FRESH)})

    def plan(self, view: SlotView, keep: int) -> Plan:
        assert view.queries_BHqTD is not None
        stored_BHN = view.state["average"].to(upcast(view.keys_BHND[:0]).dtype)
        positions_BT, is_new_BT = uncounted(view, stored_BHN)
        counts_BT = is_new_BT & (positions_BT % self.refresh == 0)
        after_BT = counts_BT.flip(1).cumsum(1).flip(1) - counts_BT.long()  # refreshes after this one
        weights_BT = counts_BT * (1.0 - self.alpha) * self.alpha ** after_BT.double()
        past_B11 = (self.alpha ** counts_BT.sum(1).double())[:, None, None].to(stored_BHN.dtype)
        average_BHN = past_B11 * stored_BHN.clamp(min=0.0) + received(view, view.queries_BHqTD, weights_BT)
        kept_BHK = top_k_slots(average_BHN, keep, view.is_protected_BHN)
        return Plan(kept_BHK, state={"average": average_BHN.gather(2, kept_BHK)})
