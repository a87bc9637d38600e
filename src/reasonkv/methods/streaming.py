"""StreamingLLM: attention sinks and the most recent tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from reasonkv.methods.base import ScorerMethod
from reasonkv.view import SlotView


@dataclass(frozen=True)
class StreamingLLM(ScorerMethod):
    """Keep the first tokens and the newest (Xiao et al., 2024, "Efficient Streaming Language Models with Attention
    Sinks", arXiv 2309.17453, section 3).

    How many first tokens is the budget's `sinks` (4, the paper's choice); all that is left of the budget goes to the
    newest. Kept keys stay at their true positions. The paper's code numbers positions inside the cache instead, which
    needs keys cached before RoPE.
    """

    name: ClassVar[str] = "streaming"

    def score(self, view: SlotView) -> Tensor:
        """The position itself: the newer, the better."""
        return view.positions_BHN.float()
