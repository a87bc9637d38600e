"""docs/results/sensitivity and equal_bytes: a cell of a pretrained model under other settings, and in fewer bits."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import altair as alt
import pandas as pd
from tables import manifests, markdown, words

from reasonkv.evaluate.statistics import paired_difference
from reasonkv.evaluate.table import KEPT, read_results
from reasonkv.numbers import KVDtype
from reasonkv.report.charts import save_png

_BASE = {"interval": "32", "recent": "32", "fit": "48"}
"""What the cell called `base` has; the settings of other folders are their names, as in interval=16."""
_TITLES = {
    "interval": "Tokens between compactions, at equal mean slots",
    "recent": "Newest tokens that are never evicted",
    "statistics": "What TriAttention's and CASK's statistics come from",
    "fit": "What forecast is fitted to: so many problems, or a text of another kind",
}
_WHOLE = 4096  # slots, more than any trace has
_STORED = ["bfloat16", *get_args(KVDtype)]


def build(source: Path, to: Path) -> None:
    """Write a table for each setting of `source` into `to`: KL of every method, and its change from the base."""
    frame = _read(source)
    frame[["setting", "value"]] = frame["root"].str.partition("=")[[0, 2]]
    base, parts = frame[frame["setting"] == "base"], [_about(source)]
    for setting, title in _TITLES.items():
        own = frame[frame["setting"] == setting]
        if setting in _BASE:
            own = pd.concat([own, base[base["label"].isin(own["label"])].assign(value=_BASE[setting])])
        values = sorted(
            own["value"].unique(), key=lambda one: (not one.isdigit(), int(one) if one.isdigit() else 0, one)
        )
        first = _BASE.get(setting, values[0])
        rows = [
            [label, *(_cell(part, value, first) for value in values)]
            for label, part in own.groupby("label", sort=False)
        ]
        parts.append(f"## {title}\n\n{markdown(['method', *values], rows)}\n")
    (to / "tables.md").write_text("\n".join(parts))


def _cell(part: pd.DataFrame, value: str, first: str) -> str:
    """Return a mean KL, and with its interval the change from the first value on the same traces."""
    kl = {one: own.set_index("example")["kl"].to_dict() for one, own in part.groupby("value")}
    if value not in kl:
        return "-"
    mean = f"{pd.Series(kl[value]).mean():.4f}"
    return mean if value == first else f"{mean} ({words(paired_difference(kl[value], kl[first]), 4)})"


def equal_bytes(source: Path, to: Path) -> None:
    """Write the table and the figure of `source` into `to`: KL against the bytes that a trace's cache holds."""
    frame, about = _read(source), manifests(source)
    frame["stored"] = frame["folder"].map(
        {name: one["arguments"].get("kv_dtype") or "bfloat16" for name, one in about.items()}
    )
    is_whole = frame["tokens"].ge(_WHOLE) | frame["tokens"].eq(0)
    frame["method"] = frame["label"].mask(is_whole, "nothing evicted")
    frame["slots"] = frame["tokens"].astype(str).mask(is_whole, "all")
    frame["share"] = 100 * frame["bytes_held"] / frame["bytes_full"]
    frame = frame.drop_duplicates(["method", "stored", "slots", "example"], keep="last")
    cells = frame.groupby(["method", "stored", "slots"])
    found = cells[["kl", "top1", "share"]].mean().assign(sem=cells["kl"].sem(), n=cells["example"].nunique())
    found = found.reset_index().sort_values("share", ascending=False)
    head = ["method", "slots", "stored as", "bytes, % of full KV", "KL, nats", "top-1, %", "n"]
    rows = [
        [one.method, one.slots, one.stored, f"{one.share:.0f}", f"{one.kl:.4f} +- {one.sem:.4f}",
         f"{100 * one.top1:.1f}", one.n]
        for one in found.itertuples()
    ]  # fmt: skip
    (to / "tables.md").write_text(f"{_about(source)}\n{markdown(head, rows)}\n")
    shown = found[~((found["method"] == "nothing evicted") & (found["stored"] == "bfloat16"))]
    shown = shown.assign(low=shown["kl"] - shown["sem"], high=shown["kl"] + shown["sem"])
    order = ["nothing evicted", "random", "expected", "forecast", "forecast:window=0", "oracle"]
    base = alt.Chart(shown).encode(
        x=alt.X("share:Q", scale=alt.Scale(type="log", nice=False, padding=14),
                axis=alt.Axis(values=[20, 30, 40, 50, 60, 80, 100]),
                title="bytes held, % of full KV in bfloat16 (log)"),
        color=alt.Color("method:N", sort=order, title=None, scale=alt.Scale(
            domain=[one for one in order if one in set(shown["method"])],
            range=["#666666", "#d95f02", "#7570b3", "#1b9e77", "#66a61e", "#e7298a"])),
    )  # fmt: skip
    dots = base.mark_point(filled=True, size=90, opacity=1).encode(
        y=alt.Y("kl:Q", scale=alt.Scale(type="log"), title="KL from full KV, nats a token (log)"),
        shape=alt.Shape("stored:N", sort=_STORED, title=None),
    )
    bars = base.mark_rule(strokeWidth=1.5).encode(y="low:Q", y2="high:Q")
    save_png(
        (bars + dots).properties(width=480, height=320),
        to / f"{source.name}.png",
        "Bars: one standard error.",
        scale=1.4,
    )


def _read(source: Path) -> pd.DataFrame:
    frame = read_results([source])
    return frame.assign(root=frame["folder"].str.rpartition("/")[0])


def _about(source: Path) -> str:
    one = next(iter(manifests(source).values()))
    return (f"Made by `python benchmarks/results.py {source.name}` from `{KEPT}`; model {one['model']['name']}, "
            f"{one['device']}.\n")  # fmt: skip
