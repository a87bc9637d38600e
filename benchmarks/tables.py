"""Committed records as pandas tables: keep and load them, average cells, compare methods, and write Markdown.

A cell is one method at one budget (`size`) in one group, a task under a prompt policy. Rows stand in the order in which
cells first ran. The size of full KV is "".
"""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from reasonkv.evaluate.manifest import MANIFEST
from reasonkv.evaluate.statistics import Difference, paired_difference
from reasonkv.evaluate.table import KEPT, read_manifest, read_results

RESULTS = Path(__file__).parent.parent / "docs" / "results"
EXPERIMENTS = Path(__file__).parent / "experiments"
POLICIES = {"count": "prompt compressible", "on_top": "prompt kept"}
METRICS = {
    "kl": (-1.0, 3, "KL, nats"),
    "top1": (100.0, 1, "top-1, points"),
    "answer_top1": (100.0, 0, "answer tokens right, points"),
    "correct": (100.0, 0, "right, points"),
    "repetition": (-100.0, 0, "in loops, points"),
}
"""The factor that makes more of a metric better, digits after the point, and words."""
SHARES = " + shares"
"""Behind the name of a method whose layers have shares."""
CELL = ["group", "method", "size"]
_MANIFESTS = b"reasonkv.manifests"
_LEFT_OUT = (
    "run", "output", "saved_ratio_terminal",  # texts, and what follows from the rest
    "rule", "tokens", "prompt", "selects", "saved_bytes", "diverged", "regime",  # derived again when read
)  # fmt: skip
_PRECISE = ("top1", "answer_top1")  # shares whose differences may be exactly 0


def manifests(folder: Path) -> dict[str, Any]:
    """Return the manifests that are kept in a folder's table, by results folder."""
    packed = pq.read_schema(folder / KEPT).metadata[_MANIFESTS]
    return dict(json.loads(zlib.decompress(base64.b85decode(packed))))


def keep(roots: Iterable[Path], folder: Path) -> Path:
    """Write the records of results folders into one compressed table beside their manifests; return its path.

    Texts are left out; numbers are single precision (top-1 is exact), NLL has three digits after the point.

    Args:
        roots: each holds results folders, as `run.py` leaves them; they are named ROOT/NAME.
        folder: a folder under docs/results. What it keeps already stays, except for folders of the same name.
    """
    roots = list(roots)
    paths = [path for root in roots for path in sorted(root.iterdir()) if (path / MANIFEST).exists()]
    if not paths:
        raise SystemExit(f"{', '.join(map(str, roots))}: no results folders there.")
    named = {f"{path.parent.name}/{path.name}": path for path in paths}
    about = {name: read_manifest(path) for name, path in named.items()}
    frames = [read_results([path]).assign(folder=name) for name, path in named.items()]
    if (folder / KEPT).exists():
        old = pd.read_parquet(folder / KEPT)
        about = manifests(folder) | about
        frames.insert(0, old[~old["folder"].isin(list(named))])
    frame = pd.concat(frames, ignore_index=True).drop(columns=list(_LEFT_OUT), errors="ignore")
    frame["nll"] = frame["nll"].round(3) if "nll" in frame else math.nan
    for name in frame:
        if frame[name].dtype.kind in "if" and name not in _PRECISE:
            frame[name] = frame[name].astype("float32" if frame[name].dtype.kind == "f" else "int32")
    folder.mkdir(parents=True, exist_ok=True)
    return write(pa.Table.from_pandas(frame, preserve_index=False), about, folder / KEPT)


def write(table: pa.Table, about: Mapping[str, Any], path: Path) -> Path:
    """Write records as small as they get, with the manifests of their runs; return the path."""
    split = {name: "BYTE_STREAM_SPLIT" for name in ("kl",) if name in table.column_names}
    # without what pandas and Arrow say about the columns, which is half of a small file
    table = table.replace_schema_metadata(None)
    with pq.ParquetWriter(
        path, table.schema, compression="brotli", compression_level=11, column_encoding=split, write_statistics=False,
        use_dictionary=[name for name in table.column_names if name not in split], store_schema=False,
    ) as writer:  # fmt: skip
        writer.write_table(table)
        writer.add_key_value_metadata({_MANIFESTS: base64.b85encode(zlib.compress(json.dumps(about).encode(), 9))})
    return path


