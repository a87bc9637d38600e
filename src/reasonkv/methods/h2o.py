"""H2O: heavy hitters - the slots that have been attended to most since they were written - and the newest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from reasonkv.methods.base import Method, Observed, Requirements, SlotState
from reasonkv.methods.ops import attention_blocks, group_mean, top_k_slots, upcast
from reasonkv.methods.options import Share, Size
from reasonkv.plan import Plan
from reasonkv.view import SlotView

_FRESH = -1.0  # state of a slot that no event has seen; attention is never negative
_QUERIES_AT_ONCE = 128


@dataclass(frozen=True)
class H2O(Method):
    """Keep the slots with the largest accumulated attention, and the newest (Zhang et al., 2023, "H2O: Heavy-Hitter
    Oracle for Efficient Generative Inference of Large Language Models", arXiv 2306.14048, section 4).

    Every slot carries the sum of the attention that all queries since it was written have paid to it. The paper adds
    to it and evicts one slot at every step. Here an event adds for all queries since the last one: between events
    nothing is dropped, so each query's softmax over the slots it could see is known exactly. A KV head's attention is
    the mean over its query heads, as in kvpress.

    What is counted: the queries in a ring of `window`, and all queries of the newest forward if that fed more. So the
    sums are exact if no event comes more than `window` tokens after the one before it, and the first one either no more
    than `window` tokens after the start or right after a prompt fed in one forward. Queries that are neither do not
    count: of a prompt that fits into the budget only the last ones, unless `window` spans the budget.

    Args:
        window: newest queries that can be counted at an event; at least the budget's interval.
        recent_share: share of the kept slots that goes to the newest tokens; the paper's half.

    """

    name: ClassVar[str] = "h2o"
    title: ClassVar[str] = "Attention accumulated since a slot was written, and the newest"
    paper: ClassVar[str] = "H2O, arXiv 2306.14048"

    window: Size = 128
    recent_share: Share = 0.5

    @property
    def needs(self) -> Requirements:
        """The queries since the last event, and the sum beside every slot."""
        return Requirements(
            queries=self.window, observes=True, whole_prompt=True, slot_state={"attention": SlotState(_FRESH)}
        )

    def new_row_state(self, rows: int, query_heads: int, head_dim: int, device: torch.device) -> dict[str, Tensor]:
        """The queries of the newest forward, while it is longer than the ring: none yet."""
        return {
            "queries": torch.empty(rows, query_heads, 0, head_dim, device=device),
            "positions": torch.empty(rows, 0, dtype=torch.int64, device=device),
        }

    def observe(self, state: dict[str, Tensor], seen: Observed) -> None:
        """Hold the queries of a forward that the ring is too short for, until the next forward."""
        if seen.queries_BHqqD.shape[2] > self.window:
            state["queries"] = seen.queries_BHqqD
            state["positions"] = seen.positions_Bq.masked_fill(~seen.valid_Bq, -1)  # padding precedes every token
        elif state["queries"].shape[2]:
            state["queries"] = state["queries"][:, :, :0].clone()
            state["positions"] = state["positions"][:, :0].clone()

    def plan(self, view: SlotView, keep: int) -> Plan:
        """Add up, give `recent_share` of the slots to the newest, and the rest to the heaviest."""
        attention_BHN = self.accumulated(view)
        newest = int(keep * self.recent_share)
        scores_BHN = attention_BHN.clone()
        if newest:
            # Not forced: protected slots come first where both do not fit.
            scores_BHN[..., -newest:] = torch.finfo(scores_BHN.dtype).max
        scores_BHN = torch.where(attention_BHN.isnan(), attention_BHN, scores_BHN)
        kept_BHK = top_k_slots(scores_BHN, keep, forced_BHN=view.is_protected_BHN)
        return Plan(kept_BHK, state={"attention": attention_BHN.gather(2, kept_BHK)})

    def accumulated(self, view: SlotView) -> Tensor:
        """Attention received by every slot from all queries counted so far, float32 [B, H, N]."""
        stored_BHN = view.state["attention"]
        fresh_BHN = stored_BHN < 0
        first_B1 = view.positions_BHN.where(fresh_BHN, view.length_B[:, None, None]).amin((1, 2))[:, None]
        assert view.queries_BHqTD is not None and view.query_positions_BT is not None
        total_BHN = stored_BHN.clamp(min=0.0).to(upcast(view.keys_BHND[:0]).dtype)
        ring_counts_BT = view.query_positions_BT >= first_B1
        if view.row_state["positions"].shape[1]:
            positions_Bq = view.row_state["positions"]
            total_BHN = total_BHN + received(view, view.row_state["queries"], positions_Bq, positions_Bq >= first_B1)
            start_B1 = positions_Bq.where(positions_Bq >= 0, view.length_B[:, None]).amin(1, keepdim=True)
            ring_counts_BT = ring_counts_BT & (view.query_positions_BT < start_B1)
        return total_BHN + received(view, view.queries_BHqTD, view.query_positions_BT, ring_counts_BT)


def received(view: SlotView, queries_BHqTD: Tensor, positions_BT: Tensor, counts_BT: Tensor) -> Tensor:
    """Attention that queries pay to every slot: summed over the queries that count, mean over the query heads.

    Args:
        view: one layer's slots.
        queries_BHqTD: rotated queries among the newest T tokens of every row.
        positions_BT: int64, their token indices, -1 at padding.
        counts_BT: bool; a query that counts sees every slot up to its own, as it did in the model.

    Returns:
        float32 (float64 for float64 keys) [B, H, N].

    """
    B, H, N, D = view.keys_BHND.shape
    T, g = queries_BHqTD.shape[2], queries_BHqTD.shape[1] // H
    old = max(0, N - T)  # slots before the T newest tokens: all queries see them
    queries_RgTD, keys_RND = queries_BHqTD.reshape(B * H, g, T, D), view.keys_BHND.flatten(0, 1)
    slots_R1N = view.positions_BHN.flatten(0, 1)[:, None, old:]
    positions_RT1 = positions_BT.repeat_interleave(H, 0)[..., None]
    ignored_R1T1 = ~counts_BT.repeat_interleave(H, 0)[:, None, :, None]
    # In float64: sums of thousands of queries, and no trace of the pieces they came in after rounding.
    ignores = not bool(counts_BT.all())
    total_RgN = torch.zeros(B * H, g, N, dtype=torch.float64, device=keys_RND.device)
    for start in range(0, T, _QUERIES_AT_ONCE):
        at = slice(start, start + _QUERIES_AT_ONCE)
        later_RTn = slots_R1N > positions_RT1[:, at]
        for block, attention_RgTN in attention_blocks(queries_RgTD[:, :, at], keys_RND, view.scaling, later_RTn):
            if ignores:  # an ignored query may have no slot left to see: its row is NaN, and is filled
                attention_RgTN.masked_fill_(ignored_R1T1[block, :, at], 0.0)
            total_RgN[block] += attention_RgTN.sum(2, dtype=torch.float64)
    return group_mean(total_RgN.view(B, H, g, N)).to(upcast(view.keys_BHND[:0]).dtype)
