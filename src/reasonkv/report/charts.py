"""Charts as Vega-Lite: the frontier of the report's page, and figures as PNG.

Needs `altair` and `vl-convert-python`, which draws without a browser and without the network.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd
import vl_convert

from reasonkv.evaluate.frontier import Point
from reasonkv.evaluate.table import FULL_KV
from reasonkv.evaluate.target import FrontierError, Target
from reasonkv.files import write_atomically
from reasonkv.report.metrics import KNOWN, UNITS, shown_metrics
from reasonkv.report.style import FULL_COLOUR, FULL_DASH, Style, styles
from reasonkv.report.wording import byte_unit, ends, rule_words

SHAPES = {
    "o": "circle", "s": "square", "^": "triangle-up", "v": "triangle-down", "D": "diamond", "P": "cross",
    "X": "M-1,-0.6L-0.6,-1L0,-0.4L0.6,-1L1,-0.6L0.4,0L1,0.6L0.6,1L0,0.4L-0.6,1L-1,0.6L-0.4,0Z",
    "*": "M0,-1.2L0.32,-0.4L1.14,-0.37L0.5,0.14L0.7,0.97L0,0.5L-0.7,0.97L-0.5,0.14L-1.14,-0.37L-0.32,-0.4Z",
}  # fmt: skip
"""Vega's names, or paths, of the markers of `reasonkv.report.style`."""
_SIZE = 52
_FULL = Style(FULL_COLOUR, "o", FULL_DASH)
_BASELINE = Style("#000000", "o", (1.2, 1.6))


def looks(names: Sequence[str], known: Mapping[str, Style] | None = None, columns: int = 0) -> dict[str, Any]:
    """Return encodings that give every method its colour, marker and dash.

    Args:
        known: their styles, where they are not those of `styles`.
        columns: of a legend below the chart; 0: the legend stands on the right.
    """
    found = known or (styles([one for one in names if one != "full"]) | ({"full": _FULL} if "full" in names else {}))
    domain, below = list(found), {"orient": "bottom", "columns": columns} if columns else {}
    legend = alt.Legend(title=None, symbolSize=_SIZE, symbolStrokeWidth=0, symbolOpacity=1, labelLimit=260,
                        **below)  # fmt: skip

    def scale(values: Sequence[Any]) -> alt.Scale:
        return alt.Scale(domain=domain, range=list(values))

    own = found.values()
    dashes = [[1.6 * part for part in one.dash] or [1, 0] for one in own]
    return {
        "color": alt.Color("method:N", legend=legend, sort=domain, scale=scale([one.colour for one in own])),
        "shape": alt.Shape("method:N", legend=legend, sort=domain, scale=scale([SHAPES[one.marker] for one in own])),
        "strokeDash": alt.StrokeDash("method:N", legend=None, sort=domain, scale=scale(dashes)),
    }


def lines(data: pd.DataFrame, x: alt.X, y: alt.Y, look: Mapping[str, Any], band: bool = True) -> alt.LayerChart:
    """Return lines with marks and one standard error, from columns x, y, low, high and method.

    The error is a band where a method has three points or more, and bars elsewhere: a band between two points says more
    than was measured.
    """
    base = alt.Chart(data).encode(x=x)
    layers: list[alt.Chart] = [
        base.mark_line(strokeWidth=1.6).encode(y=y, color=look["color"], strokeDash=look["strokeDash"]),
        base.mark_point(filled=True, size=_SIZE, opacity=1).encode(y=y, color=look["color"], shape=look["shape"]),
    ]
    few = data.groupby("method")["x"].transform("nunique") < 3
    for part, mark in ((data[~few], {"type": "area", "opacity": 0.13}), (data[few], {"type": "rule"})):
        if band and len(part):
            error = alt.Chart(part, mark=mark).encode(x=x, y=alt.Y("low:Q", title=y["title"]), y2="high:Q",
                                                      color=look["color"], detail="method:N")  # fmt: skip
            layers.insert(0, error)
    return alt.layer(*layers)


