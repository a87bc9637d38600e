"""H2O: heavy hitters - the slots that have been attended to most since they were written - and the newest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reasonkv.methods.base import Method, Observed, Requirements, SlotState
from reasonkv.methods.ops import free_slots, top_k_slots, upcast
from reasonkv.methods.options import Share, Size
from reasonkv.methods.received import FRESH, first_fresh, received
from reasonkv.plan import Plan
from reasonkv.view import SlotView


@dataclass(frozen=True)
class H2O(Method):
    """Keep the slots with the largest accumulated attention, and the newest (Zhang et al., 2023, "H2O: Heavy-Hitter
    Oracle for Efficient Generative Inference of Large Language Models", arXiv 2306.14048, section 4).

    Every slot carries the sum of the attention that all queries since it was written have paid to it, mean over a KV
    head's query heads. The paper adds and evicts at every step. Here a compaction adds for all queries since the last
    one: nothing was evicted in between, so each query's softmax is known exactly.

    Counted are the queries in a ring of `window`, and all queries of the newest forward if that fed more. So sums are
    exact where no compaction comes more than `window` tokens after the one before it, and the first one right after a
    prompt fed in one forward, or no more than `window` tokens after the start.

    Args:
        window: newest queries that can be counted at a compaction; at least the budget's interval.
        recent_share: share of what is kept, beside a kept prompt and sinks, that goes to the newest; the paper's half.
    """

    window: Size = 128
    recent_share: Share = 0.5

    @property
    def needs(self) -> Requirements:
        state = {"attention": SlotState(FRESH)}
        return Requirements(queries=self.window, observes=True, whole_prompt=True, slot_state=state)

    def new_row_state(self, rows: int, query_heads: int, head_dim: int, device: torch.device) -> dict[str, Tensor]:
        return {
            "queries": torch.empty(rows, query_heads, 0, head_dim, device=device),
            "positions": torch.empty(rows, 0, dtype=torch.int64, device=device),
        }

    def observe(self, state: dict[str, Tensor], seen: Observed) -> None:
        """Store the queries of a forward that the ring is too short for, until the next forward."""
        if seen.queries_BHqqD.shape[2] > self.window:
            state["queries"] = seen.queries_BHqqD
            state["positions"] = seen.positions_Bq.masked_fill(~seen.valid_Bq, -1)  # padding precedes every token
        elif state["queries"].shape[2]:
            state["queries"] = state["queries"][:, :, :0].clone()
            state["positions"] = state["positions"][:, :0].clone()

    def plan(self, view: SlotView, keep: int) -> Plan:
        attention_BHN = self.accumulated(view)
        newest_BH1 = (free_slots(view, keep).double() * self.recent_share).long()
        slots, number_N = attention_BHN.shape[-1], torch.arange(attention_BHN.shape[-1], device=attention_BHN.device)
        # Not forced: protected slots come first where both do not fit.
        scores_BHN = attention_BHN.masked_fill(number_N >= slots - newest_BH1, torch.finfo(attention_BHN.dtype).max)
        scores_BHN = torch.where(attention_BHN.isnan(), attention_BHN, scores_BHN)
        kept_BHK = top_k_slots(scores_BHN, keep, view.is_protected_BHN)
        return Plan(kept_BHK, state={"attention": attention_BHN.gather(2, kept_BHK)})

    def accumulated(self, view: SlotView) -> Tensor:
        """Return the attention every slot received from all queries counted so far, float32 [B, H, N]."""
        stored_BHN = view.state["attention"]
        first_B1 = first_fresh(view, stored_BHN)
        assert view.queries_BHqTD is not None and view.query_positions_BT is not None
        total_BHN = stored_BHN.clamp(min=0.0).to(upcast(view.keys_BHND[:0]).dtype)
        ring_counts_BT = view.query_positions_BT >= first_B1
        positions_Bq = view.row_state["positions"]
        if positions_Bq.shape[1]:
            total_BHN = total_BHN + self.received(
                view, view.row_state["queries"], positions_Bq, positions_Bq >= first_B1
            )
            start_B1 = positions_Bq.where(positions_Bq >= 0, view.length_B[:, None]).amin(1, keepdim=True)
            ring_counts_BT = ring_counts_BT & (view.query_positions_BT < start_B1)
        return total_BHN + self.received(view, view.queries_BHqTD, view.query_positions_BT, ring_counts_BT)

    def received(self, view: SlotView, queries_BHqTD: Tensor, positions_BT: Tensor, counts_BT: Tensor) -> Tensor:
        """Return what queries at these positions add to every slot's sum, float32 [B, H, N]."""
        return received(view, queries_BHqTD, counts_BT)
