"""Columns of the report's tables: what each means, and rows turned into compact columns for the page's script."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from reasonkv.evaluate.answers import AnswerRecord
from reasonkv.evaluate.frontier import regime
from reasonkv.evaluate.records import Record
from reasonkv.evaluate.statistics import Difference, Estimate
from reasonkv.report.cohorts import SummaryRow, labels_of
from reasonkv.report.measures import DIAGNOSTICS, EVALUATE, REPLAY, Metric

TAIL = 120
"""Characters of an output's end that the record table shows."""


_MISSING = Estimate(math.nan, None)
METRICS = {"replay": (*REPLAY, *DIAGNOSTICS), "evaluate": EVALUATE}
COMPARED = {"replay": ("top1", "kl"), "evaluate": ("correct",)}


def summary_table(rows: Sequence[SummaryRow], kind: str) -> dict[str, Any]:
    """Columns and data of the summary of one cohort, for the page's script.

    Args:
        rows: the cohort's.
        kind: `replay` or `evaluate`.
    """
    unit = "problems" if kind == "evaluate" else "traces"
    columns = [
        _words("task", "task", "task family, with the dials that were given", [row.task for row in rows]),
        _words("method", "method", "method, with the options that are not its defaults", [row.method for row in rows]),
        _words(
            "regime", "regime", "how the budget met the trace; means never cross regimes", [row.regime for row in rows]
        ),
        _numbers(
            "tokens", "budget", "slots per KV head and layer that stay after a compaction", [row.tokens for row in rows]
        ),
        _numbers("n", "n", f"{unit} in the mean", [row.n for row in rows]),
    ]
    for metric in METRICS[kind]:
        if not any(metric.key in row.estimates for row in rows):
            continue
        columns.append(_estimates(metric, [row.estimates.get(metric.key, _MISSING) for row in rows]))
        if metric.key in COMPARED[kind]:
            columns.append(_differences(metric, "full KV", "full", [row.versus_full.get(metric.key) for row in rows]))
            columns.append(
                _differences(metric, "random", "random", [row.versus_random.get(metric.key) for row in rows])
            )
    return {"rows": len(rows), "columns": columns}


def record_table(records: Sequence[Record] | Sequence[AnswerRecord]) -> dict[str, Any]:
    """Columns and data of every record of one folder, for the page's script."""
    columns = [
        _words("task", "task", "task family, with the dials that were given", [one.task for one in records]),
        _words("method", "method", "method, with the options that are not its defaults", labels_of(records)),
        _words(
            "prompt",
            "prompt",
            "what the budget counts of the prompt",
            [(one.budget or {}).get("prompt", "-") for one in records],
        ),
        _numbers(
            "tokens",
            "budget",
            "slots per KV head and layer that stay after a compaction",
            [(one.budget or {}).get("tokens") for one in records],
        ),
        _words(
            "regime",
            "regime",
            "how the budget met the trace",
            ["full KV" if one.budget is None else regime(one) for one in records],
        ),
    ]
    simple: list[tuple[str, str, str, Callable[[Any], Any], int, float]] = [
        ("example", "example", "number of the problem; also the row seed of random methods", lambda r: r.example, 0, 1),
        ("prompt_tokens", "prompt tokens", "tokens of the prompt", lambda r: r.prompt_tokens, 0, 1),
        ("output_tokens", "output tokens", "tokens of the output", lambda r: r.output_tokens, 0, 1),
    ]
    if any(isinstance(one, AnswerRecord) for one in records):
        simple.insert(1, ("sample", "sample", "number of the sample of that problem", lambda r: r.sample, 0, 1))
        columns.append(
            _words(
                "answer",
                "answer",
                "what the task's checker says of the whole answer",
                [_verdict(one) for one in records],
            )
        )
        simple += [
            ("repetition", "in loops %", "share of output tokens in a loop", lambda r: r.repetition, 1, 100),
            (
                "first_divergence",
                "first divergence",
                "first output token that differs from full KV's",
                lambda r: r.first_divergence,
                0,
                1,
            ),
        ]
    else:
        simple += [
            (
                "top1",
                "top-1 %",
                "share of output tokens where the most likely token is full KV's",
                lambda r: r.top1,
                1,
                100,
            ),
            ("answer_top1", "answer top-1 %", "top-1 on the answer's tokens alone", lambda r: r.answer_top1, 1, 100),
            ("kl", "KL", "mean divergence from full KV, nats", lambda r: r.kl, 3, 1),
            ("nll", "NLL", "mean negative log-likelihood of the trace's tokens, nats", lambda r: r.nll, 3, 1),
            (
                "first_mismatch",
                "first mismatch",
                "first output token that counts against top-1",
                lambda r: r.first_mismatch,
                0,
                1,
            ),
        ]
    simple += [
        ("physical_mean", "mean slots", "slots held per output token", lambda r: r.physical_mean, 0, 1),
        ("physical_peak", "peak slots", "most slots held at once", lambda r: r.physical_peak, 0, 1),
        ("bytes_held", "KiB held", "held at the end, method state included", lambda r: r.bytes_held, 0, 1 / 1024),
        ("bytes_full", "KiB full KV", "what full KV would hold at the end", lambda r: r.bytes_full, 0, 1 / 1024),
        ("events", "events", "compactions", lambda r: r.events, 0, 1),
        ("tokens_dropped", "dropped", "tokens whose slots were given up", lambda r: r.tokens_dropped, 0, 1),
        ("seed", "seed", "the run's seed", lambda r: r.seed, 0, 1),
    ]
    for key, label, meaning, read, digits, scale in simple:
        values = [read(one) for one in records]
        if key != "answer_top1" or any(value is not None for value in values):  # records of old runs lack it
            columns.append(_numbers(key, label, meaning, values, digits, scale))
    if any(one.guards for one in records):
        meaning = "how often a method fell back on a rule of its own, by name"
        words = [", ".join(f"{name} {count}" for name, count in one.guards.items()) or "-" for one in records]
        columns.append(_words("guards", "guards", meaning, words))
    if any(isinstance(one, AnswerRecord) for one in records):
        tails = [one.output[-TAIL:] if isinstance(one, AnswerRecord) else "" for one in records]
        columns.append(_words("output", "end of the output", f"its last {TAIL} characters", tails))
    return {"rows": len(records), "columns": columns}


