"""Results as one pandas table: a row per record, and means with standard errors and paired differences over its cells.

Examples are the unit: standard errors are clustered by example, differences paired by it, resampling draws it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic_core import from_json

from reasonkv.budget import Budget
from reasonkv.evaluate.manifest import MANIFEST, Manifest, ResultsError
from reasonkv.evaluate.matching import PREFIX_GUARD, regime_of
from reasonkv.evaluate.records import (
    RECORDS,
    AnswerRecord,
    Budgeted,
    Counts,
    Options,
    ReplayRecord,
    read_lines,
    whole_lines,
)
from reasonkv.evaluate.statistics import LEAST, Difference, clustered_mean, paired_difference, wilson
from reasonkv.inputs import parse_json
from reasonkv.methods import method_class

KEPT = "records.parquet"
"""The compressed form of one or more results folders, as committed under docs/results."""
FULL_KV = "full KV"
"""The regime column of full KV's own rows."""
_DERIVED = ("saved_bytes", "slots_read_mean", "bytes_read_mean", "bytes_held", "seconds")
METRICS = {
    "replay": ("top1", "top5", "nll", "kl", "answer_top1", "physical_mean", "physical_peak", *_DERIVED),
    "evaluate": (
        "correct", "truncated", "output_tokens", "repetition", "diverged", "physical_mean", "physical_peak", *_DERIVED
    ),
}  # fmt: skip
DIAGNOSTICS = (
    "lost_attention", "lost_lookups", "lost_mass", "lost_mass_absolute",
    "kappa_dispersion_relative", "rho_core", "rho_rep",
)  # fmt: skip
"""Measures of what was lost (`reasonkv.evaluate.diagnostics`), in the order of tables."""
COMPARED = {"replay": ("top1", "nll", "kl"), "evaluate": ("correct",)}
"""The metrics that are compared with full KV's and random's."""


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a results folder (`Manifest.to_dict`).

    Raises:
        ResultsError: the folder holds no results, or its manifest is damaged.
    """
    if not folder.is_dir():
        raise ResultsError(f"There is no results folder {folder}; make one with `reasonkv replay` or `evaluate`.")
    if not (folder / MANIFEST).is_file():
        raise ResultsError(f"{folder} holds no results: it has no {MANIFEST}.")
    return Manifest.read(folder / MANIFEST).to_dict()


def read_results(folders: Sequence[Path]) -> pd.DataFrame:
    """Read results folders into one table; a folder that is still being written gives what is there.

    Args:
        folders: each holds `records.jsonl` or `records.jsonl.gz` with a manifest, or `records.parquet`.

    Raises:
        ResultsError: a folder holds no results, or its manifest is damaged.
        RecordError: a record is damaged.
    """
    parts = [
        _kept(folder / KEPT) if (folder / KEPT).is_file() else to_frame(read_folder_records(folder), str(folder))
        for folder in map(Path, folders)
    ]
    return parts[0] if len(parts) == 1 else pd.concat(parts, ignore_index=True)


def _kept(path: Path) -> pd.DataFrame:
    """Read a compressed table whose columns have the types of records."""
    try:
        frame = pd.read_parquet(path)
        if frame.empty:
            raise ValueError("it has no rows")
        for name in ("example", "seed", "prompt_tokens", "events", "bytes_held", "bytes_full"):
            if not np.isfinite(frame[name].astype(float)).all():
                raise ValueError(f"{name} is no number")
        for name in {*METRICS["replay"], *METRICS["evaluate"], *DIAGNOSTICS} & {*frame}:
            frame[name] = frame[name].astype(float)
        if not all(isinstance(one, str) for name in ("task", "method", "options", "guards") for one in frame[name]):
            raise ValueError("a text is missing")
        for name, kind in {"options": Options, "guards": Counts, "budget": Budgeted}.items():
            for text in frame[name].dropna().unique():
                parse_json(text, kind)
        return _prepared(frame)
    except (OSError, KeyError, TypeError, ValueError) as error:  # pyarrow's errors are among them
        raise ResultsError(f"{path} cannot be read as records ({' '.join(str(error).split())[:200]}).") from None


def read_folder_records(folder: Path) -> Sequence[ReplayRecord | AnswerRecord]:
    """Return the records of one results folder, from `records.jsonl` or `records.jsonl.gz`; errors as above."""
    manifest, path = read_manifest(folder), folder / RECORDS
    packed = path.with_name(path.name + ".gz")
    kind: type[ReplayRecord | AnswerRecord]
    path = packed if packed.is_file() and not path.is_file() else path
    kind = AnswerRecord if _holds_answers(path, manifest["command"]) else ReplayRecord
    records = read_lines(path, kind)
    if not records:
        raise ResultsError(f"{folder} holds no results yet; run the command that made it again.")
    return records


def _holds_answers(path: Path, command: str) -> bool:
    """What the first line is; where it is damaged, what the command writes, so that the error names the line."""
    try:
        data = from_json(next(iter(whole_lines(path)), b""))
    except ValueError:
        return command == "evaluate"
    return isinstance(data, dict) and "correct" in data and "top1" not in data


def to_frame(records: Sequence[ReplayRecord | AnswerRecord], folder: str = "") -> pd.DataFrame:
    """Return one row per record, its fields as columns, and the columns that are derived from them.

    Options, budget and guards are canonical JSON; every diagnostic is a column of its own. Derived: `kind` ("replay" or
    "evaluate"), `label` (the method with the options that are not its defaults), `tokens` (0 for full KV; a ratio in
    percent), `rule` (the budget without its size), `prompt`, `selects`, `regime`, `saved_bytes`, `diverged`.

    Args:
        records: of one kind.
    """
    rows = []
    for record in records:
        row = dict(vars(record))
        texts = {name: json.dumps(row[name], sort_keys=True) for name in ("options", "budget", "guards")}
        row |= texts if row["budget"] else texts | {"budget": None}
        measured = row.pop("diagnostics", {})
        rows.append(row | {name: measured[name] for name in DIAGNOSTICS if name in measured})
    return _prepared(pd.DataFrame(rows).assign(folder=folder))


def _prepared(frame: pd.DataFrame) -> pd.DataFrame:
    if "score" in frame:  # accuracy is the mean score; older records know right and wrong alone
        frame["correct"] = frame["score"].astype(float).fillna(frame["correct"].astype(float))
    is_answer = frame["correct"].notna() if "correct" in frame else pd.Series(False, frame.index)
    frame = frame.assign(kind=np.where(is_answer, "evaluate", "replay"))
    for name, missing in {"slots_read_mean": math.nan, "bytes_read_mean": math.nan, "sample": 0}.items():
        frame[name] = frame[name].astype(float).fillna(missing) if name in frame else missing
    frame["sample"] = frame["sample"].astype(int)
    if "label" not in frame:
        keys = list(zip(frame["method"], frame["options"], strict=True))
        labels = {key: method_label(key[0], json.loads(key[1])) for key in dict.fromkeys(keys)}
        frame["label"] = [labels[key] for key in keys]
    budgets = {text: json.loads(text) for text in frame["budget"].dropna().unique()}
    sizes = {text: budget["tokens"] or round(100 * budget["keep"]) for text, budget in budgets.items()}
    rules = {text: _rule(budget) for text, budget in budgets.items()}
    frame["tokens"] = frame["budget"].map(sizes).fillna(0).astype(int)
    frame["rule"] = frame["budget"].map(rules).fillna("")
    frame["prompt"] = frame["budget"].map({text: one["prompt"] for text, one in budgets.items()}).fillna("")
    frame["selects"] = frame["slots_read_mean"].notna() & (frame["events"] == 0)
    frame["saved_bytes"] = 1 - frame["bytes_held"] / frame["bytes_full"].where(frame["bytes_full"] > 0)
    if is_answer.any():
        frame["diverged"] = frame["first_divergence"].notna().astype(float).where(is_answer)
    known = {text: Budget.from_dict(budget) for text, budget in budgets.items()}
    columns = (frame[name] for name in ("budget", "prompt_tokens", "events", "guards", "selects"))
    frame["regime"] = [
        FULL_KV if text not in known else regime_of(known[text], prompt, events, PREFIX_GUARD in guards, selects)
        for text, prompt, events, guards, selects in zip(*columns, strict=True)
    ]
    return frame


def _rule(budget: Mapping[str, Any]) -> str:
    fields = {name: one for name, one in budget.items() if name not in ("tokens", "retention", "keep")}
    return json.dumps(fields | ({"unit": "percent"} if budget.get("keep") else {}), sort_keys=True)


def method_label(method: str, options: Mapping[str, Any]) -> str:
    """Return the method's name and the options that are not its defaults, as in `snapkv:window=16`."""
    try:
        return method_class(method)(**options).spec()
    except Exception:  # a method or option that is not installed here, or another package's method that cannot be made
        return method + (":" + ",".join(f"{name}={one}" for name, one in options.items()) if options else "")


