"""Draw the budget's arithmetic from `reasonkv.schedule` itself.

`python docs/make_figures.py` writes docs/img/budget.svg; with a path, it writes there.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from reasonkv import Budget, schedule

PROMPT, LENGTH = 150, 800
BUDGET = Budget(tokens=256, interval=96, sinks=4, recent=32, prompt="count")
COLOURS = {"count": "#4477aa", "keep": "#ee6677", "on_top": "#228833", "occupancy": "#4477aa", "grid": "#aa7700"}


def walk(budget: Budget | None) -> tuple[list[int], list[int], list[tuple[int, int]]]:
    """Feed the prompt whole, then one token at a time.

    Returns:
        Logical lengths, the slots each forward attends to, and (length, slots kept) of every event. An event adds a
        second point at its length, so that the drop is drawn vertically.

    """
    state = schedule.State(prompt=PROMPT)
    lengths, held, events = [], [], []
    for fed in [PROMPT] + [1] * (LENGTH - PROMPT):
        before = state.held + fed
        state, keep = schedule.step(budget, state, fed)
        lengths.append(state.length)
        held.append(before)
        if keep is not None:
            lengths.append(state.length)
            held.append(keep)
            events.append((state.length, keep))
    return lengths, held, events


def draw(axes: Axes, budget: Budget, label: str, colour: str) -> None:
    """One budget's physical length with a dot after every event."""
    lengths, held, events = walk(budget)
    axes.plot(lengths, held, color=colour, lw=1.6, label=label)
    axes.plot([at for at, _ in events], [kept for _, kept in events], "o", color=colour, ms=4)


def note(axes: Axes, y: int, text: str, colour: str, side: str) -> None:
    """A dotted level with its text at the right edge, above or below it."""
    axes.axhline(y, color=colour, lw=0.8, ls=":")
    axes.text(LENGTH + 8, y, text, color=colour, fontsize=8.5, va={"above": "bottom", "below": "top"}[side])


def main() -> None:
    """Write the figure; the labels' numbers are the schedule's."""
    assert schedule.bound(BUDGET, PROMPT, LENGTH) == 256 + 96
    plt.rcParams.update({"svg.hashsalt": "reasonkv", "svg.fonttype": "none", "font.family": "sans-serif"})
    figure, (left, right) = plt.subplots(2, 1, figsize=(9.0, 8.0), layout="constrained")
    for axes in (left, right):
        full_lengths, full_held, _ = walk(None)
        axes.plot(full_lengths, full_held, color="#888888", lw=1.2, ls="--", label="full KV")
        axes.axvspan(0, PROMPT, color="#000000", alpha=0.05, lw=0)
        axes.text(PROMPT / 2, 870, f"prompt\n{PROMPT} tokens", ha="center", va="top", fontsize=8.5, color="#555555")
        axes.set(xlim=(0, LENGTH), ylim=(0, 900), xlabel="logical length: tokens seen")
        axes.set_ylabel("physical length: slots per KV head")
        axes.spines[["top", "right"]].set_visible(False)
    for prompt in ("count", "on_top"):
        draw(left, replace(BUDGET, prompt=prompt), _NAMES[prompt], COLOURS[prompt])
    on_top = replace(BUDGET, prompt="on_top")
    note(left, schedule.bound(BUDGET, PROMPT, LENGTH), "peak = bound = 256 + 96", COLOURS["count"], "below")
    note(left, BUDGET.tokens, "after an event k = 256", COLOURS["count"], "below")
    note(left, schedule.bound(on_top, PROMPT, LENGTH), "peak = bound = 150 + 256 + 96", COLOURS["on_top"], "above")
    note(left, PROMPT + BUDGET.tokens, "after an event k = 150 + 256", COLOURS["on_top"], "above")
    left.axhspan(0, PROMPT, xmin=PROMPT / LENGTH, color=COLOURS["keep"], alpha=0.12, lw=0)
    left.text(
        475, PROMPT / 2, "keep and on_top: these slots hold the prompt, always", ha="center", va="center", fontsize=8.5
    )
    left.set_title(f"Where the prompt counts (tokens={BUDGET.tokens}, interval={BUDGET.interval})", loc="left")
    left.legend(
        loc="upper left", bbox_to_anchor=(0.19, 1.0), fontsize=8.5, frameon=True, framealpha=1, edgecolor="none"
    )
    grid = replace(BUDGET, trigger="grid")
    draw(right, BUDGET, "occupancy: when k + interval slots are held", COLOURS["occupancy"])
    draw(right, grid, "grid: when the logical length is a multiple of the interval", COLOURS["grid"])
    for at in range(BUDGET.interval, LENGTH, BUDGET.interval):
        right.axvline(at, color=COLOURS["grid"], lw=0.5, alpha=0.5)
    note(right, schedule.bound(BUDGET, PROMPT, LENGTH), "peak = bound of both = 352", "#333333", "above")
    note(right, BUDGET.tokens, "after an event k = 256", "#333333", "below")
    right.set_title("When an event falls (prompt=count)", loc="left")
    right.legend(
        loc="upper left", bbox_to_anchor=(0.19, 1.0), fontsize=8.5, frameon=True, framealpha=1, edgecolor="none"
    )
    target = Path(__file__).parent / "img" / "budget.svg"
    target.parent.mkdir(exist_ok=True)
    if len(sys.argv) > 1:
        target = Path(sys.argv[1])
    figure.savefig(target, metadata={"Date": None}, transparent=False)


_NAMES = {
    "count": "prompt=count and prompt=keep: the prompt is inside",
    "on_top": "prompt=on_top: the prompt comes on top",
}

if __name__ == "__main__":
    main()
