"""docs/results/leaderboard: every cell that was measured on a pretrained model, in one table to sort and filter."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from pretrained_league import VARIANTS, of_league
from tables import POLICIES, load, manifests, means, shares_of_the_way, text

SOURCES = ("pretrained_league", "lead", "breadth", "pretrained")
"""Folders under docs/results whose records come from pretrained models."""
_FITTED = dict.fromkeys(("forecast", *VARIANTS), "fitted") | {"oracle": "sees the future"}
"""What no other method is given."""
_HEAD = ("method", "KL, nats", "way to the oracle, %", "top-1, %", "right, %", "slots", "mean slots", "model", "task",
         "prompt", "interval", "n", "given", "page")  # fmt: skip
_FILTERS = ("model", "task", "prompt", "interval", "slots")
_PAGE = Path(__file__).with_suffix(".md")


def build(source: Path, to: Path) -> None:
    """Write the page into `to` from the records of `SOURCES`, which stand beside `source`."""
    rows = pd.concat([_rows(source.parent / name) for name in SOURCES])
    rows = rows.drop_duplicates(["method", "KL, nats", *_FILTERS])  # pages repeat cells to compare others with
    rows = rows.sort_values(["model", "task", "page", "KL, nats"], kind="stable", ascending=[True, True, False, True])
    lines = (f"<tr>{''.join(f'<td>{one}</td>' for one in row)}</tr>" for row in rows[list(_HEAD)].values)
    pages = ", ".join(f"[{name.replace('_', ' ')}](../{name}/README.md)" for name in SOURCES)
    head = "".join(f"<th>{name}</th>" for name in _HEAD)
    page = _PAGE.read_text().format(filters=",".join(_FILTERS), head=head, rows="\n".join(lines), pages=pages)
    (to / "tables.md").write_text(page)


def _rows(folder: Path) -> pd.DataFrame:
    """Return one row a cell of a folder's replays."""
    records, about = load(folder), manifests(folder)
    replay = of_league(records["replay"])
    answers = (
        means(records["answers"], "correct")["correct", "mean"] if "answers" in records else pd.Series(dtype=float)
    )
    found = means(replay, "kl", "top1", "physical_mean")
    first = replay.groupby(["group", "method", "size"], sort=False).first().loc[found.index]
    examples = replay.groupby(["group", "method", "size"], sort=False)["example"].nunique().loc[found.index]
    manifest = first["folder"].map(about)
    kl, error = text(found["kl", "mean"], 4), text(found["kl", "sem"], 4)
    way = shares_of_the_way(found["kl", "mean"])
    return pd.DataFrame({
        "model": manifest.map(lambda one: one["model"]["name"].rpartition("/")[2].removesuffix("-Instruct")),
        "task": first["task"],
        "prompt": first["policy"].map(POLICIES),
        "interval": manifest.map(lambda one: one["arguments"]["budgets"][0]["interval"]),
        "slots": found.index.get_level_values("size"),
        "method": found.index.get_level_values("method"),
        "KL, nats": kl + " ± " + error,
        "way to the oracle, %": [f"{100 * way[cell]:.0f}" if cell in way else "" for cell in found.index],
        "top-1, %": text(found["top1", "mean"], 1, 100),
        "right, %": [f"{100 * answers[cell]:.0f}" if cell in answers else "" for cell in found.index],
        "mean slots": text(found["physical_mean", "mean"]),
        "n": examples,
        "given": [_FITTED.get(method, "") for method in found.index.get_level_values("method")],
        "page": f'<a href="../{folder.name}/">{folder.name.replace("_", " ")}</a>',
    }, found.index)  # fmt: skip
