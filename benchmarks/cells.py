"""Committed records as cells that may be compared: by family and prompt policy, then by method and budget."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from reasonkv.evaluate.manifest import MANIFEST
from reasonkv.evaluate.table import (
    KEPT,
    Difference,
    Estimate,
    clustered_mean,
    paired_difference,
    read_manifest,
    read_results,
)

RESULTS = Path(__file__).parent.parent / "docs" / "results"
POLICIES = {"count": "prompt compressible", "on_top": "prompt kept"}
METRICS = {
    "kl": ("KL, nats", -1.0),
    "top1": ("top-1, points", 100.0),
    "answer_top1": ("answer tokens right, points", 100.0),
}
"""Words for a metric, and the factor that makes more of it better."""
_MANIFESTS = b"reasonkv.manifests"
_LEFT_OUT = (
    "run", "output", "saved_ratio_terminal",  # texts, and what follows from the rest
    "rule", "tokens", "prompt", "selects", "saved_bytes", "diverged", "regime",  # derived again when read
)  # fmt: skip
_PRECISE = ("top1", "answer_top1")  # shares whose differences may be exactly 0


@dataclass(frozen=True)
class Group:
    """What may be compared with one another: a family under a prompt policy."""

    task: str
    policy: str

    def __str__(self) -> str:
        return f"{self.task}, {POLICIES[self.policy]}"


Cell = pd.DataFrame
"""Records of one method at one budget, one an example, indexed by it."""
Cells = dict[Group, dict[tuple[str, str], Cell]]
"""By group, then by (method, budget's label). Full KV's budget is ""."""


@dataclass(frozen=True)
class Found:
    """Everything of some experiments, by kind: replays, generated answers, and replays with diagnostics."""

    replays: Cells
    answers: Cells
    diagnosed: Cells


def manifests(folder: Path) -> dict[str, Any]:
    """Return the manifests that are kept in a folder's table, by results folder."""
    return dict(json.loads(pq.read_schema(folder / KEPT).metadata[_MANIFESTS]))


def keep(roots: Iterable[Path], folder: Path) -> Path:
    """Write the records of results folders into one compressed table beside their manifests; return its path.

    Texts are left out; numbers are single precision (top-1 is exact), NLL has three digits after the point.

    Args:
        roots: each holds results folders, as `run.py` leaves them; they are named ROOT/NAME.
        folder: a folder under docs/results. What it keeps already stays, except for folders of the same name.
    """
    paths = [path for root in roots for path in sorted(root.iterdir()) if (path / MANIFEST).exists()]
    if not paths:
        raise SystemExit(f"{', '.join(map(str, roots))}: no results folders there.")
    named = {f"{path.parent.name}/{path.name}": path for path in paths}
    about = {name: read_manifest(path) for name, path in named.items()}
    frames = [read_results([path]).assign(folder=name) for name, path in named.items()]
    if (folder / KEPT).exists():
        old = pd.read_parquet(folder / KEPT)
        about = {name: one for name, one in manifests(folder).items() if name not in about} | about
        frames.insert(0, old[~old["folder"].isin(list(named))])
    frame = pd.concat(frames, ignore_index=True)
    frame = frame.drop(columns=[name for name in _LEFT_OUT if name in frame])
    frame["nll"] = frame["nll"].round(3) if "nll" in frame else math.nan
    for name in frame:
        if frame[name].dtype.kind in "if" and name not in _PRECISE:
            frame[name] = frame[name].astype("float32" if frame[name].dtype.kind == "f" else "int32")
    table = pa.Table.from_pandas(frame, preserve_index=False)
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), _MANIFESTS: json.dumps(about).encode()})
    folder.mkdir(parents=True, exist_ok=True)
    split = {name: "BYTE_STREAM_SPLIT" for name in ("kl",) if name in frame}
    pq.write_table(
        table, folder / KEPT, compression="zstd", compression_level=22, column_encoding=split,
        use_dictionary=[name for name in frame if name not in split],
    )  # fmt: skip
    return folder / KEPT


