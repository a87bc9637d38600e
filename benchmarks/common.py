"""What every benchmark shares: where it ran, intervals, and a table beside a JSON file."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"


def environment() -> dict[str, Any]:
    """Device, versions, threads and commit, as committed beside every result."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    ).stdout.strip()
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    return {
        "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else processor,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "commit": commit,
    }


def median_interval(values: list[float], draws: int = 10_000, seed: int = 0) -> tuple[float, float, float]:
    """The median and its 95 % percentile-bootstrap interval."""
    sample = np.asarray(values)
    resampled = np.random.default_rng(seed).choice(sample, (draws, len(sample)))
    low, high = np.percentile(np.median(resampled, axis=1), [2.5, 97.5])
    return float(np.median(sample)), float(low), float(high)


def publish(name: str, title: str, columns: list[str], rows: list[list[Any]], extra: dict[str, Any]) -> None:
    """Print a table and write `results/<name>.json` with the environment."""
    table = Table(title=title)
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row))
    Console().print(table)
    RESULTS.mkdir(exist_ok=True)
    data = {
        "title": title,
        "environment": environment(),
        "rows": [dict(zip(columns, row, strict=True)) for row in rows],
        **extra,
    }
    path = RESULTS / f"{name}.json"
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(data, indent=1) + "\n")
    os.replace(partial, path)
    Console().print(f"written to {path}")
