"""The concentration of a model's queries, per layer and head, and per rotary pair."""

from __future__ import annotations

from pathlib import Path

import altair as alt
from torch import Tensor

from reasonkv.calibration.statistics import Calibration

_COLOURS = ["#FFFFFF", "#0072B2", "#00263D"]
_LABELLED = 12
"""Cells carry their number up to so many rows and columns."""


def concentration_figure(calibration: Calibration, path: Path | str) -> Path:
    """Draw R = |mean of q_f| / mean of |q_f| of every head and, per layer, of every rotary pair, into a PNG.

    Left: one cell per layer and query head, its pairs weighted by |mean of q_f|. Right: one cell per layer and rotary
    pair, its heads weighted likewise; pair 0 turns fastest. 1: all queries point one way before RoPE.
    """
    name = calibration.name or "unnamed model"
    tokens = None if calibration.tokens is None else f"{calibration.tokens:,} tokens"
    caption = "; ".join(part for part in (name, tokens, calibration.source) if part is not None)
    panels = (_panel(calibration.concentration(2), "query head"), _panel(calibration.concentration(1), "rotary pair"))
    chart = alt.hconcat(*panels, title=alt.Title("Concentration R of queries before RoPE", subtitle=caption))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    chart.save(str(path), format="png", scale_factor=2)
    return Path(path)


def _panel(values_LX: Tensor, axis: str) -> alt.LayerChart:
    """One heat map: layers downwards, heads or pairs to the right."""
    rows = [
        {"layer": layer, axis: x, "R": value}
        for layer, row in enumerate(values_LX.tolist())
        for x, value in enumerate(row)
    ]
    base = alt.Chart(alt.Data(values=rows)).encode(x=alt.X(f"{axis}:O"), y=alt.Y("layer:O"))
    scale = alt.Scale(domain=[0, 1], range=_COLOURS)
    parts = [
        base.mark_rect().encode(color=alt.Color("R:Q", scale=scale, title=["R (1: queries", "all point one way)"]))
    ]
    if max(values_LX.shape) <= _LABELLED:
        ink = alt.condition("datum.R > 0.5", alt.value("white"), alt.value("black"))
        parts.append(base.mark_text().encode(text=alt.Text("R:Q", format=".2f"), color=ink))
    height, width = (max(80, min(460, 22 * cells)) for cells in values_LX.shape)
    return alt.layer(*parts).properties(width=width, height=height, title=f"per {axis}")
