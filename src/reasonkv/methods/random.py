"""Random Attention: a uniformly random set of slots per KV head, and the published rule that keeps the prompt first."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from reasonkv.methods.base import Requirements, ScorerMethod
from reasonkv.methods.ops import top_k_slots
from reasonkv.methods.options import Count, Size
from reasonkv.plan import Plan
from reasonkv.view import SlotView


@dataclass(frozen=True)
class RandomEviction(ScorerMethod):
    """Keep slots at random, each KV head its own (Random Attention, 2026, arXiv 2609.03430).

    The paper protects the prompt: say so in the budget (`prompt="keep"`).

    Args:
        redraw: True - fresh numbers at every compaction, as in the paper, so that chances fall with age. False - one
            number per token for ever: every age is equally likely.
    """

    redraw: bool = True

    def score(self, view: SlotView) -> Tensor:
        return view.uniform_BHN(per_event=self.redraw)


@dataclass(frozen=True)
class RandomAttention(ScorerMethod):
    """Keep the newest tokens, the prompt, and a random rest (Random Attention, 2026, arXiv 2609.03430, and its code).

    The prompt is inside the budget, and the method itself keeps it: its first tokens come before all others, as many
    as leave one slot for the rest. `random` is the draw alone, for budgets that protect the prompt.

    Args:
        recent: newest tokens that are always kept.
        prompt: "all" - every prompt token comes first; "cap" - the first `cap` and of the others every second one;
            "none" - the prompt is drawn from as everything else is.
        cap: prompt tokens of "cap" that are all kept.
        pinned: first generated tokens that are kept like the prompt.
        block: consecutive tokens that share one number and so are kept or evicted together.
        redraw: fresh numbers at every compaction (the paper); False: one number per token for ever.
        shared: one set for all KV heads of a layer (the paper's control for what differing heads are worth).
    """

    recent: Count = 64
    prompt: Literal["all", "cap", "none"] = "all"
    cap: Count = 512
    pinned: Count = 0
    block: Size = 1
    redraw: bool = True
    shared: bool = False

    @property
    def needs(self) -> Requirements:
        return Requirements(recent=self.recent, scope="layer" if self.shared else "head")

    def plan(self, view: SlotView, keep: int) -> Plan:
        """Keep the first prompt tokens, as many as leave one slot; of the rest the largest numbers."""
        numbers_BHN, first_BHN = self.numbers(view), self.comes_first(view)
        room = max(0, keep - self.recent - 1)
        rank_BHN = first_BHN.cumsum(-1)  # 1 for the oldest
        above_BHN = (2 + room - rank_BHN).to(numbers_BHN.dtype)  # numbers are below 1
        scores_BHN = torch.where(first_BHN & (rank_BHN <= room), above_BHN, numbers_BHN)
        return Plan(top_k_slots(scores_BHN, keep, view.is_protected_BHN))

    def score(self, view: SlotView) -> Tensor:
        """Return one uniform number per slot; 2 for tokens that come first."""
        return torch.where(self.comes_first(view), 2.0, self.numbers(view))

    def numbers(self, view: SlotView) -> Tensor:
        """Return uniform numbers, float32 [B, H, N]: of blocks if `block` says so, of KV head 0 if `shared`."""
        positions_BHN = view.positions_BHN.div(self.block, rounding_mode="floor")
        first_head = 0 if self.shared else view.first_head  # of all heads, whichever are here
        drawn = replace(view, positions_BHN=positions_BHN, first_head=first_head)
        numbers_BHN = drawn.uniform_BHN(per_event=self.redraw)
        return numbers_BHN[:, :1].expand_as(numbers_BHN).contiguous() if self.shared else numbers_BHN

    def comes_first(self, view: SlotView) -> Tensor:
        """Return the prompt tokens that come first, and the first generated ones if they are pinned, bool [B, H, N]."""
        positions_BHN = view.positions_BHN
        first_BHN = view.is_prompt_BHN
        if self.prompt == "cap":
            first_BHN = first_BHN & ((positions_BHN < self.cap) | ((positions_BHN - self.cap) % 2 == 0))
        elif self.prompt == "none":
            first_BHN = torch.zeros_like(first_BHN)
        if self.pinned and view.prompt_length_B is not None:
            end_B11 = view.prompt_length_B[:, None, None]
            first_BHN = first_BHN | ((positions_BHN >= end_B11) & (positions_BHN < end_B11 + self.pinned))
        return first_BHN
