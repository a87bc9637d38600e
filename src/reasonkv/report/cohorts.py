"""What may be compared: the records of one folder and one budget rule, and their tables for the page's script."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from reasonkv.evaluate.manifest import ResultsError
from reasonkv.evaluate.table import COMPARED, Difference, read_manifest, read_results, summarize
from reasonkv.report.metrics import shown_metrics

TAIL = 120
"""Characters of an output's end that the record table shows."""
_POLICIES = {"count": ", prompt compressible", "keep": ", prompt kept", "on_top": ", prompt kept on top", "": ""}
_TASK = ("task", "task", "task family, with the dials that were given")
_METHOD = ("method", "method", "method, with the options that are not its defaults")
_BUDGET = ("tokens", "budget", "slots per KV head and layer that stay after a compaction")
Column = dict[str, Any]


@dataclass(frozen=True)
class Folder:
    """A results folder: its name on the page, manifest and records."""

    path: Path
    name: str
    manifest: dict[str, Any]
    frame: pd.DataFrame


@dataclass(frozen=True)
class Cohort:
    """Records that may be compared with each other, full KV's among them.

    Args:
        folder: where they come from.
        name: the job and the prompt policy in words.
        frame: records of one budget rule.
        summary: with regimes apart.
    """

    folder: Folder
    name: str
    frame: pd.DataFrame
    summary: pd.DataFrame

    @property
    def kind(self) -> str:
        """`replay` or `evaluate`."""
        return str(self.frame["kind"].iloc[0])

    @property
    def prompt(self) -> str:
        """The budget's prompt policy; "" where only full KV ran."""
        return str(max(self.frame["prompt"]))


def read_folders(folders: Sequence[Path]) -> list[Folder]:
    """Read results folders.

    Raises:
        ResultsError: a folder holds no results, or is named twice.
        RecordError: a record is damaged.
    """
    if len({one.resolve() for one in folders}) < len(folders):
        raise ResultsError("A results folder is named twice; name each once.")
    names = [one.resolve().name for one in folders]
    return [
        Folder(one, name if names.count(name) == 1 else str(one), read_manifest(one), read_results([one]))
        for one, name in zip(folders, names, strict=True)
    ]


def job_words(kind: str, prompt: str) -> str:
    """Return the job and how the prompt is treated, in a few words."""
    return ("Answers" if kind == "evaluate" else "Replay") + _POLICIES[prompt]


def cohorts(folders: Sequence[Folder]) -> list[Cohort]:
    """Return one cohort per folder and budget rule; answers first, for what stands for them comes after."""
    found = []
    for folder in folders:
        frame = folder.frame
        for rule in [one for one in frame["rule"].unique() if one] or [""]:
            # full KV stands in every cohort, so that differences to it pair the very problems of a regime
            own = frame[(frame["rule"] == rule) | (frame["tokens"] == 0)]
            name = job_words(own["kind"].iloc[0], max(own["prompt"]))
            found.append(Cohort(folder, name, own, summarize(own, regimes=True)))
    names = [one.name for one in found]
    named = [
        one if names.count(one.name) == 1 else replace(one, name=f"{one.name} ({one.folder.name})") for one in found
    ]
    return sorted(named, key=lambda one: one.kind != "evaluate")


def same_problems(one: Cohort, other: Cohort) -> bool:
    """Return whether both ran the same kind of job on the same model and problems, so that rows may be shared."""
    mine, theirs = one.folder.manifest, other.folder.manifest
    names = ("seed", "limit", "traces", "samples", "sampling")
    arguments = [[each.get("arguments", {}).get(name) for name in names] for each in (mine, theirs)]
    model = [each.get("model", {}).get("hash") for each in (mine, theirs)]
    return one.kind == other.kind and arguments[0] == arguments[1] and model[0] == model[1]


def summary_columns(cohort: Cohort) -> list[Column]:
    """Return the columns of a cohort's summary, for the page's script."""
    rows, kind = cohort.summary, cohort.kind
    unit = "problems" if kind == "evaluate" else "traces"
    columns = [
        _words(*_TASK, rows["task"]),
        _words(*_METHOD, rows["method"]),
        _words("regime", "regime", "how the budget met the trace; means never cross regimes", rows["regime"]),
        _numbers(*_BUDGET, rows["tokens"].replace(0, math.nan)),
        _numbers("n", "n", f"{unit} in the mean", rows["n"]),
    ]
    for metric in shown_metrics(kind, rows):
        look = {"digits": metric.digits, "scale": metric.scale}
        values = {"values": _short(rows[metric.key]), "se": _short(rows[f"{metric.key}_se"])}
        columns.append(_column(metric.key, metric.label, metric.meaning, "estimate", **look, **values))
        if metric.key in COMPARED[kind] and metric.key != "nll":
            for other, name in (("full", "full KV"), ("random", "random")):
                found = [one if isinstance(one, Difference) else None for one in rows[f"{metric.key}_vs_{other}"]]
                meaning = (
                    f"{metric.label}, paired difference to {name} on the same problems, with a 95 % bootstrap interval"
                )
                ends = {
                    key: _short(pd.Series([math.nan if one is None else getattr(one, part) for one in found]))
                    for key, part in (("values", "mean"), ("low", "low"), ("high", "high"))
                }
                key, label = f"{metric.key}_versus_{other}", f"Δ {metric.label} to {name}"
                columns.append(_column(key, label, meaning, "difference", **look, **ends))
    return columns


