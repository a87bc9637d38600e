"""Importance sampling: slots stay by chance, in proportion to expected attention, and stand for those that go."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

import torch
from annotated_types import Ge

from reasonkv.methods.base import Requirements
from reasonkv.methods.catalogue import MethodError
from reasonkv.methods.ops import top_k_slots
from reasonkv.methods.wraps import ScoreWrapper
from reasonkv.plan import Plan
from reasonkv.view import SlotView

_BASES = ("expected", "snapkv")


@dataclass(frozen=True)
class ImportanceSampling(ScoreWrapper):
    """Keep a sample of the slots, weighed so that attention stays right on average, instead of the best ones.

    Eviction of the lowest scores always drops the same kind of token. Here each has a chance, and a slot that stayed by
    chance counts for those that went: priority sampling (Duffield, Lund & Thorup, 2007, "Priority sampling for
    estimation of arbitrary subset sums", JACM 54:6) of what slots are expected to add to attention.

    1. The size s of a slot is its score by the base method, everything the slot stands for included.
    2. Its priority is s / u, u uniform in (0, 1); the largest priorities stay.
    3. t is the largest priority that goes. Slots with s < t stand for t / s times what they stood for: log mass.

    Sums over slots of s, and of any part of them, are then right on average (shown there), but for `cap`.

    Args:
        base: the method whose scores are sizes, with its options as in `expected:future=64;sinks=0`; its scores must
            be attention that counts log mass: expected or snapkv.
        cap: largest log mass; it bounds what one slot can draw to itself.
    """

    base: str = "expected"
    cap: Annotated[float, Ge(0)] = 3.0

    @property
    def needs(self) -> Requirements:
        return replace(self.scorer.needs, log_mass=True)

    def check_options(self) -> None:
        if self.scorer.name not in _BASES:
            raise MethodError(f"{self.name}: base must be {' or '.join(_BASES)}, not {self.scorer.name}.")

    def plan(self, view: SlotView, keep: int) -> Plan:
        size_BHN, mass_BHN = self.scorer.score(view), view.state["log_mass"]
        size_BHN = size_BHN.clamp(min=torch.finfo(torch.float32).tiny)  # a score may round to 0, but no chance is 0
        priority_BHN = size_BHN / view.uniform_BHN()
        kept_BHK = top_k_slots(priority_BHN, keep, view.is_protected_BHN)
        gone_BHN = priority_BHN.scatter(2, kept_BHK, 0.0)
        raised_BHN = (gone_BHN.amax(-1, keepdim=True) / size_BHN).log().clamp(min=0.0)
        raised_BHN = raised_BHN.masked_fill(view.is_protected_BHN, 0.0)
        return Plan(kept_BHK, log_mass_BHK=(mass_BHN + raised_BHN).clamp(max=self.cap).gather(2, kept_BHK))
