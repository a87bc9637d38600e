"""Scissorhands: slots that many recent queries passed over are evicted."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from reasonkv.methods.base import Requirements, ScorerMethod
from reasonkv.methods.ops import attend, later_slots, leading_slots
from reasonkv.methods.options import Size
from reasonkv.view import SlotView


@dataclass(frozen=True)
class Scissorhands(ScorerMethod):
    """Evict the slots that most often got less than the average attention (Liu et al., 2023, "Scissorhands: Exploiting
    the Persistence of Importance Hypothesis for LLM KV Cache Compression at Test Time", arXiv 2305.17118, algorithm 2).

    For every query of the history window, and every query head of a KV head, a slot counts one if it got less than the
    average slot. The slots with the smallest counts are kept; of equal ones the newer. The average is 1 / t for t
    slots; here it is that of the slots beside a kept prompt and sinks, so that these do not change what is low.

    A query's softmax runs over the slots still held: that of the model for queries since the last compaction. The paper
    evicts half of the budget at once: an `interval` of as many tokens as the budget.

    Args:
        window: newest queries that are counted. The paper's experiments use 400.
    """

    window: Size = 128

    @property
    def needs(self) -> Requirements:
        return Requirements(queries=self.window)

    def score(self, view: SlotView) -> Tensor:
        N = view.positions_BHN.shape[-1]
        later_BHTN, is_out_BHN = later_slots(view, newest=N), leading_slots(view)
        average_of_BHTN = ~later_BHTN & ~is_out_BHN[:, :, None]
        later_RTN, is_in_RTN = later_BHTN.flatten(0, 1), average_of_BHTN.flatten(0, 1)
        seen_RT1 = is_in_RTN.sum(-1, keepdim=True).clamp(min=1)

        def passed_over(block: slice, attention_rgTN: Tensor) -> Tensor:
            average_rgT1 = (attention_rgTN * is_in_RTN[block, None]).sum(-1, keepdim=True) / seen_RT1[block, None]
            is_low_rgTN = (attention_rgTN < average_rgT1) & ~later_RTN[block, None]
            return is_low_rgTN.sum((1, 2)) + 0.0 * attention_rgTN.sum((1, 2))  # NaN stays

        return -attend(view.queries_BHgTD(), view.keys_BHND, view.scaling, passed_over, later_BHTt=later_BHTN)
