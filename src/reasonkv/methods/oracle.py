"""The oracle: what full KV will look at stays. A reference line, for replay only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from reasonkv.methods.base import Requirements, ScorerMethod
from reasonkv.view import SlotView


@dataclass(frozen=True)
class Oracle(ScorerMethod):
    """Keep the tokens that full KV's queries still to come pay the most attention to.

    It looks into the future, so it works in replay only, where the trace is known. It is a reference line and not a
    bound: attention mass is not truth. A token that is rarely looked at may decide the answer, values differ in what
    they contribute, each head is judged by itself, and dropping slots changes what later queries look at; scores that
    read no queries at all have been seen to beat it.

    Args:
        reduce: over the queries still to come: "sum" - all attention a token will get; "max" - the most that any one
            query pays.

    """

    name: ClassVar[str] = "oracle"
    title: ClassVar[str] = "True future attention (a reference line)"
    paper: ClassVar[str] = "-"

    reduce: Literal["sum", "max"] = "sum"

    @property
    def needs(self) -> Requirements:
        """The future."""
        return Requirements(future=True)

    def score(self, view: SlotView) -> Tensor:
        """Future attention; all 0 when nothing is to come, and then the newest slots stay."""
        return view.future_attention_BHN(self.reduce)