def definitions(tables: Iterable[dict[str, Any]]) -> list[tuple[str, str]]:
    """(heading, meaning) of every column of some tables, each once."""
    found: dict[str, str] = {}
    for table in tables:
        for column in table["columns"]:
            found.setdefault(column["label"], column["meaning"])
    return list(found.items())


def _verdict(one: Record | AnswerRecord) -> str:
    if isinstance(one, AnswerRecord):
        return "right" if one.correct else "truncated" if one.truncated else "wrong"
    return "-"


def _words(key: str, label: str, meaning: str, values: Sequence[str]) -> dict[str, Any]:
    known = {word: index for index, word in enumerate(dict.fromkeys(values))}
    return {
        "key": key,
        "label": label,
        "meaning": meaning,
        "kind": "words",
        "words": list(known),
        "at": [known[word] for word in values],
    }


def _numbers(
    key: str, label: str, meaning: str, values: Sequence[float | None], digits: int = 0, scale: float = 1.0
) -> dict[str, Any]:
    return {
        "key": key,
        "label": label,
        "meaning": meaning,
        "kind": "number",
        "digits": digits,
        "scale": scale,
        "values": [_short(value) for value in values],
    }


def _estimates(metric: Metric, values: Sequence[Estimate]) -> dict[str, Any]:
    return {
        "key": metric.key,
        "label": metric.label,
        "meaning": metric.meaning,
        "kind": "estimate",
        "title": metric.title,
        "digits": metric.digits,
        "scale": metric.scale,
        "plotted": metric.plotted,
        "values": [_short(one.mean) for one in values],
        "se": [_short(one.se) for one in values],
    }


def _differences(metric: Metric, other: str, short: str, values: Sequence[Difference | None]) -> dict[str, Any]:
    meaning = f"{metric.label}, paired difference to {other} on the same problems, with a 95 % bootstrap interval"
    return {
        "key": f"{metric.key}_versus_{short}",
        "label": f"Δ {metric.label} to {other}",
        "meaning": meaning,
        "kind": "difference",
        "digits": metric.digits,
        "scale": metric.scale,
        "values": [one and _short(one.mean) for one in values],
        "low": [one and _short(one.low) for one in values],
        "high": [one and _short(one.high) for one in values],
    }


def _short(value: float | None) -> float | None:
    """Seven significant digits; JSON has no number that is not finite, so those become null."""
    if value is None or not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.7g}")