def summarize(frame: pd.DataFrame, *, regimes: bool = False) -> pd.DataFrame:
    """Return one row per task, method and budget: n, means, standard errors, and paired differences.

    Columns: `task`, `method` (its label), `rule`, `tokens`, `regime`, `n` (examples), `answers` (records), of every
    metric that the records have its mean under its name and its standard error under `NAME_se` (NaN below `LEAST`
    examples), of `correct` the ends of its Wilson interval under `correct_low` and `correct_high`; of the metrics in
    `COMPARED` the differences to full KV and to random at the same budget under `NAME_vs_full` and `NAME_vs_random`
    (`Difference` or None). Rows stand in the order in which tasks and methods first occur, budgets ascending.

    Args:
        regimes: whether a cell whose records fall into several regimes has a row for each.
    """
    (kind,) = frame["kind"].unique()
    known = [name for name in (*METRICS[kind], *diagnostics(frame)) if name in frame and frame[name].notna().any()]
    keys = ["task", "label", "rule", "tokens", *(["regime"] if regimes else [])]
    cells = {key: part for key, part in frame.groupby(keys, sort=False)}
    full = {part["task"].iloc[0]: part for part in cells.values() if part["method"].iloc[0] == "full"}
    random = {(key[0], *key[2:]): part for key, part in cells.items() if part["method"].iloc[0] == "random"}
    places = [{one: at for at, one in enumerate(frame[name].unique())} for name in ("task", "label")]
    rows = []
    for key in sorted(cells, key=lambda key: (places[0][key[0]], places[1][key[1]], key[3], key[2])):
        part, name = cells[key], cells[key]["method"].iloc[0]
        row: dict[str, Any] = dict(zip(("task", "method", "rule", "tokens"), key, strict=False))
        found = part["regime"].unique()
        row |= {"regime": found[0] if len(found) == 1 else "mixed"}
        n = part["example"].nunique()
        row |= {"n": n, "answers": len(part)}
        for metric in known:
            row[metric], se = clustered_mean(part[metric].to_numpy(float), part["example"])
            row[f"{metric}_se"] = se if n >= LEAST else math.nan
        if kind == "evaluate":
            row["correct_low"], row["correct_high"] = wilson(row["correct"], n)
            row["median_divergence"] = part["first_divergence"].median()
        for metric in COMPARED[kind]:
            for other, theirs in (("full", full.get(key[0])), ("random", random.get((key[0], *key[2:])))):
                skip = theirs is None or name in {"full", other}
                values = None if skip else paired_difference(by_key(part, metric), by_key(theirs, metric))
                row[f"{metric}_vs_{other}"] = values
        rows.append(row)
    return pd.DataFrame(rows)