def rule(value: float, dash: Sequence[float] = FULL_DASH, colour: str = FULL_COLOUR) -> alt.Chart:
    """Return a horizontal line, as of full KV."""
    data = pd.DataFrame({"value": [value]})
    return alt.Chart(data).mark_rule(color=colour, strokeDash=list(dash), strokeWidth=1.3).encode(y="value:Q")


def log_x(field: str, title: str | None, values: Sequence[float] = ()) -> alt.X:
    """Return a logarithmic axis with ticks at the values given, or at powers of two."""
    ticks = {"values": list(values)} if len(values) else {}
    axis = alt.Axis(format=",.0f", grid=False, labelOverlap="greedy", **ticks)
    return alt.X(field, title=title, scale=alt.Scale(type="log", base=2, nice=False, padding=12), axis=axis)


def save_png(chart: alt.TopLevelMixin, path: Path, note: str = "", scale: float = 2.0) -> Path:
    """Draw a chart into a PNG file, whole or not at all, with a note under it; return its path."""
    if note:
        chart = chart.properties(title=alt.TitleParams(
            [part for line in note.split("\n") for part in textwrap.wrap(line, 130)], orient="bottom", anchor="start",
            fontSize=10, fontWeight="normal", color="#555555", offset=14,
        ))  # fmt: skip
    spec = chart.configure(font="DejaVu Sans, Arial, sans-serif").configure_view(stroke=None).to_dict()
    write_atomically(path, vl_convert.vegalite_to_png(spec, vl_version=_version(), scale=scale))
    return path


def facets(
    data: pd.DataFrame,
    x: str | Mapping[str, str],
    y: alt.Y,
    path: Path,
    *,
    column: str,
    columns: int,
    row: str | None = None,
    width: int = 200,
    height: int = 160,
    band: bool = True,
    names: Sequence[str] | None = None,
    note: str = "",
) -> Path:
    """Draw panels of `lines`, one for each value of a column, and return the PNG's path; the legend stands below.

    Rows whose x is 0 are lines across the panel: full KV's is dashed, that of the method `target` dotted.

    Args:
        data: columns x, y, low, high, method, and those that `column` and `row` name.
        x: title of the x axis, or that of each column; the axis is logarithmic with a tick at every value.
        y: the y axis; its title stands at the first panel of each row.
        column: what tells panels apart.
        row: a column whose values are rows of panels, and the titles of their y axes.
        band: whether a standard error is shaded.
    """
    drawn = set(data.loc[data["x"] > 0, "method"])
    look = looks([one for one in names or data["method"].unique() if one in drawn], columns=4)
    heads = list(data[column].unique())
    if row:  # fullest first, so that every row's first panel is there to bear its title
        filled = data.groupby(column)[row].nunique()
        heads.sort(key=lambda name: -int(filled[name]))
    rows = [data[row].eq(name) for name in data[row].unique()] if row else [data[column].notna()]
    panels: list[alt.Chart | alt.LayerChart] = []
    for at, here in enumerate(rows):
        for name in heads:
            part = data[here & data[column].eq(name)]
            own, first = y.copy(), len(panels) % columns == 0
            own["title"] = (str(data.loc[here, row].iloc[0]).split("\n") if row else y["title"]) if first else ""
            ticks = sorted(part.loc[part["x"] > 0, "x"].unique())
            bottom = at == len(rows) - 1 if row else len(panels) + columns >= len(heads)
            title = x if isinstance(x, str) else x[name]
            chart = lines(part[part["x"] > 0], log_x("x:Q", title if bottom else "", ticks), own, look, band)
            across = part[part["x"] == 0].drop_duplicates("method").set_index("method")["y"]
            for method, value in across.items():
                style = ((2, 3), "#AA3377") if method == "target" else (FULL_DASH, FULL_COLOUR)
                chart = alt.layer(rule(float(value), *style), chart)
            if part.empty:
                chart = alt.Chart(pd.DataFrame({"text": ["not run"]})).mark_text(color="#777777").encode(text="text:N")
            title = "" if row and at else str(name)
            panels.append(chart.properties(title=title, width=width, height=height))
    grid = alt.concat(*panels, columns=columns, bounds="flush", spacing={"row": 32 if row else 50, "column": 48})
    grid = grid.resolve_scale(color="shared", shape="shared", strokeDash="shared")
    return save_png(grid, path, note, scale=1.5)


