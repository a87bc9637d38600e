"""The frontier as a figure: one row per task, the metric against the budget and against the bytes that are held."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from reasonkv.evaluate.frontier import Axis, FrontierError, Point, Target
from reasonkv.evaluate.statistics import estimate
from reasonkv.report.frontier_tables import UNITS, amount, byte_unit, rule_words
from reasonkv.report.regimes import DECODE_ACTIVE
from reasonkv.report.style import FULL_COLOUR, FULL_DASH, Style, styles

_TITLES = {
    "top1": "top-1 agreement, %",
    "accuracy": "accuracy, %",
    "nll": "NLL of full KV's tokens, nats",
    "kl": "KL from full KV, nats",
}
_SCALE = {"top1": 100.0, "accuracy": 100.0}
_COLUMNS: tuple[Axis, Axis] = ("tokens", "bytes_held")


def draw_frontier(
    points: Sequence[Point], path: Path, metric: str, *, target: Target | None = None, note: str = ""
) -> Path:
    """Draw the frontier of decode-active points.

    Args:
        points: from `measured_points`; those of other regimes are left out (say how many in `note`), and so are those
            with fewer than half of the task's examples, whose mean is that of the longest rows alone.
        path: PNG to write.
        metric: the points'.
        target: drawn as a dotted line.
        note: a line under the figure.

    Returns:
        `path`.

    Raises:
        FrontierError: no decode-active point.
    """
    points = [point for point in points if point.regime == DECODE_ACTIVE]
    if not points:
        raise FrontierError("No record is decode-active, so there is nothing to draw; smaller budgets compress more.")
    most = {task: max(len(p.values) for p in points if p.task == task) for task in {p.task for p in points}}
    sparse = [point for point in points if 2 * len(point.values) < most[point.task]]
    points = [point for point in points if point not in sparse]
    if sparse:
        note += f"\nNot drawn: {len(sparse)} cells with fewer than half of their task's examples."
    tasks = list(dict.fromkeys(point.task for point in points))
    words = rule_words([point.rule for point in points])
    series = {
        (point.method, point.rule): point.method + (f" ({words[point.rule]})" if words[point.rule] else "")
        for point in points
    }
    looks = styles(_style_names(series))
    # a Figure of its own, not pyplot's: no display is needed and no global state is left behind
    figure = Figure(figsize=(11.0, 0.9 + 3.1 * len(tasks)), layout="constrained")
    grid = figure.subplots(len(tasks), 2, squeeze=False, sharey="row")
    handles: dict[str, Any] = {}
    for axes_row, task in zip(grid, tasks, strict=True):
        own = [point for point in points if point.task == task]
        for axes, axis in zip(axes_row, _COLUMNS, strict=True):
            handles |= _panel(axes, own, series, looks, metric, axis, target)
        axes_row[0].set_ylabel(_TITLES[metric])
        axes_row[0].set_title(task, fontweight="bold", loc="left")
    for axes, axis in zip(grid[-1], _COLUMNS, strict=True):
        axes.set_xlabel(UNITS[axis])
    last = [name for name in ("full KV", "target") if name in handles]
    order = [*(name for name in series.values() if name in handles), *last]
    figure.legend([handles[name] for name in order], order, loc="outside right upper", frameon=False)
    figure.align_ylabels(grid[:, 0])
    if note:
        figure.supxlabel(note, fontsize=8, color="#555555")
    figure.savefig(path, dpi=150)
    return path


def _style_names(series: dict[tuple[str, str], str]) -> list[str]:
    """Labels that `styles` reads as variants of a method: the method, then `method:...` for its other rules."""
    return [_style_name(method, rule, series) for method, rule in series]


def _style_name(method: str, rule: str, series: dict[tuple[str, str], str]) -> str:
    first = next(one for one in series if one[0] == method)
    return method if first == (method, rule) else f"{method}{'' if ':' in method else ':'} {rule}"


def _panel(
    axes: Axes,
    points: Sequence[Point],
    series: dict[tuple[str, str], str],
    looks: dict[str, Style],
    metric: str,
    axis: Axis,
    target: Target | None,
) -> dict[str, Any]:
    scale = _SCALE.get(metric, 1.0)
    handles: dict[str, Any] = {}
    full = {example: value for point in points for example, value in point.full.items()}
    if full:
        mean = math.fsum(full.values()) / len(full)
        handles["full KV"] = axes.axhline(mean * scale, ls=(0, FULL_DASH), lw=1.2, color=FULL_COLOUR)
        if target is not None:
            bar = target.value * (mean if target.relative else 1.0)
            handles["target"] = axes.axhline(bar * scale, ls=":", lw=1.2, color="#AA3377")
    for (method, rule), label in series.items():
        own = [point for point in points if (point.method, point.rule) == (method, rule)]
        if not own:
            continue
        own.sort(key=lambda point: point.x(axis))
        look = looks[_style_name(method, rule, series)]
        at = [point.x(axis) for point in own]
        means = [estimate(list(point.values.values())) for point in own]
        low, high = ([(one.mean + sign * (one.se or 0)) * scale for one in means] for sign in (-1, 1))
        (handles[label],) = axes.plot(at, [one.mean * scale for one in means], ms=5, lw=1.6, **look.line)
        axes.fill_between(at, low, high, color=look.colour, alpha=0.12, lw=0)
    _ticks(axes, [point.x(axis) for point in points], axis)
    axes.grid(True, lw=0.5, color="#dddddd")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return handles


def _ticks(axes: Axes, values: Sequence[float], axis: Axis) -> None:
    """A logarithmic axis with ticks at the measured budgets, or at round numbers where those would crowd."""
    axes.set_xscale("log", base=2)
    low, high = min(values), max(values)
    ticks = sorted(set(values)) if axis == "tokens" else []
    span = math.log2(high / low)
    if not ticks or any(math.log2(b / a) < span / 10 for a, b in pairwise(ticks)):
        unit, _ = byte_unit(high) if axis == "bytes_held" else (1, "")
        if span > 2.5:
            ticks = [2.0**place for place in range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)]
        else:
            ticks = [
                float(tick) * unit for tick in MaxNLocator(5, steps=[1, 2, 2.5, 5]).tick_values(low / unit, high / unit)
            ]
    axes.set_xticks([tick for tick in ticks if low * 0.999 <= tick <= high * 1.001] or [low])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tick, _: amount(tick, axis)))
