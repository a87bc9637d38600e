"""The training curve as a figure: wrong tokens by kind, and the loss, for each family."""

from __future__ import annotations

import json
from pathlib import Path

import altair as alt
import pandas as pd

_COUNTERS = {"step", "tokens", "seconds", "learning_rate"}
_SMALLEST = 1e-5  # the logarithmic axis cannot show an error of 0


def draw_curve(log: Path, path: Path) -> Path:
    """Draw `training_log.jsonl` (lines) or `training_log.json` (a list) as a PNG; return `path`.

    Each family has a column. The upper row shows the share of wrong tokens of each kind, the lower row the loss, both
    as running means at the family's stage of that moment. They jump where problems become longer (dotted lines).
    """
    text = log.read_text()
    entries = json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]
    rows = [
        {"family": family, "tokens": entry["tokens"] / 1e6, **values}
        for entry in entries
        for family, values in entry.items()
        if family not in _COUNTERS
    ]
    columns = []
    for family, frame in pd.DataFrame(rows).groupby("family", sort=False):
        kinds = [name for name in frame if name not in ("family", "tokens", "level", "loss")]
        errors = frame.melt(["tokens"], kinds, "kind", "right").dropna()
        errors["wrong"] = (1 - errors["right"]).clip(_SMALLEST)
        stages = frame[frame["level"].diff() > 0]
        x = alt.X("tokens", title="million tokens seen")
        rule = alt.Chart(stages).mark_rule(color="grey", strokeDash=[2, 2]).encode(x=x)
        wrong = alt.Y("wrong", title="share of tokens wrong").scale(type="log")
        loss = alt.Y("loss", title="loss").scale(type="log")
        above = alt.Chart(errors, title=str(family)).mark_line().encode(x=x, y=wrong, color="kind")
        below = alt.Chart(frame).mark_line(color="black").encode(x=x, y=loss)
        size = {"width": 170, "height": 130}
        columns.append((above + rule).properties(**size) & (below + rule).properties(**size))
    alt.hconcat(*columns).save(path, scale_factor=1)
    return path