def _version() -> str:
    """The newest Vega-Lite that both libraries know."""
    return str(vl_convert.get_vegalite_versions()[-1])


# -- the report -------------------------------------------------------------------------------------------------------


def chart_script() -> str:
    """Return Vega, Vega-Lite and Vega-Embed as one script that sets `window.vegaEmbed`; nothing is fetched."""
    return "(() => {" + vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=_version()) + "})();"


def report_chart(summary: pd.DataFrame, kind: str, baseline: pd.DataFrame | None) -> dict[str, Any]:
    """Return the report's chart of one cohort: a Vega-Lite specification, and what its switches offer.

    The page's script sets the parameters `task` and `metric` and the field of the x axis. Compressed and selecting
    cells are filled marks on a line, those of other regimes hollow marks beside it.

    Args:
        baseline: rows of random with the prompt kept, to be drawn beside the methods.
    """
    every = summary if baseline is None else pd.concat([summary, baseline], ignore_index=True)
    metrics = [one for one in shown_metrics(kind, summary) if one.title]
    rows = []
    for row in every.to_dict("records"):
        for metric in metrics:
            if math.isnan(row[metric.key]):
                continue
            y, low, high = (_digits(one * metric.scale) for one in (row[metric.key], *ends(row, metric.key)))
            found = {"task": row["task"], "method": row["method"], "regime": row["regime"], "metric": metric.key}
            found |= {"y": y, "low": low, "high": high}
            if row["regime"] != FULL_KV:
                found |= {axis: _digits(row[axis]) for axis in ("tokens", "physical_mean")}
                found |= {"bytes_held": _digits(row["bytes_held"] / 1024), "n": row["n"]}
                found["mean"] = metric.text(row)
                found |= {f"to {other}": metric.difference(row, other) for other in ("full", "random")}
            rows.append(found)
    bounded = summary[summary["tokens"] > 0]
    methods = list(bounded["method"].unique())
    look = looks(methods, styles(methods) | ({} if baseline is None else {"random, prompt kept": _BASELINE}))
    here = "datum.task == task && datum.metric == metric && "
    x, y = log_x("tokens:Q", None), alt.Y("y:Q", scale=alt.Scale(zero=False), title=None)
    # a logarithmic axis has no place for 0, as of a method that never decoded
    points = alt.Chart().transform_filter(f"{here}datum.regime != '{FULL_KV}' && datum.tokens > 0").encode(x=x)
    drawn = "datum.regime == 'compressed' || datum.regime == 'selecting'"
    cut, uncut = points.transform_filter(drawn), points.transform_filter(f"!({drawn})")
    picked = alt.selection_point(fields=["method"], bind="legend", name="picked")
    opacity = alt.condition(picked, alt.value(1), alt.value(0.07))
    told = {"method:N": "method", "tokens:Q": "budget, slots", "mean:N": "mean", "to full:N": "to full KV",
            "to random:N": "to random", "physical_mean:Q": "mean slots", "n:Q": "n", "regime:N": "regime"}  # fmt: skip
    mark = {"y": y, "color": look["color"], "opacity": opacity}
    marks = mark | {"shape": look["shape"], "tooltip": [alt.Tooltip(one, title=title) for one, title in told.items()]}
    full = alt.Chart().transform_filter(f"{here}datum.regime == '{FULL_KV}'")
    chart = alt.layer(
        full.mark_rule(strokeDash=list(FULL_DASH), strokeWidth=1.4, color="#888888").encode(y=y),
        points.mark_rule(strokeWidth=1.1).encode(**mark | {"y": alt.Y("low:Q"), "y2": alt.Y2("high:Q")}),
        cut.mark_line(strokeWidth=1.9).encode(strokeDash=look["strokeDash"], **mark),
        cut.mark_point(filled=True, size=_SIZE).encode(**marks).add_params(picked),
        uncut.mark_point(filled=False, size=_SIZE).encode(**marks),
        data=alt.Data(values=rows),
    ).add_params(*(alt.param(name=name, value="") for name in ("task", "metric")))
    return {
        "spec": chart.properties(width="container", height=290).to_dict(),
        "metrics": [[one.key, one.title] for one in metrics],
        "tasks": list(bounded["task"].unique()),
    }