def load(*folders: Path) -> dict[str, pd.DataFrame]:
    """Return what some folders keep, by kind: `replay`, `answers`, and `lost`, replays with diagnostics.

    Columns beside those of `read_results`: `group`, `policy`, `method` (with its options, and whether its layers have
    shares) and `size`. Of a cell that
    several results folders hold, the last one counts, whole: a cell of two would average two versions of a method.

    Raises:
        SystemExit: one results folder holds a method, budget and example twice.
    """
    frames = [read_results([path]).assign(root=path.name) for path in folders]
    models = [{name: one["model"]["name"] for name, one in manifests(path).items()} for path in folders]
    frame = pd.concat(
        [one.assign(model=one["folder"].map(own)) for one, own in zip(frames, models, strict=True)], ignore_index=True
    )
    frame["run"] = frame.groupby(["root", "folder"], sort=False).ngroup()
    name = frame["folder"].str.rpartition("/")[2]
    frame["kind"] = frame["kind"].replace("evaluate", "answers").mask(name.str.startswith("lost"), "lost")
    frame["policy"] = name.str.rpartition("-")[2]
    frame["group"] = frame["task"] + ", " + frame["policy"].map(POLICIES)
    if frame["model"].nunique() > 1:
        frame["group"] = frame["model"] + ", " + frame["group"]
    shared = frame["budget"].str.contains('"layer_shares"', na=False).map({True: SHARES, False: ""})
    frame["method"] = frame["label"] + shared
    frame["size"] = frame["budget"].map({text: _size(text) for text in frame["budget"].dropna().unique()}).fillna("")
    key = ["kind", *CELL]
    if (twice := frame.duplicated([*key, "run", "example"])).any():
        raise SystemExit(f"{frame.loc[twice, 'folder'].iloc[0]} holds a method, budget and example twice.")
    cells = frame.groupby(key, sort=False)
    frame["cell"], last = cells.ngroup(), cells["run"].transform("max")
    frame["place"] = frame.groupby(["kind", "group"], sort=False).ngroup()
    frame = frame[frame["run"].eq(last) | frame["size"].eq("")]  # full KV is the same in all
    frame = frame.drop_duplicates(["cell", "example"], keep="last").sort_values(["place", "cell"], kind="stable")
    return {str(kind): part for kind, part in frame.groupby("kind")}


def _size(budget: str) -> str:
    """The budget's slots, or what a window keeps of its tokens."""
    fields = json.loads(budget)
    return f"{fields['tokens']} of every {fields['size']}" if fields.get("size") else str(fields["tokens"])


def sizes(frame: pd.DataFrame | pd.Series) -> list[str]:
    """Return the budgets of a table or of a series of cells, smallest first, full KV left out."""
    found = frame["size"] if isinstance(frame, pd.DataFrame) else frame.index.get_level_values("size")
    return sorted(set(found) - {""}, key=lambda size: int(size.split()[0]))


def means(frame: pd.DataFrame, *metrics: str) -> pd.DataFrame:
    """Return a row a cell: the columns of each metric are `mean` and `sem`, its standard error (0 for one example)."""
    found = frame.astype(dict.fromkeys(metrics, float)).groupby(CELL, sort=False)[list(metrics)].agg(["mean", "sem"])
    for metric in metrics:
        one = found[metric, "mean"].notna()
        found.loc[one, (metric, "sem")] = found.loc[one, (metric, "sem")].fillna(0.0)
    return found


def points(table: pd.DataFrame, metric: str, scale: float = 1.0) -> pd.DataFrame:
    """Return a row a cell for a figure: group, method, x (0 for full KV), y, and low and high, one standard error."""
    y, error = scale * table[metric, "mean"], scale * table[metric, "sem"]
    frame = pd.DataFrame({"y": y, "low": y - error, "high": y + error}).reset_index()
    return frame.assign(x=pd.to_numeric(frame["size"].replace("", "0")))