def record_columns(frame: pd.DataFrame) -> list[Column]:
    """Return the columns of every record of one folder, for the page's script."""
    answers = "correct" in frame
    columns = [
        _words(*_TASK, frame["task"]),
        _words(*_METHOD, frame["label"]),
        _words("prompt", "prompt", "what the budget counts of the prompt", frame["prompt"].replace("", "-")),
        _numbers(*_BUDGET, frame["tokens"].replace(0, math.nan)),
        _words("regime", "regime", "how the budget met the trace", frame["regime"]),
    ]
    if answers:
        verdicts = ["right" if right else "truncated" if cut else "wrong"
                    for right, cut in zip(frame["correct"], frame["truncated"], strict=True)]  # fmt: skip
        columns.append(_words("answer", "answer", "what the task's checker says of the whole answer", verdicts))
    for key, label, meaning, digits, scale in _RECORD_NUMBERS:
        if key in frame and frame[key].notna().any() and (answers or key != "sample"):
            columns.append(_numbers(key, label, meaning, frame[key], digits, scale))
    if (frame["guards"] != "{}").any():
        texts = [", ".join(f"{name} {n}" for name, n in json.loads(one).items()) or "-" for one in frame["guards"]]
        columns.append(_words("fallbacks", "fallbacks", "how often a method used a fallback rule, by name", texts))
    if answers:
        tails = frame["output"].str[-TAIL:]
        columns.append(_words("output", "end of the output", f"its last {TAIL} characters", tails))
    return columns


# fmt: off
_RECORD_NUMBERS = (
    ("example", "example", "number of the problem; also the row seed of random methods", 0, 1),
    ("sample", "sample", "number of the sample of that problem", 0, 1),
    ("prompt_tokens", "prompt tokens", "tokens of the prompt", 0, 1),
    ("output_tokens", "output tokens", "tokens of the output", 0, 1),
    ("repetition", "in loops %", "share of output tokens in a loop", 1, 100),
    ("first_divergence", "first divergence", "first output token that differs from full KV's", 0, 1),
    ("top1", "top-1 %", "share of output tokens where the most likely token is full KV's", 1, 100),
    ("answer_top1", "answer top-1 %", "top-1 on the answer's tokens alone", 1, 100),
    ("kl", "KL", "mean divergence from full KV, nats", 3, 1),
    ("nll", "NLL", "mean negative log-likelihood of the trace's tokens, nats", 3, 1),
    ("first_mismatch", "first mismatch", "first output token that counts against top-1", 0, 1),
    ("physical_mean", "mean slots", "slots kept per output token", 0, 1),
    ("physical_peak", "peak slots", "most slots kept at once", 0, 1),
    ("bytes_held", "KiB kept", "in use at the end, method state included", 0, 1 / 1024),
    ("bytes_full", "KiB full KV", "what full KV would use at the end", 0, 1 / 1024),
    ("events", "compactions", "how often the method ran", 0, 1),
    ("tokens_dropped", "evicted", "tokens whose slots were given up", 0, 1),
    ("seed", "seed", "the run's seed", 0, 1),
)
# fmt: on


def _column(key: str, label: str, meaning: str, kind: str, **rest: Any) -> Column:
    return {"key": key, "label": label, "meaning": meaning, "kind": kind, **rest}


def _words(key: str, label: str, meaning: str, values: Sequence[str] | pd.Series) -> Column:
    at, words = pd.factorize(pd.Series(values, dtype=object))
    return _column(key, label, meaning, "words", words=list(words), at=at.tolist())


def _numbers(key: str, label: str, meaning: str, values: pd.Series, digits: int = 0, scale: float = 1.0) -> Column:
    return _column(key, label, meaning, "number", digits=digits, scale=scale, values=_short(values))


def _short(values: pd.Series) -> list[float | None]:
    """Seven significant digits; JSON has no number that is not finite, so those become null."""
    return [
        None if not math.isfinite(one) else int(one) if one.is_integer() else float(f"{one:.7g}")
        for one in values.astype(float)
    ]