def _digits(value: float) -> float | None:
    return None if math.isnan(value) else float(f"{value:.6g}")


# -- figures ----------------------------------------------------------------------------------------------------------


def replay_figure(summary: pd.DataFrame, path: Path, *, by_mean: bool = False, note: str = "") -> Path:
    """Draw top-1 agreement and KL against budgets, a column of panels per task; return the PNG's path.

    Args:
        summary: of a replay, without regimes.
        by_mean: against the mean slots attended per output token, not the budget's.
    """
    axis, parts = "physical_mean" if by_mean else "tokens", []
    for metric in (KNOWN["top1"], KNOWN["kl"]):
        mean, se = (summary[name] * metric.scale for name in (metric.key, f"{metric.key}_se"))
        ends = {"low": mean - se.fillna(0), "high": mean + se.fillna(0)}
        x = summary[axis].where(summary["tokens"] > 0, 0)
        parts.append(summary[["task", "method"]].assign(x=x, y=mean, **ends, metric=metric.title))
    data = pd.concat(parts, ignore_index=True)
    return facets(data, UNITS[axis], alt.Y("y:Q", scale=alt.Scale(zero=False)), path, column="task",
                  columns=data["task"].nunique(), row="metric", width=300, height=220,
                  note=f"Dashed: full KV. {note}")  # fmt: skip


def frontier_figure(
    points: Sequence[Point], path: Path, metric: str, *, target: Target | None = None, note: str = ""
) -> Path:
    """Draw a frontier's compressed points, a row of panels per task: against the budget, and against bytes in use.

    Args:
        points: from `measured_points`; those of other regimes are left out (say how many in `note`), and so are those
            with fewer than half of the task's examples, whose mean is that of the longest rows alone.

    Raises:
        FrontierError: no compressed point.
    """
    points = [point for point in points if point.regime == "compressed"]
    if not points:
        raise FrontierError("No record is compressed, so there is nothing to draw; smaller budgets compress more.")
    most = {task: max(len(p.values) for p in points if p.task == task) for task in {p.task for p in points}}
    dense = [point for point in points if 2 * len(point.values) >= most[point.task]]
    if len(dense) < len(points):
        note += f"\nNot drawn: {len(points) - len(dense)} cells with fewer than half of their task's examples."
    words = rule_words([point.rule for point in dense])
    scale = 100.0 if metric in {"top1", "accuracy"} else 1.0
    title = KNOWN["correct" if metric == "accuracy" else metric].title
    unit, name = byte_unit(max(p.bytes_held for p in dense))
    panels = {"against the budget": UNITS["tokens"], "against memory": f"{UNITS['bytes_held']}, {name}"}
    rows: list[dict[str, Any]] = []
    for task in dict.fromkeys(point.task for point in dense):
        own = [point for point in dense if point.task == task]
        full = {key: value for one in own for key, value in one.full.items()}
        top = sum(full.values()) / len(full) if full else math.nan
        across = {"full": top, "target": target.value * (top if target.relative else 1.0) if target else math.nan}
        for panel, by_bytes in zip(panels, (False, True), strict=True):
            place: dict[str, Any] = {"row": f"{title}\n{task}", "panel": panel}
            rows += [place | {"method": key, "x": 0, "y": scale * y} for key, y in across.items() if not math.isnan(y)]
            for one in own:
                # a method's other budget rules have names of their own
                label = one.method + (f": {words[one.rule]}" if words[one.rule] else "")
                y, se = scale * one.mean, scale * float(pd.Series(one.values).sem()) if len(one.values) > 1 else 0.0
                x = one.bytes_held / unit if by_bytes else one.tokens
                rows.append(place | {"method": label, "x": x, "y": y, "low": y - se, "high": y + se})
    return facets(pd.DataFrame(rows), panels, alt.Y("y:Q", scale=alt.Scale(zero=False)), path, column="panel",
                  columns=2, row="row", width=360, height=230, note="Dashed: full KV. " + note)  # fmt: skip
