"""SAGE-KV: one choice by the last query's attention, then a sliding window."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from reasonkv.methods.base import Method, Requirements, SlotState
from reasonkv.methods.ops import free_slots, group_mean, top_k_slots, window_attention
from reasonkv.methods.options import Share
from reasonkv.plan import Plan
from reasonkv.view import SlotView


@dataclass(frozen=True)
class SageKV(Method):
    """Keep what the last query of the prompt attends to for good, and the newest tokens (Wang et al., 2025, "LLMs Know
    What to Drop: Self-Attention Guided KV Cache Eviction for Efficient Long-Context Inference", arXiv 2503.08879).

    At its first compaction every KV head chooses the slots that the newest query attends to most, mean over its query
    heads, beside the newest ones. From then on those stay, and the rest of the slots are a window of the newest tokens
    that slides. With a prompt beyond the budget the first compaction comes right after it, as in the paper.

    Args:
        recent_share: share of what is kept, beside a kept prompt and sinks, that is the window. The paper has windows
            of its own for each budget.
        once: True - as above; False - the choice is made anew at every compaction.
    """

    recent_share: Share = 0.5
    once: bool = True

    @property
    def needs(self) -> Requirements:
        return Requirements(queries=1, recent=1, slot_state={"chosen": SlotState(0.0)})

    def plan(self, view: SlotView, keep: int) -> Plan:
        attention_BHN, N = group_mean(window_attention(view)), view.positions_BHN.shape[-1]
        number_N, chosen_BHN = torch.arange(N, device=attention_BHN.device), view.state["chosen"] > 0
        newest_BH1 = (free_slots(view, keep).double() * self.recent_share).long()
        is_newest_BHN = number_N >= N - newest_BH1
        choosing_BHN = attention_BHN + 2.0 * is_newest_BHN  # attention is at most 1
        sliding_BHN = number_N / N + 2.0 * chosen_BHN + 0.0 * attention_BHN  # NaN stays
        chooses_B11 = (view.event_B == 0)[:, None, None] | (not self.once)
        kept_BHK = top_k_slots(torch.where(chooses_B11, choosing_BHN, sliding_BHN), keep, view.is_protected_BHN)
        chosen_BHN = torch.where(chooses_B11, ~is_newest_BHN & ~view.is_protected_BHN, chosen_BHN)
        return Plan(kept_BHK, state={"chosen": chosen_BHN.gather(2, kept_BHK).to(attention_BHN.dtype)})
