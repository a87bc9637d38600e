"""The words that a budget knows, and its fields as keywords."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypedDict

PromptPolicy = Literal["count", "keep", "on_top"]
Trigger = Literal["occupancy", "grid"]
TriggerCounts = Literal["all", "decode"]
CutPrompt = Literal["prefill", "first_event"]


class BudgetFields(TypedDict, total=False):
    """The fields of `Budget`, as keywords of `CompressedCache` and `generate_with`."""

    tokens: int
    keep: float
    interval: int
    sinks: int
    recent: int
    prompt: PromptPolicy
    trigger: Trigger
    trigger_counts: TriggerCounts
    cut_prompt: CutPrompt
    prefill_chunk: int | None
    stagger: int
    layer_shares: str | Sequence[float]
