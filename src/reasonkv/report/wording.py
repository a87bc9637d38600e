"""Sentences and cells that several tables share."""

from __future__ import annotations

from collections.abc import Sequence
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


def budget_sentence(
    budget: dict[str, Any], selecting: Sequence[str] = (), padded: Sequence[str] = (), *, evicting: bool = True
) -> str:
    """What a budget's number counts, what is held on top of it, and what attention reads of that.

    Args:
        budget: every field, or all but the size.
        selecting: labels of the methods that hold everything and read a part of it.
        padded: labels of the methods that hold padding, which nothing attends to.
        evicting: whether other bounded methods ran as well.
    """
    if not evicting:
        return (
            "Budget: most slots per KV head and layer that a decoded token reads, prompt included; everything is held, "
            "and slots read says how many were read."
        )
    reads = "Slots are what attention reads, everything held included."
    if selecting or padded:
        reads = f"Slots are held, and attention reads them all, but for {listed([*selecting, *padded])} (slots read)."
    if selecting:
        verb = "holds" if len(selecting) == 1 else "hold"
        reads += (
            f" {listed(selecting)} {verb} everything: the budget is the most a decoded token reads, prompt included."
        )
    if padded:
        verb = "holds" if len(padded) == 1 else "hold"
        reads += f" {listed(padded)} {verb} padding, which nothing attends to."
    if "retention" in budget:
        return (
            f"Budget: slots that stay of every window of {budget['size']} decoded tokens, which are cut once; the "
            f"{budget['buffer']} newest and the prompt stay besides. {reads}"
        )
    rule = "every" if budget["trigger"] == "occupancy" else "on the grid of"
    return (
        f"Budget: slots per KV head and layer that stay after a compaction ({rule} {budget['interval']} tokens), "
        f"{budget['sinks']} sinks and the {budget['recent']} newest among them; {PROMPT_WORDS[budget['prompt']]}. "
        f"{reads}"
    )


def size_words(budget: dict[str, Any]) -> str:
    """What stays: `128 slots`, or `19 slots of every 64` of a window."""
    return f"{budget['tokens']:,} slots" + (f" of every {budget['size']:,}" if "size" in budget else "")


def listed(words: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def seeds_sentence(seeds: set[int]) -> str:
    """Which seeds there were."""
    return f"Seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, sorted(seeds)))}."


def _number(value: float, digits: int, sign: str = "") -> str:
    text = f"{value:{sign},.{digits}f}"
    is_zero = float(text.replace(",", "")) == 0
    return f"{0:.{digits}f}" if is_zero else text  # neither -0.0 nor +0.0
