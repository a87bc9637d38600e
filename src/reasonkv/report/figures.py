"""The frontier: fidelity against what is held, one column of panels per task, one row per metric."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from reasonkv.evaluate.summary import Row
from reasonkv.report.style import FULL_COLOUR, FULL_DASH, styles

_TITLES = {
    "top1": "top-1 agreement with full KV, %",
    "top5": "top-5 agreement with full KV, %",
    "nll": "NLL of full KV's tokens, nats",
    "kl": "KL from full KV, nats",
}
_SCALE = {"top1": 100.0, "top5": 100.0}


def frontier(
    rows: Sequence[Row],
    path: Path,
    *,
    metrics: Sequence[str] = ("top1", "kl"),
    x: Literal["tokens", "physical_mean"] = "tokens",
    note: str = "",
) -> Path:
    """Draw the frontier.

    Args:
        rows: from `summarize`.
        path: PNG to write.
        metrics: one row of panels each.
        x: the budget's tokens, or the mean slots attended per output token.
        note: one line under the figure.

    Returns:
        `path`.
    """
    tasks = list(dict.fromkeys(row.task for row in rows))
    methods = list(dict.fromkeys(row.method for row in rows if row.tokens is not None))
    # a Figure of its own, not pyplot's: no display is needed and no global state is left behind
    figure = Figure(figsize=(1.4 + 4.4 * len(tasks), 0.7 + 3.0 * len(metrics)), layout="constrained")
    grid = figure.subplots(len(metrics), len(tasks), squeeze=False, sharex="col")
    handles: dict[str, Any] = {}
    for column, task in enumerate(tasks):
        own = [row for row in rows if row.task == task]
        for axes, metric in zip(grid[:, column], metrics, strict=True):
            handles.update(_panel(axes, own, methods, metric, x))
            axes.set_ylabel(_TITLES[metric] if column == 0 else "")
        grid[0, column].set_title(task, fontweight="bold")
        words = "budget, slots per KV head after a compaction" if x == "tokens" else "mean slots per output token"
        grid[-1, column].set_xlabel(words)
    figure.align_ylabels(grid[:, 0])
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False)
    if note:
        figure.supxlabel(note, fontsize=8, color="#555555")
    figure.savefig(path, dpi=150)
    return path


def _panel(axes: Axes, rows: Sequence[Row], methods: Sequence[str], metric: str, x: str) -> dict[str, Any]:
    scale = _SCALE.get(metric, 1.0)
    handles: dict[str, Any] = {}
    full = [row for row in rows if row.tokens is None]
    if full:
        handles["full KV"] = axes.axhline(
            full[0].estimates[metric].mean * scale, ls=(0, FULL_DASH), lw=1.2, color=FULL_COLOUR
        )
    for method, style in styles(methods).items():
        own = [row for row in rows if row.method == method and row.tokens is not None]
        if not own:
            continue
        points = [
            (_x(row, x), row.estimates[metric].mean * scale, (row.estimates[metric].se or 0) * scale) for row in own
        ]
        at, mean, se = zip(*sorted(points), strict=True)
        (line,) = axes.plot(at, mean, ms=5, lw=1.6, **style.line)
        low, high = [m - s for m, s in zip(mean, se, strict=True)], [m + s for m, s in zip(mean, se, strict=True)]
        axes.fill_between(at, low, high, color=style.colour, alpha=0.13, lw=0)
        handles[method] = line
    axes.set_xscale("log", base=2)
    ticks = sorted({round(_x(row, x)) for row in rows if row.tokens is not None}) if x == "tokens" else None
    if ticks:
        axes.set_xticks(ticks)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:,.0f}"))
    axes.grid(True, lw=0.5, color="#dddddd")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return handles


def _x(row: Row, x: str) -> float:
    return float(row.tokens or 0) if x == "tokens" else row.estimates["physical_mean"].mean
