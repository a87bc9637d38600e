"""Sentences and cells that several tables share."""

from __future__ import annotations

from typing import Any

from reasonkv.evaluate.statistics import Difference, Estimate

PROMPT_WORDS = {
    "count": "the prompt counts inside the budget and may be dropped",
    "keep": "the prompt counts inside the budget and is never dropped",
    "on_top": "the prompt is held on top of the budget and never dropped",
}


def estimate_text(one: Estimate, digits: int, scale: float = 1) -> str:
    """`mean ±se`, with this many digits after the point."""
    mean = _number(one.mean * scale, digits)
    return mean if one.se is None else f"{mean} ±{one.se * scale:,.{digits}f}"


def difference_text(one: Difference | None, digits: int, scale: float = 1) -> str:
    """`mean [low, high]` with signs, or `-` where nothing was compared."""
    if one is None:
        return "-"
    mean, low, high = (_number(value * scale, digits, sign="+") for value in (one.mean, one.low, one.high))
    return f"{mean} [{low}, {high}]"


def budget_sentence(budget: dict[str, Any]) -> str:
    """What a budget's number counts, and what is held on top of it."""
    if "retention" in budget:
        return (
            f"Budget: slots that stay of every window of {budget['size']} decoded tokens, which are cut once; the "
            f"{budget['buffer']} newest and the prompt stay besides. "
            f"Slots are what attention reads, everything held included."
        )
    rule = "every" if budget["trigger"] == "occupancy" else "on the grid of"
    return (
        f"Budget: slots per KV head and layer that stay after a compaction ({rule} {budget['interval']} tokens), "
        f"{budget['sinks']} sinks and the {budget['recent']} newest among them; {PROMPT_WORDS[budget['prompt']]}. "
        f"Slots are what attention reads, everything held included."
    )


def seeds_sentence(seeds: set[int]) -> str:
    """Which seeds there were."""
    return f"Seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, sorted(seeds)))}."


def _number(value: float, digits: int, sign: str = "") -> str:
    text = f"{value:{sign},.{digits}f}"
    is_zero = float(text.replace(",", "")) == 0
    return f"{0:.{digits}f}" if is_zero else text  # neither -0.0 nor +0.0
