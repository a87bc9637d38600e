"""Random Attention as published: the prompt first, then a uniformly random set per KV head."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from reasonkv.methods.base import Requirements, ScorerMethod
from reasonkv.methods.ops import top_k_slots
from reasonkv.methods.options import Count, Size
from reasonkv.plan import Plan
from reasonkv.view import SlotView


@dataclass(frozen=True)
class RandomAttention(ScorerMethod):
    """Keep the newest tokens, the prompt, and a random rest (Random Attention, 2026, arXiv 2609.03430, and its code).

    The prompt stands inside the budget and the method itself holds it, whatever the budget says of prompts: its first
    tokens come before all others, as many as leave one slot for the rest. `random` is the draw alone, for budgets
    that protect the prompt.

    Args:
        recent: newest tokens that always stay.
        prompt: "all" - every prompt token comes first; "cap" - the first `cap` and of the others every second one;
            "none" - the prompt is drawn from as everything else is.
        cap: prompt tokens of "cap" that are all held.
        pinned: first generated tokens that are held like the prompt.
        block: consecutive tokens that share one number and so stay or go together.
        redraw: fresh numbers at every event (the paper); False: one number per token for ever.
        shared: one set for all KV heads of a layer (the paper's control for what differing heads are worth).

    """

    name: ClassVar[str] = "random-attention"
    title: ClassVar[str] = "The prompt, and a uniformly random set per KV head"
    paper: ClassVar[str] = "Random Attention, arXiv 2609.03430"

    recent: Count = 64
    prompt: Literal["all", "cap", "none"] = "all"
    cap: Count = 512
    pinned: Count = 0
    block: Size = 1
    redraw: bool = True
    shared: bool = False

    @property
    def needs(self) -> Requirements:
        """The newest tokens protected; with `shared`, all heads share their slots."""
        return Requirements(recent=self.recent, scope="layer" if self.shared else "head")

    def plan(self, view: SlotView, keep: int) -> Plan:
        """Held tokens, oldest first, as many as leave one slot; the rest by their numbers."""
        room = max(0, keep - self.recent - 1)
        kept_BHK = top_k_slots(self.ranked(view, room), keep, forced_BHN=view.is_protected_BHN)
        return Plan(kept_BHK)

    def score(self, view: SlotView) -> Tensor:
        """One uniform number per slot; held tokens have 2."""
        return torch.where(self.is_held(view), 2.0, self.numbers(view))

    def numbers(self, view: SlotView) -> Tensor:
        """Uniform numbers, float32 [B, H, N]: of blocks if `block` says so, of KV head 0 if `shared`."""
        if self.block == 1 and not self.shared:
            return view.uniform_BHN(per_event=self.redraw)
        positions_BHN = view.positions_BHN.div(self.block, rounding_mode="floor")
        first_head = 0 if self.shared else view.first_head  # of all heads, whichever are here
        numbers_BHN = replace(view, positions_BHN=positions_BHN, first_head=first_head).uniform_BHN(
            per_event=self.redraw
        )
        return numbers_BHN[:, :1].expand_as(numbers_BHN).contiguous() if self.shared else numbers_BHN

    def is_held(self, view: SlotView) -> Tensor:
        """Prompt tokens that come first, and the first generated ones if they are pinned, bool [B, H, N]."""
        positions_BHN = view.positions_BHN
        held_BHN = view.is_prompt_BHN
        if self.prompt == "cap":
            held_BHN = held_BHN & ((positions_BHN < self.cap) | ((positions_BHN - self.cap) % 2 == 0))
        elif self.prompt == "none":
            held_BHN = torch.zeros_like(held_BHN)
        if self.pinned and view.prompt_length_B is not None:
            end_B11 = view.prompt_length_B[:, None, None]
            held_BHN = held_BHN | ((positions_BHN >= end_B11) & (positions_BHN < end_B11 + self.pinned))
        return held_BHN

    def ranked(self, view: SlotView, room: int) -> Tensor:
        """Numbers below 1; above them the first `room` held tokens, the older the higher."""
        held_BHN = self.is_held(view)
        rank_BHN = held_BHN.cumsum(-1)  # 1 for the oldest
        numbers_BHN = self.numbers(view)
        above_BHN = (2 + room - rank_BHN).to(numbers_BHN.dtype)
        return torch.where(held_BHN & (rank_BHN <= room), above_BHN, numbers_BHN)
