"""G-KV: the attention of the newest queries, remembered from one compaction to the next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from reasonkv.methods.base import Method, Requirements, SlotState
from reasonkv.methods.ops import fill_window, max_pool, newest_attention, top_k_slots
from reasonkv.methods.options import Kernel, Share, Size
from reasonkv.methods.received import FRESH
from reasonkv.methods.rkv import mean_cosine
from reasonkv.plan import Plan
from reasonkv.view import SlotView


@dataclass(frozen=True)
class GKV(Method):
    """Keep what the newest queries attend to, or attended to at earlier compactions (2025, "G-KV: Decoding-Time KV
    Cache Eviction with Global Attention", arXiv 2512.00504, and its code).

    1. Attention of the window's queries to the slots before it: maximum over the query heads of a group, mean over the
       queries, divided by the maximum over slots.
    2. The global score F = max(alpha x F before, that of step 1); a slot without one takes that of step 1.
    3. F, its maximum over neighbours if `kernel` says so, ranks the slots. F itself is stored, without that maximum.

    Args:
        variant: "corrected" - the maximum of step 1 is over slots that may be evicted; "paper" - over all slots before
            the window, so that one sink or prompt token sets the scale.
        window: newest queries that vote; their tokens are always kept.
        memory: step 2: "max"; "mean" - alpha x F + (1 - alpha) x new; "sum" - alpha x F + new. The paper's default is
            max.
        alpha: what is left of F after a compaction.
        kernel: slots pooled together in step 3, odd; 1 turns pooling off, the authors' code uses 5 where it is on.
        weight: share of F in the ranking, beside R-KV's redundancy of keys divided by its maximum; 1 leaves redundancy
            out, the authors' code uses 0.1 where it is in.
    """

    variant: Literal["corrected", "paper"] = "corrected"
    window: Size = 8
    memory: Literal["max", "mean", "sum"] = "max"
    alpha: Share = 0.8
    kernel: Kernel = 1
    weight: Share = 1.0

    @property
    def needs(self) -> Requirements:
        return Requirements(queries=self.window, recent=self.window, slot_state={"score": SlotState(FRESH)})

    def plan(self, view: SlotView, keep: int) -> Plan:
        global_BHn, N = self.remembered(view), view.positions_BHN.shape[-1]
        ranked_BHn = max_pool(global_BHn, self.kernel)
        if self.weight < 1:
            redundancy_BHn = mean_cosine(view.keys_BHND).softmax(-1)[..., : global_BHn.shape[-1]]
            ranked_BHn = self.weight * ranked_BHn - (1.0 - self.weight) * self.scaled(view, redundancy_BHn)
        kept_BHK = top_k_slots(fill_window(ranked_BHn, N), keep, view.is_protected_BHN)
        stored_BHN = functional.pad(global_BHn, (0, N - global_BHn.shape[-1]), value=FRESH)
        return Plan(kept_BHK, state={"score": stored_BHN.gather(2, kept_BHK)})

    def remembered(self, view: SlotView) -> Tensor:
        """Return step 2 for the slots before the window, float32 [B, H, n]."""
        n = view.positions_BHN.shape[-1] - view.queries_BHgTD().shape[3]
        attention_BHn = newest_attention(view, lambda _, attention_rgTN: attention_rgTN[..., :n].amax(1).mean(1))
        now_BHn, stored_BHn = self.scaled(view, attention_BHn), view.state["score"][..., :n].to(attention_BHn.dtype)
        old_BHn = self.alpha * stored_BHn.clamp(min=0.0)
        if self.memory == "max":
            return old_BHn.maximum(now_BHn)
        if self.memory == "sum":
            return old_BHn + now_BHn
        return torch.where(stored_BHn < 0, now_BHn, old_BHn + (1.0 - self.alpha) * now_BHn)

    def scaled(self, view: SlotView, x_BHn: Tensor) -> Tensor:
        """Return numbers divided by each head's maximum over the slots that count for it."""
        out_BHn = view.is_protected_BHN[..., : x_BHn.shape[-1]]
        counted_BHn = x_BHn if self.variant == "paper" else x_BHn.masked_fill(out_BHn, 0.0)
        return x_BHn / counted_BHn.amax(-1, keepdim=True).clamp(min=torch.finfo(x_BHn.dtype).tiny)
