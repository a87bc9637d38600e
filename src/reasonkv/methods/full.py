"""Full KV: the ceiling every method is measured against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from reasonkv.methods.base import Method
from reasonkv.plan import Plan
from reasonkv.view import SlotView


@dataclass(frozen=True)
class FullKV(Method):
    """Keep every slot. It takes no budget, so no event ever asks it for a plan."""

    bounded: ClassVar[bool] = False

    def plan(self, view: SlotView, keep: int) -> Plan:
        """All slots, whatever `keep` says."""
        B, H, N = view.positions_BHN.shape
        return Plan(torch.arange(N, device=view.positions_BHN.device).expand(B, H, N))
