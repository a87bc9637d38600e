"""Sentences and cells that tables, figures and the report share."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from reasonkv.budget import Budget
from reasonkv.evaluate.statistics import Difference

PROMPT_WORDS = {
    "count": "the prompt counts inside the budget and may be dropped",
    "keep": "the prompt counts inside the budget and is never dropped",
    "on_top": "the prompt is kept on top of the budget and never dropped",
}


def number(value: float, digits: int, sign: str = "") -> str:
    """Return a number with this many digits after the point, never -0.0 nor +0.0."""
    text = f"{value:{sign},.{digits}f}"
    return text if any(one in "123456789" for one in text) else f"{0:.{digits}f}"


def estimate_text(row: Mapping[str, Any], metric: str, digits: int, scale: float = 1) -> str:
    """Return `mean ±se` of a metric of a summary's row, or `mean [low, high]` where it has an interval of its own.

    Too few examples have the mean alone; a metric that does not exist is `-`.
    """
    mean, se = row.get(metric, math.nan), row.get(f"{metric}_se", math.nan)
    if math.isnan(mean):
        return "-"
    if f"{metric}_low" in row:
        ends = interval_text(row[f"{metric}_low"], row[f"{metric}_high"], digits, scale)
        return f"{number(mean * scale, digits)} {ends}".rstrip()
    return number(mean * scale, digits) + ("" if math.isnan(se) else f" ±{se * scale:,.{digits}f}")


def ends(row: Mapping[str, Any], metric: str) -> tuple[float, float]:
    """Return the ends of a mean's interval: its own, or one standard error to each side; the mean where it has none."""
    mean, se = row[metric], row[f"{metric}_se"]
    low, high = row.get(f"{metric}_low", mean - se), row.get(f"{metric}_high", mean + se)
    return (mean, mean) if math.isnan(low) else (low, high)


def difference_text(one: Difference | None, digits: int, scale: float = 1, sign: str = "+") -> str:
    """Return `mean [low, high]` with signs (with `sign=""` without +), or `-` where nothing was compared."""
    if not isinstance(one, Difference):
        return "-"
    ends = interval_text(one.low, one.high, digits, scale, sign)
    return f"{number(one.mean * scale, digits, sign)} {ends}".rstrip()


def interval_text(low: float, high: float, digits: int, scale: float = 1, sign: str = "") -> str:
    """Return `[low, high]`, or nothing where the ends are NaN."""
    return "" if math.isnan(low) else f"[{', '.join(number(end * scale, digits, sign) for end in (low, high))}]"


def listed(words: Sequence[str]) -> str:
    """Return `a`, `a and b`, `a, b and c`."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def span(low: str, high: str) -> str:
    """Return `a to b`, or `a` where both are the same."""
    return low if low == high else f"{low} to {high}"


def plural(count: int, word: str) -> str:
    """Return `1 problem`, `2,000 problems`."""
    return f"{count:,} {word}{'s' * (count != 1)}"


def labels(frame: pd.DataFrame, where: pd.Series) -> list[str]:
    """Return the labels of the methods of some rows, each once."""
    return list(frame.loc[where, "label"].unique())


def selecting(frame: pd.DataFrame) -> list[str]:
    """Return the labels of the methods that keep everything and read a part of it."""
    return labels(frame, frame["selects"])


def budget_sentence(frame: pd.DataFrame) -> str:
    """Return what the budget of some records counts, and what attention reads; "" where only full KV ran."""
    bounded = frame[frame["tokens"] > 0]
    if bounded.empty:
        return ""
    if bounded["selects"].all():
        return (
            "Budget: most slots per KV head and layer that a decoded token reads, prompt included; everything is kept, "
            "and slots read says how many were read."
        )
    budget, choosing = json.loads(bounded["budget"].iloc[0]), selecting(bounded)
    padded = labels(bounded, bounded["slots_read_mean"].notna() & ~bounded["selects"])
    reads = "Slots are what attention reads, everything kept included."
    if choosing or padded:
        reads = f"Slots are kept, and attention reads them all, but for {listed([*choosing, *padded])} (slots read)."
    if choosing:
        keep = f"{listed(choosing)} keep{'s' * (len(choosing) == 1)}"
        reads += f" {keep} everything: the budget is the most a decoded token reads, prompt included."
    if padded:
        reads += f" {listed(padded)} hold{'s' * (len(padded) == 1)} padding, which nothing attends to."
    if "retention" in budget:
        return (
            f"Budget: slots that stay of every window of {budget['size']} decoded tokens, which are cut once; the "
            f"{budget['buffer']} newest and the prompt stay besides. {reads}"
        )
    layers = "layer (a mean: layers have shares)" if budget.get("layer_shares") else "layer"
    rule = "every" if budget["trigger"] == "occupancy" else "on the grid of"
    protected = (Budget.from_dict(json.loads(one)).protected() for one in bounded["budget"].unique())
    sinks, recent = (span(f"{min(own)}", f"{max(own)}") for own in zip(*protected, strict=True))
    return (
        f"Budget: slots per KV head and {layers} that stay after a compaction ({rule} {budget['interval']} tokens), "
        f"{sinks} sinks and the {recent} newest among them; {PROMPT_WORDS[budget['prompt']]}. {reads}"
    )


def seeds_sentence(frame: pd.DataFrame) -> str:
    """Return which seeds there were."""
    seeds = sorted(frame["seed"].unique())
    return f"Seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}."


def size_words(budget: Mapping[str, Any]) -> str:
    """Return what stays: `128 slots`, or `19 slots of every 64` of a window."""
    return f"{budget['tokens']:,} slots" + (f" of every {budget['size']:,}" if "size" in budget else "")


def rule_words(rules: Sequence[str]) -> dict[str, str]:
    """Return what tells budget rules apart, by rule; "" where there is one."""
    parsed = {rule: json.loads(rule) for rule in dict.fromkeys(rules)}
    names = sorted({name for one in parsed.values() for name in one})
    varying = [name for name in names if len({json.dumps(one.get(name)) for one in parsed.values()}) > 1]
    return {rule: ", ".join(_field_words(name, one.get(name)) for name in varying) for rule, one in parsed.items()}


def _field_words(name: str, value: Any) -> str:
    if name == "layer_shares":  # one number a layer
        return "with layer_shares" if value else "all layers alike"
    return f"{name}={value}"


def byte_unit(value: float) -> tuple[int, str]:
    """Return the largest binary unit that is at most a number of bytes, and its name."""
    place = min(3, max(0, int(math.log2(max(value, 1)) // 10)))
    return 1024**place, ("B", "KiB", "MiB", "GiB")[place]


def amount(value: float, axis: str) -> str:
    """Return a place on an axis as text: whole slots, or bytes with a binary unit."""
    if axis != "bytes_held":
        return f"{value:,.0f}"
    unit, name = byte_unit(value)
    return f"{value / unit:,.{2 if unit > 1024 else 0}f} {name}"
