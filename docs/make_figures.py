"""Draw the budget's arithmetic from `reasonkv.schedule` itself.

`python docs/make_figures.py` writes docs/img/budget.svg; with a path, it writes there.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import altair as alt
import pandas as pd

from reasonkv import Budget, schedule

PROMPT, LENGTH = 150, 800
COUNT = Budget(tokens=256, interval=96, sinks=4, recent=32, prompt="count")
ON_TOP = replace(COUNT, prompt="on_top")
GRID = replace(COUNT, trigger="grid")
X = alt.X("length", title="logical length: tokens seen").scale(domain=(0, LENGTH), nice=False)
Y = alt.Y("slots", title="physical length: slots per KV head").scale(domain=(0, 850), nice=False)


def walk(budget: Budget | None, label: str) -> pd.DataFrame:
    """Feed the prompt whole, then one token at a time; return the slots that each forward pass attends to.

    A compaction adds a second point at its length (`kept`), so that the drop is drawn vertically.
    """
    state = schedule.Lengths(prompt=PROMPT)
    rows = []
    for fed in [PROMPT] + [1] * (LENGTH - PROMPT):
        before = state.physical + fed
        state, keep = schedule.step(budget, state, fed)
        if keep is not None or state.logical in (PROMPT, LENGTH):  # between these points the line is straight
            rows.append((label, state.logical, before, False))
        if keep is not None:
            rows.append((label, state.logical, keep, True))
    frame = pd.DataFrame(rows, columns=["line", "length", "slots", "kept"])
    return frame.assign(order=range(len(frame)))


def panel(title: str, lines: dict[str, Budget | None], notes: dict[str, int]) -> alt.LayerChart:
    """One panel: a line per budget with a dot after every compaction, and dotted levels with their text."""
    frame = pd.concat([walk(budget, label) for label, budget in lines.items()])
    colour = alt.Color("line", sort=list(lines), title=None).scale(range=["#4477aa", "#228833", "#888888"])
    colour = colour.legend(orient="top", columns=1, labelLimit=460)
    dash = alt.StrokeDash("line", sort=list(lines), legend=None).scale(range=[[1, 0], [6, 2], [2, 3]])
    line = alt.Chart(frame).mark_line().encode(x=X, y=Y, order="order", color=colour, strokeDash=dash)
    dots = alt.Chart(frame[frame["kept"]]).mark_point(filled=True, size=36).encode(x=X, y=Y, color=colour)
    levels = pd.DataFrame({"slots": notes.values(), "text": notes.keys(), "length": 8})
    rules = alt.Chart(levels).mark_rule(strokeDash=[2, 3], color="#555").encode(y=Y)
    texts = alt.Chart(levels).mark_text(align="left", dy=-6, fontSize=11).encode(x=X, y=Y, text="text")
    prompt = alt.Chart(pd.DataFrame({"length": [0], "end": [PROMPT]})).mark_rect(opacity=0.08).encode(x=X, x2="end")
    return (prompt + rules + line + dots + texts).properties(title=title, width=440, height=260)


def main(target: Path) -> None:
    """Write the figure; the numbers in its labels are the schedule's."""
    peak, peak_on_top = (schedule.bound(budget, PROMPT, LENGTH) for budget in (COUNT, ON_TOP))
    assert (peak, peak_on_top) == (256 + 96, 150 + 256 + 96)
    above = panel(
        "Where the prompt counts (tokens=256, interval=96, a prompt of 150)",
        {"count, keep: the prompt is inside": COUNT, "on_top: the prompt comes on top": ON_TOP, "full KV": None},
        {
            "peak 256 + 96": peak,
            "k = 256": COUNT.tokens,
            "peak 150 + 256 + 96": peak_on_top,
            "k = 150 + 256": PROMPT + COUNT.tokens,
        },
    )
    below = panel(
        "When a compaction runs (prompt=count)",
        {"occupancy: at k + interval slots": COUNT, "grid: at multiples of the interval": GRID, "full KV": None},
        {"peak of both 352": peak, "k = 256": COUNT.tokens},
    )
    chart = (above & below).resolve_scale(color="independent", strokeDash="independent")
    chart.configure(background="white", padding=12).save(target)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "img" / "budget.svg")
