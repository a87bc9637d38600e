"""Figures of docs/results: panels of lines in the colours and markers of the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import altair as alt
import pandas as pd

from reasonkv.report.charts import lines, log_x, looks, rule, save_png


def points(table: pd.DataFrame, metric: str, scale: float = 1.0) -> pd.DataFrame:
    """Return a row a cell for `panels`: group, method, x (0 for full KV), y, and low and high, one standard error."""
    y, error = scale * table[metric, "mean"], scale * table[metric, "sem"]
    frame = pd.DataFrame({"y": y, "low": y - error, "high": y + error}).reset_index()
    return frame.assign(x=pd.to_numeric(frame["size"].replace("", "0")))


def panels(
    data: pd.DataFrame,
    path: Path,
    *,
    x: str,
    y: alt.Y,
    columns: int,
    rows: bool = False,
    width: int = 200,
    height: int = 160,
    band: bool = True,
    names: Sequence[str] = (),
    note: str = "",
    scale: float = 1.5,
) -> None:
    """Draw a panel of lines for each value of the column `panel`, with one legend below, into a PNG file.

    Rows whose x is 0 are full KV's, and drawn as a dashed line across the panel.

    Args:
        data: columns panel, method, x, y and, for the band, low and high.
        path: PNG to write.
        x: title of the x axis, which is logarithmic with a tick at every value.
        y: the y axis; its title stands at the first panel of each row.
        columns: panels side by side.
        rows: a column `row` has the values that rows of panels stand for; they are the titles of the y axes.
        width, height: of a panel.
        band: whether a standard error is shaded.
        names: methods in the legend's order; those of `data` unless given.
        note: a line under the figure.
        scale: pixels per unit of length.
    """
    drawn = set(data.loc[data["x"] > 0, "method"])
    look = looks([one for one in names or data["method"].unique() if one in drawn], columns=4)
    heads = list(data["panel"].unique())
    wanted = [(row, head) for row in data["row"].unique() for head in heads] if rows else [("", one) for one in heads]
    charts: list[alt.Chart | alt.LayerChart] = []
    for at, (row, head) in enumerate(wanted):
        part = data[data["panel"].eq(head) & (data["row"].eq(row) if rows else True)]
        lowest, own = at + columns >= len(wanted), y.copy()
        own["title"] = "" if at % columns else row or y["title"]
        bounded, full = part[part["x"] > 0], part.loc[part["x"] == 0, "y"]
        chart = lines(bounded, log_x("x:Q", x if lowest else "", sorted(bounded["x"].unique())), own, look, band)
        if len(full):
            chart = alt.layer(rule(float(full.iloc[0])), chart)
        if part.empty:
            chart = alt.Chart(pd.DataFrame({"text": ["not run"]})).mark_text(color="#777777").encode(text="text:N")
        charts.append(chart.properties(title="" if rows and at >= columns else head, width=width, height=height))
    grid = alt.concat(*charts, columns=columns, bounds="flush", spacing={"row": 32 if rows else 50, "column": 48})
    grid = grid.resolve_scale(color="shared", shape="shared", strokeDash="shared")
    save_png(grid, path, note, scale=scale)
