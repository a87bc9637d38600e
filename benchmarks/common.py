"""What the timing scripts share: flags, rounds by turns, medians with intervals, and a table beside a JSON file."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table

from reasonkv.files import write_atomically

RESULTS = Path(__file__).parent / "results"
Measures = dict[str, list[float]]
"""Values by what was measured, one a round."""


def options(doc: str | None, **defaults: Any) -> argparse.Namespace:
    """Return a script's options: a flag for each default, of its type; a tuple takes several words.

    `--threads` and `--name` (of the JSON file) are everybody's.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"threads": torch.get_num_threads(), "name": ""} | defaults
    for name, default in defaults.items():
        flag, shown = "--" + name.replace("_", "-"), f"default: {default}"
        if isinstance(default, bool):
            parser.add_argument(flag, action="store_true")
        elif isinstance(default, tuple):
            parser.add_argument(flag, nargs="+", default=list(default), help="several words")
        else:
            parser.add_argument(flag, type=type(default), default=default, help=shown)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    return given


def by_turns(
    arms: Mapping[str, Callable[[], Mapping[str, float]]], rounds: int, warm_up: int = 1
) -> dict[str, Measures]:
    """Return what every arm measured in every round; arms take turns, so that a slow minute hits all alike.

    Args:
        arms: what to run, by name.
        rounds: that count.
        warm_up: rounds before them.
    """
    found: dict[str, Measures] = {name: {} for name in arms}
    for number in range(warm_up + rounds):
        for name, arm in arms.items():
            for measure, value in arm().items():
                if number >= warm_up:
                    found[name].setdefault(measure, []).append(value)
    return found


def median_interval(values: Sequence[float], draws: int = 10_000, seed: int = 0) -> tuple[float, float, float]:
    """Return the median and its 95 % percentile-bootstrap interval."""
    sample = np.asarray(values)
    resampled = np.random.default_rng(seed).choice(sample, (draws, len(sample)))
    low, high = np.percentile(np.median(resampled, axis=1), [2.5, 97.5])
    return float(np.median(sample)), float(low), float(high)


def median(values: Sequence[float]) -> float:
    """Return the median."""
    return float(np.median(values))


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """Return the median of the ratios of paired rounds, and its interval."""
    return median_interval([a / b for a, b in zip(ours, theirs, strict=True)])


def environment() -> dict[str, Any]:
    """Return device, versions, threads, load and commit, as written beside every result."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    ).stdout.strip()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
    processor = names[0] if names else platform.processor() or platform.machine()
    return {
        "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else processor,
        "threads": torch.get_num_threads(), "cores": os.cpu_count(), "torch": torch.__version__,
        "transformers": transformers.__version__, "python": platform.python_version(), "commit": commit,
    }  # fmt: skip


def publish(
    name: str, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], given: Any, **extra: Any
) -> None:
    """Print a table and write `results/NAME.json` with it, the options, the environment and `extra`."""
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row))
    data = {
        "title": title, "environment": environment(), "options": {k: v for k, v in vars(given).items() if k != "name"},
        "rows": [dict(zip(columns, row, strict=True)) for row in rows], **extra,
    }  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{given.name or name}.json"
    write_atomically(path, (json.dumps(data, indent=1, default=str) + "\n").encode())
    Console().print(table, f"written to {path}")
