"""The concentration of a model's queries, per layer and head, and per rotary pair."""

from __future__ import annotations

from pathlib import Path

from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from reasonkv.calibration.statistics import Calibration
from reasonkv.report.style import FIXED

_COLOUR = FIXED["snapkv"].colour  # the palette's blue, from white
_MAP = LinearSegmentedColormap.from_list("concentration", ["#FFFFFF", _COLOUR, "#00263D"])
_GREY = "#555555"
_LABELLED = 12
"""Cells carry their number up to so many rows and columns."""


def concentration_figure(calibration: Calibration, path: Path | str) -> Path:
    """Draw R = |mean of q_f| / mean of |q_f| of every head and, per layer, of every rotary pair.

    Left: one cell per layer and query head, its pairs weighted by |mean of q_f|. Right: one cell per layer and rotary
    pair, its heads weighted likewise; pair 0 turns fastest. 1: all queries point one way before RoPE.

    Args:
        calibration: the statistics.
        path: PNG to write.

    Returns:
        `path`.
    """
    weight_LHqF = calibration.mean_LHqF.abs()
    weighted_LHqF = weight_LHqF * calibration.concentration_LHqF()
    by_pair_LF = weighted_LHqF.sum(1) / weight_LHqF.sum(1).clamp(min=1e-30)
    panels = (
        ("query head", calibration.head_concentration_LHq(), "of a head"),
        ("rotary pair (0 turns fastest)", by_pair_LF, "of a rotary pair"),
    )
    height = 1.7 + max(1.6, min(7.0, 0.24 * calibration.layers))
    figure = Figure(figsize=(11.5, height), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, (words, values, title) in zip((left, right), panels, strict=True):
        image = axes.imshow(values.cpu().numpy(), cmap=_MAP, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        axes.set_title(f"concentration R {title}", fontweight="bold", fontsize=11)
        axes.set_xlabel(words)
        axes.set_ylabel("layer")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        if max(values.shape) <= _LABELLED:
            for (row, column), value in zip(_cells(*values.shape), values.flatten().tolist(), strict=True):
                axes.text(
                    column, row, f"{value:.2f}", ha="center", va="center", color="white" if value > 0.5 else "black"
                )
    figure.colorbar(image, ax=[left, right], label="R (1: queries all point one way)", shrink=0.9)
    figure.supxlabel(_caption(calibration), fontsize=8, color=_GREY)
    figure.savefig(path, dpi=150)
    return Path(path)


def _cells(rows: int, columns: int) -> list[tuple[int, int]]:
    return [(row, column) for row in range(rows) for column in range(columns)]


def _caption(calibration: Calibration) -> str:
    parts = [calibration.name or "unnamed model"]
    if calibration.tokens is not None:
        parts.append(f"{calibration.tokens:,} tokens")
    if calibration.source is not None:
        parts.append(calibration.source)
    return "; ".join(parts)
