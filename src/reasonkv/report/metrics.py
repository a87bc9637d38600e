"""The numbers that tables and figures show: headings, meanings, and how they are written. `metrics.csv` is the list."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from reasonkv.report.wording import difference_text, estimate_text


class Metric(NamedTuple):
    """A number of a cell."""

    key: str  # its column in a summary
    label: str  # the column's heading
    scale: float  # what the number is multiplied by for people
    digits: int  # digits after the point
    title: str  # what a figure's axis says; "" where figures do not offer it
    meaning: str  # one sentence

    def text(self, row: Mapping[str, Any]) -> str:
        """Return the mean of a summary's row with its error or interval."""
        return estimate_text(row, self.key, self.digits, self.scale)

    def difference(self, row: Mapping[str, Any], other: str) -> str:
        """Return the paired difference of a summary's row to `full` or `random`."""
        return difference_text(row.get(f"{self.key}_vs_{other}"), self.digits, self.scale)


def _read(*groups: str) -> tuple[Metric, ...]:
    """Return the metrics of some groups, in the order of the list."""
    lines = Path(__file__).with_name("metrics.csv").read_text(encoding="utf-8").splitlines()
    rows: list[dict[str, Any]] = [row for row in csv.DictReader(lines) if row.pop("of") in groups]
    return tuple(Metric(**row | {"scale": float(Fraction(row["scale"])), "digits": int(row["digits"])}) for row in rows)


METRICS = {"replay": _read("replay", "both", "lost"), "evaluate": _read("evaluate", "both")}
DIAGNOSTICS = _read("lost")
"""Of replays with diagnostics; the last five are CASK's own, means over its compactions."""
MAIN = {kind: metrics[0] for kind, metrics in METRICS.items()}
"""By kind: the metric that is looked at first."""
KNOWN = {one.key: one for one in _read("replay", "evaluate", "both", "lost", "record")}
RECORD_METRICS = tuple(KNOWN[key] for key in (
    "example", "sample", "prompt_tokens", "output_tokens", "repetition", "first_divergence", "top1", "answer_top1",
    "kl", "nll", "first_mismatch", "physical_mean", "physical_peak", "bytes_held", "bytes_full", "events",
    "tokens_dropped", "seed",
))  # fmt: skip
"""The numbers of one record, in the order of the record table."""
UNITS = {
    "tokens": "budget, slots per KV head after a compaction",
    "physical_mean": "mean slots per output token",
    "bytes_held": "bytes in use at the end",
}
REGIMES = {
    "compressed": "decoding went on compressing, with tokens of its own to choose from: what comparisons rest on",
    "prompt_fills_budget": "compactions ran, but the prompt and the protected slots left no decode token to choose",
    "uncompressed": "no compaction ran and nothing was evicted: full KV under another name",
    "selecting": "everything was kept, and every decoded token read a part of it: the budget is what it may read, so "
                 "its place is beside methods with as many mean slots and not beside those of equal budget",
}  # fmt: skip


def shown_metrics(kind: str, summary: pd.DataFrame) -> list[Metric]:
    """Return the metrics that a summary has, in their order."""
    return [metric for metric in METRICS[kind] if metric.key in summary]
