"""The training curve as a figure: accuracy by token kind and loss, per family."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draw to files, also where there is no display
from matplotlib import pyplot as plt

from ..tasks import Kind

_COUNTERS = {"step", "tokens", "seconds", "learning_rate"}


def draw_curve(log: Path, path: Path) -> Path:
    """Draw `training_log.jsonl` as a PNG with one column a family; returns `path`.

    The upper row is the running error (1 - accuracy) of each token kind, the lower row the loss,
    both at the family's stage of that moment: a jump up is a promotion to longer problems (dotted
    lines).
    """
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    # a family may join later, when a run is continued with more courses
    families = list(dict.fromkeys(key for line in lines for key in line if key not in _COUNTERS))
    figure, axes = plt.subplots(2, max(1, len(families)), figsize=(4.2 * max(1, len(families)), 6), squeeze=False)
    for column, family in enumerate(families):
        own = [line for line in lines if family in line]
        seen = [line["tokens"] / 1e6 for line in own]
        errors, losses = axes[0][column], axes[1][column]
        for kind in Kind:
            name = kind.name.lower()
            points = [
                (x, max(1 - line[family][name], 1e-5))
                for x, line in zip(seen, own, strict=True)
                if name in line[family]
            ]
            if points:
                errors.plot(*zip(*points, strict=True), label=name, linewidth=1)
        points = [(x, line[family]["loss"]) for x, line in zip(seen, own, strict=True) if line[family]["loss"]]
        if points:
            losses.plot(*zip(*points, strict=True), color="black", linewidth=1)
        for before, after in itertools.pairwise(own):
            if after[family]["level"] > before[family]["level"]:
                for axis in (errors, losses):
                    axis.axvline(after["tokens"] / 1e6, color="grey", linestyle=":", linewidth=0.8)
        errors.set(title=family, yscale="log", ylabel="share of tokens wrong" if not column else "")
        losses.set(yscale="log", xlabel="million tokens seen", ylabel="" if column else "loss")
        errors.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