def shares_of_the_way(kl: pd.Series) -> pd.Series:
    """Return by cell how much of the way from `random` to `oracle` its mean KL goes; where a budget has both."""
    by_budget = {key: own.droplevel(["group", "size"]) for key, own in kl.groupby(level=["group", "size"])}
    found = {}
    for group, method, size in kl.index:
        own = by_budget[group, size]
        if size and {"random", "oracle"} <= set(own.index):
            found[group, method, size] = (own["random"] - own[method]) / (own["random"] - own["oracle"])
    return pd.Series(found, pd.MultiIndex.from_tuples(found, names=CELL), dtype=float)


def plus_minus(table: pd.DataFrame, metric: str, digits: int = 3, scale: float = 1.0) -> pd.Series:
    """Return the texts of means and their standard errors; "-" where there is none."""
    return text(table[metric, "mean"], digits, scale) + (" +- " + text(table[metric, "sem"], digits, scale)).where(
        table[metric, "mean"].notna(), ""
    )


def text(numbers: pd.Series, digits: int = 0, scale: float = 1.0) -> pd.Series:
    """Return numbers as texts; "-" where there is none."""
    return (scale * numbers).map(lambda one: "-" if math.isnan(one) else f"{one:.{digits}f}")


class Gains:
    """Paired differences of one metric, positive where ours is better; None where two cells share no example."""

    def __init__(self, frame: pd.DataFrame, metric: str) -> None:
        self.frame, self.cells = frame, list(frame[CELL].drop_duplicates().itertuples(index=False, name=None))
        scaled = frame.assign(value=METRICS[metric][0] * frame[metric].astype(float)).dropna(subset="value")
        self.values = {cell: dict(zip(own["example"], own["value"], strict=True)) for cell, own in scaled.groupby(CELL)}

    def between(self, ours: tuple[str, str, str], theirs: tuple[str, str, str]) -> Difference | None:
        """Return the difference of two cells."""
        return paired_difference(self.values.get(ours, {}), self.values.get(theirs, {}))

    def over(self, rival: str | Mapping[str, str], ours: Iterable[str] = ()) -> pd.Series:
        """Return the differences of every cell with a budget, or of those of some methods, to a rival of equal size.

        Args:
            rival: a method, or one by group.
            ours: methods; all unless given.
        """
        found = {}
        for group, method, size in self.cells:
            theirs = rival if isinstance(rival, str) else rival[group]
            if size and method != theirs and (not ours or method in ours):
                found[group, method, size] = self.between((group, method, size), (group, theirs, size))
        return pd.Series(list(found.values()), pd.MultiIndex.from_tuples(found, names=CELL), dtype=object)


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
    counts = Counter(map(verdict, found))
    return " / ".join(str(counts[name]) for name in ("better", "undecided", "worse")) if counts else "-"


def markdown(head: Iterable[Any], rows: Iterable[Iterable[Any]]) -> str:
    """Return a Markdown table; a heading with a | in it stands for several columns."""
    line = f"| {' | '.join(map(str, head))} |"
    lines = (f"| {' | '.join(map(str, row))} |" for row in rows)
    return "\n".join([line, "|---" * (line.count("|") - 1) + "|", *lines])


def by_budget(
    texts: pd.Series,
    title: Callable[[str], str] = lambda group: f"**{group}**",
    head: Callable[[str, str], str] = lambda group, size: f"{size} slots",
    name: Callable[[str], str] = str,
) -> str:
    """Return a table for each group, with a row a method (by its `name`) and a column a budget; "-" is no cell."""
    parts = []
    for group, own in texts[texts.index.get_level_values("size") != ""].groupby("group", sort=False):
        cells, budgets, methods = own.droplevel("group").to_dict(), sizes(own), own.index.unique("method")
        rows = [[name(one), *(cells.get((one, size), "-") for size in budgets)] for one in methods]
        parts.append(f"{title(group)}\n\n{markdown(['method', *(head(group, size) for size in budgets)], rows)}\n")
    return "\n".join(parts)
