"""What a record says anything about: what the budget did to its tokens."""

from __future__ import annotations

import functools
from typing import Literal

from reasonkv.budget import Budget
from reasonkv.evaluate.records import AnswerRecord, ReplayRecord
from reasonkv.schedule import Lengths, next_event, step

Regime = Literal["compressed", "prompt_fills_budget", "uncompressed", "selecting"]
PREFIX_GUARD = "prefix_budget_exhausted"


def regime(record: ReplayRecord | AnswerRecord) -> Regime:
    """Return what a record says anything about.

    - "uncompressed": no compaction ran; the numbers are full KV's, whatever the method.
    - "prompt_fills_budget": compactions ran, but the method had no decode tokens to choose from. Either it says so
      itself (the fallback `prefix_budget_exhausted`), or the prompt is kept inside the budget and fills it together
      with the sinks and the recent window, or every compaction cut the prompt and decoding never met another one.
    - "compressed": decoding went on compressing, with tokens of its own to choose from.
    - "selecting": the method kept everything, and every decoded token read a part of it.

    With `prompt="count"` a prompt larger than the budget does not by itself fill it: its tokens may be dropped, so from
    the first compaction of decoding on the method chooses among both.
    """
    budget = None if record.budget is None else Budget.from_dict(record.budget)
    exhausted = record.guards.get(PREFIX_GUARD, 0) > 0
    return regime_of(budget, record.prompt_tokens, record.events, exhausted, record.selects)


def regime_of(budget: Budget | None, prompt: int, events: int, exhausted: bool, selects: bool) -> Regime:
    """Return the regime from the fields of a record that decide it."""
    if selects:
        return "selecting"
    if events == 0 or budget is None:
        return "uncompressed"
    if exhausted or (
        budget.tokens and budget.prompt == "keep" and max(prompt, budget.sinks) + budget.recent >= budget.tokens
    ):
        return "prompt_fills_budget"
    return "compressed" if events > _prompt_events(budget, prompt, events) else "prompt_fills_budget"


@functools.lru_cache(maxsize=4096)
def _prompt_events(budget: Budget, prompt: int, most: int) -> int:
    """Compactions while the prompt is fed, counted up to `most`; the schedule alone decides."""
    state, events = Lengths(prompt=prompt), 0
    while state.logical < prompt and events < most:
        boundary = next_event(budget, state)
        state, keep = step(budget, state, min(prompt, boundary or prompt) - state.logical)
        events += keep is not None
    return events