def diagnostics(frame: pd.DataFrame) -> Iterator[str]:
    """Yield the names of the diagnostics a table holds (`reasonkv.evaluate.diagnostics`)."""
    return (name for name in DIAGNOSTICS if name in frame)


def by_key(part: pd.DataFrame, metric: str, unit: str = "example") -> dict[Any, float]:
    """Return a metric of one cell by (example, sample), where it exists; examples are told apart by a column."""
    columns = (part[unit], part["sample"], part[metric].astype(float))
    return {(example, sample): value for example, sample, value in zip(*columns, strict=True) if not math.isnan(value)}


def summary_dicts(summary: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rows of `summarize` nested: means as {mean, se}, differences by metric."""
    found = []
    for row in summary.to_dict("records"):
        data: dict[str, Any] = {name: row[name] for name in ("task", "method", "regime", "n", "answers")}
        data |= {"tokens": row["tokens"] or None, "rule": json.loads(row["rule"] or "null")}
        data |= {"versus_full": {}, "versus_random": {}}
        for name, value in row.items():
            metric, _, other = name.rpartition("_vs_")
            if f"{name}_se" in row and not math.isnan(value):
                ends = {end: row[f"{name}_{end}"] for end in ("se", "low", "high") if f"{name}_{end}" in row}
                data[name] = {"mean": value} | ends
            elif metric and isinstance(value, Difference):
                data[f"versus_{other}"][metric] = value
            elif name == "median_divergence":
                data[name] = value
        found.append(data)
    return found
