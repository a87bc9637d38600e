"""The oracle: what full KV will attend to is kept. A reference line, for replay only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from reasonkv.methods.base import Requirements, ScorerMethod
from reasonkv.view import SlotView


@dataclass(frozen=True)
class Oracle(ScorerMethod):
    """Keep the tokens that full KV's queries still to come pay the most attention to.

    It works in replay only, where the trace is known. It is a reference line and not a bound: scores that read no
    queries have beaten it.

    Args:
        reduce: over the queries still to come: "sum" - all attention a token will get; "max" - the most that any one
            query pays. Where none is to come all scores are 0, and the newest slots are kept.
    """

    reduce: Literal["sum", "max"] = "sum"

    @property
    def needs(self) -> Requirements:
        return Requirements(future=True)

    def score(self, view: SlotView) -> Tensor:
        return view.future_attention_BHN(self.reduce)
