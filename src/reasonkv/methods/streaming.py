"""StreamingLLM: attention sinks and the most recent tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from reasonkv.methods.base import ScorerMethod
from reasonkv.view import SlotView


@dataclass(frozen=True)
class StreamingLLM(ScorerMethod):
    """Keep the first tokens and the newest (Xiao et al., 2024, "Efficient Streaming Language Models with Attention
    Sinks", arXiv 2309.17453, section 3).

    How many first tokens is the budget's `sinks`; the rest goes to the newest. Kept keys stay at their true positions;
    the paper's code numbers positions inside the cache.
    """

    def score(self, view: SlotView) -> Tensor:
        """The position itself: the newer, the better."""
        return view.positions_BHN.float()
