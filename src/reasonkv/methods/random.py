"""Random eviction: a uniformly random set of slots per KV head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from reasonkv.methods.base import ScorerMethod
from reasonkv.view import SlotView


@dataclass(frozen=True)
class RandomEviction(ScorerMethod):
    """Keep slots at random, each KV head its own (Random Attention, 2026, arXiv 2609.03430).

    The paper protects the prompt: say so in the budget (`prompt="keep"`). Numbers are hashed from seeds and token
    positions, so a sequence draws the same in any batch.

    Args:
        redraw: True - fresh numbers at every compaction, as in the paper; the chance of a token then falls
            geometrically with age. False - one number per token for ever: the kept set is a reservoir sample in which
            every age is equally likely.
    """

    name: ClassVar[str] = "random"

    redraw: bool = True

    def score(self, view: SlotView) -> Tensor:
        return view.uniform_BHN(per_event=self.redraw)
