"""The page's tables as columns of text: a summary's cells, and every record of a folder."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

import pandas as pd

from reasonkv.evaluate.table import COMPARED
from reasonkv.report.cohorts import Cohort
from reasonkv.report.metrics import RECORD_METRICS, shown_metrics
from reasonkv.report.wording import number

TAIL = 120
"""Characters of an output's end that the record table shows."""
_TASK = ("task", "task", "task, with the dials that were given")
_METHOD = ("method", "method", "method, with the options that are not its defaults")
_BUDGET = ("tokens", "budget", "slots per KV head and layer that stay after a compaction")
Column = dict[str, Any]


def column(key: str, label: str, meaning: str, texts: Iterable[str], *, words: bool = False) -> Column:
    """Return a column for the page's script: its different texts, and which of them every row has.

    Args:
        texts: the cells; "-" where there is nothing.
        words: the column is no number, so it is sorted and aligned as text.
    """
    at, different = pd.factorize(pd.Series(list(texts), dtype=object))
    return {"key": key, "label": label, "meaning": meaning, "words": words, "texts": list(different), "at": at.tolist()}


def summary_columns(cohort: Cohort) -> list[Column]:
    """Return the columns of a cohort's summary: estimates, and paired differences to full KV and to random."""
    frame, kind = cohort.summary, cohort.kind
    rows = frame.to_dict("records")
    columns = [
        column(*_TASK, frame["task"], words=True),
        column(*_METHOD, frame["method"], words=True),
        column("regime", "regime", "how the budget met the trace; means never cross regimes", frame["regime"],
               words=True),
        column(*_BUDGET, _numbers(frame["tokens"].replace(0, math.nan))),
        column("n", "n", f"{'problems' if kind == 'evaluate' else 'traces'} in the mean", _numbers(frame["n"])),
    ]  # fmt: skip
    for metric in shown_metrics(kind, frame):
        columns.append(column(metric.key, metric.label, metric.meaning, map(metric.text, rows)))
        others = {"full": "full KV", "random": "random"} if metric.key in COMPARED[kind] and metric.key != "nll" else {}
        for other, name in others.items():
            columns.append(column(
                f"{metric.key}_versus_{other}", f"\u0394 {metric.label} to {name}",
                f"{metric.label}, paired difference to {name} on the same problems, with a 95 % bootstrap interval",
                (metric.difference(row, other) for row in rows),
            ))  # fmt: skip
    return columns


def record_columns(frame: pd.DataFrame) -> list[Column]:
    """Return the columns of every record of one folder."""
    answers = "correct" in frame
    columns = [
        column(*_TASK, frame["task"], words=True),
        column(*_METHOD, frame["label"], words=True),
        column("prompt", "prompt", "what the budget counts of the prompt", frame["prompt"].replace("", "-"),
               words=True),
        column(*_BUDGET, _numbers(frame["tokens"].replace(0, math.nan))),
        column("regime", "regime", "how the budget met the trace", frame["regime"], words=True),
    ]  # fmt: skip
    if answers:
        verdicts = frame["truncated"].map({True: "truncated", False: "wrong"}).mask(frame["correct"] == 1, "right")
        columns.append(column("answer", "answer", "what the grader says of the whole answer", verdicts, words=True))
    for one in RECORD_METRICS:
        if one.key in frame and frame[one.key].notna().any() and (answers or one.key != "sample"):
            cells = _numbers(frame[one.key], one.digits, one.scale)
            columns.append(column(one.key, one.label, one.meaning, cells))
    if (frame["guards"] != "{}").any():
        texts = [", ".join(f"{name} {n}" for name, n in json.loads(one).items()) or "-" for one in frame["guards"]]
        columns.append(column("fallbacks", "fallbacks", "how often a method used a fallback rule, by name", texts,
                              words=True))  # fmt: skip
    if answers:
        meaning = f"its last {TAIL} characters"
        columns.append(column("output", "end of the output", meaning, frame["output"].str[-TAIL:], words=True))
    return columns


def _numbers(values: pd.Series, digits: int = 0, scale: float = 1.0) -> list[str]:
    return ["-" if not math.isfinite(one) else number(one * scale, digits) for one in values.astype(float)]