def load_cells(*folders: Path) -> Found:
    """Read what is kept in some folders.

    Of a cell that several results folders hold, the last counts, whole, because a cell of two would be the mean of two
    versions of a method. Rows of tables come in the order in which cells first came.

    Raises:
        SystemExit: one results folder holds a method, budget and example twice.
    """
    found = Found({}, {}, {})
    for folder in folders:
        frame = read_results([folder])
        frame["size"] = [_size(text) for text in frame["budget"]]
        for (name, task, method, size), part in frame.groupby(["folder", "task", "label", "size"], sort=False):
            place = str(name).rpartition("/")[2]
            kind = "answers" if part["kind"].iloc[0] == "evaluate" else "replays"
            kind = "diagnosed" if place.startswith("lost") else kind
            cells = getattr(found, kind).setdefault(Group(task, place.rpartition("-")[2]), {})
            cell = part.set_index("example")
            if cell.index.has_duplicates:
                raise SystemExit(f"{name} holds {method} at {size} slots a second time.")
            there = cells.get((method, size))
            # full KV runs in several experiments, and is the same in all
            if there is not None and (not size or not there.index.intersection(cell.index).size):
                cell = pd.concat([cell, there[~there.index.isin(cell.index)]])
            cells[method, size] = cell
    return found


def _size(budget: Any) -> str:
    """The budget's slots, or what a window keeps of its tokens."""
    if not isinstance(budget, str):
        return ""
    fields = json.loads(budget)
    return f"{fields['tokens']} of every {fields['size']}" if fields.get("size") else str(fields["tokens"])


def budgets(cells: Mapping[tuple[str, str], object]) -> list[str]:
    """Return the labels of the budgets, smallest first."""
    return sorted({label for _, label in cells if label}, key=lambda label: int(label.split()[0]))


def methods(cells: Mapping[tuple[str, str], object]) -> list[str]:
    """Return the methods with a budget, in the order they ran."""
    return list(dict.fromkeys(method for method, label in cells if label))


def by_example(cell: Cell | None, metric: str) -> dict[int, float]:
    """Return a metric by example, where it exists."""
    if cell is None or metric not in cell:
        return {}
    return {int(key): value for key, value in cell[metric].astype(float).items() if not math.isnan(value)}  # type: ignore[call-overload]


def mean(cell: Cell | None, metric: str) -> Estimate:
    """Return a metric's mean over examples; the standard error of a single one is 0."""
    values = by_example(cell, metric)
    found = clustered_mean(list(values.values()), list(values))
    return found if not math.isnan(found.se) else Estimate(found.mean, 0.0)


def gain(ours: Cell | None, theirs: Cell | None, metric: str, scale: float) -> Difference | None:
    """Return the paired difference, positive where ours is better by the sign of `scale`."""
    left, right = ({key: scale * one for key, one in by_example(cell, metric).items()} for cell in (ours, theirs))
    return paired_difference(left, right)


def verdict(found: Difference | None) -> str:
    """Return better, worse, or undecided where the interval holds 0."""
    if found is None:
        return "-"
    return "better" if found.low > 0 else "worse" if found.high < 0 else "undecided"


def words(found: Difference | None, digits: int = 3) -> str:
    """Return a difference with its interval."""
    return "-" if found is None else f"{found.mean:+.{digits}f} [{found.low:+.{digits}f}, {found.high:+.{digits}f}]"


def count_verdicts(found: Iterable[Difference | None]) -> str:
    """Return how often better / undecided / worse."""
    counts = Counter(verdict(one) for one in found)
    return " / ".join(str(counts[name]) for name in ("better", "undecided", "worse")) if counts else "-"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """Return the lines of a markdown table; a heading with a | in it stands for several columns."""
    line = "| " + " | ".join(head) + " |"
    return [line, "|---" * (line.count("|") - 1) + "|", *("| " + " | ".join(row) + " |" for row in rows)]


def by_budget(
    cells: Mapping[tuple[str, str], Cell],
    text: Callable[[str, str], str],
    heads: Iterable[str] = (),
    name: Callable[[str], str] = str,
) -> list[str]:
    """Return a table with a row a method and a column a budget, and an empty line.

    Args:
        cells: of one group.
        text: a cell's text by method and budget; one that did not run is "-".
        heads: of the columns; the budgets in slots unless given.
        name: a method's word.
    """
    sizes = budgets(cells)
    rows = (
        [name(method), *(text(method, one) if (method, one) in cells else "-" for one in sizes)]
        for method in methods(cells)
    )
    return [*table(["method", *(heads or (f"{one} slots" for one in sizes))], rows), ""]
