"""The harness of the timing scripts: options of `timings.yaml`, rounds by turns, medians, resuming, tables, JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import yaml
from rich.console import Console
from rich.table import Table

from reasonkv.files import write_atomically

RESULTS = Path(__file__).parent / "results"
DECLARED: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("timings.yaml").read_text())
Row = dict[str, Any]
Measures = dict[str, list[float]]
"""Values by what was measured, one a round."""
Arms = Mapping[Any, Callable[[], Mapping[str, Any]]]
Found = Iterator[dict[str, Any]]
"""What a script has so far, each time more: `title`, `rows`, and whatever else belongs into its file."""
Main = Callable[[Sequence[str] | None], None]


def script(function: Callable[[argparse.Namespace], Found]) -> Main:
    """Make a function of options the `main` of its module, and run it where the module is a script.

    There is a flag for each option in `timings.yaml`, of its type; a list takes several words. `--threads`, `--preset`,
    `--small` and `--out` belong to every script. Whatever the function yields is published at once, so that a run that
    is stopped leaves what it measured. Without `--out`, the file is `results/SCRIPT.json` or `results/PRESET.json`;
    a small run writes none.
    """
    module = sys.modules[function.__module__]
    name = Path(str(module.__file__)).stem
    declared = DECLARED[name]
    presets = {"": {}, "small": declared["small"], **declared.get("presets", {})}

    def main(argv: Sequence[str] | None = None) -> None:
        parser = argparse.ArgumentParser(
            description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        parser.add_argument("--preset", choices=presets, default="", help="other defaults, and another file")
        parser.add_argument("--small", dest="preset", action="store_const", const="small", help="a run of seconds")
        parser.add_argument("--out", type=Path, help="JSON file to write")
        for option, default in ({"threads": torch.get_num_threads()} | declared["options"]).items():
            kind: dict[str, Any] = {"type": type(default), "help": f"default: {default}"}
            if isinstance(default, bool):
                kind = {"action": "store_true"}
            elif isinstance(default, list):
                kind = {"nargs": "+", "type": type(default[0]), "help": "several words"}
            parser.add_argument("--" + option.replace("_", "-"), default=default, **kind)
        chosen = parser.parse_known_args(argv)[0].preset
        parser.set_defaults(**presets[chosen])
        given = parser.parse_args(argv)
        if given.out is None and chosen != "small":
            given.out = RESULTS / f"{chosen or name}.json"
        torch.set_num_threads(given.threads)
        began, made = time.monotonic(), False
        for found in function(given):
            made = True
            if found["rows"]:
                publish(given, **found, seconds=time.monotonic() - began)
        if not made:
            raise SystemExit("No model was there, so nothing was measured.")

    if function.__module__ == "__main__":
        main()
    return main


def by_turns(arms: Arms, rounds: int, warm_up: int = 0, seconds: float | None = None) -> dict[Any, Measures]:
    """Return what every arm measured in every round; arms take turns, so that a slow minute hits all alike.

    Args:
        arms: what to run, by name.
        rounds: that count.
        warm_up: rounds before them.
        seconds: no further round begins if it would probably end later than this; one that counts is always made.
    """
    found: dict[Any, Measures] = {name: {} for name in arms}
    began = time.monotonic()
    for number in range(warm_up + rounds):
        done = time.monotonic() - began
        if seconds is not None and number > warm_up and done * (number + 1) / number > seconds:
            break
        for name, arm in arms.items():
            for measure, value in arm().items():
                if number >= warm_up:
                    found[name].setdefault(measure, []).append(value)
    return found


def stored(file: Path) -> list[Row]:
    """Return the rows of a JSON-lines file; none where it is not there."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def store(file: Path, row: Row) -> Row:
    """Append a row to a JSON-lines file and return it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as out:
        out.write(json.dumps(row) + "\n")
    return row


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


def interval(values: tuple[float, float, float], name: str = "median") -> dict[str, float]:
    """Return the columns of a median and its 95 % interval."""
    return dict(zip((name, "95 % low", "95 % high"), values, strict=True))


def milliseconds(work: Callable[[], object], cold: bool = False) -> float:
    """Return how long work takes; `cold`: on memory that lies in no cache, since 256 MiB are written before it."""
    if cold:
        torch.zeros(64 * 2**20).add_(1)
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)


def commit() -> str:
    """Return the short name of the commit that is checked out; empty outside a repository."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    ).stdout.strip()


def environment() -> dict[str, Any]:
    """Return device, versions, threads, load and commit, as written beside every result."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
    processor = names[0] if names else platform.processor() or platform.machine()
    return {
        "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else processor,
        "threads": torch.get_num_threads(), "cores": os.cpu_count(), "torch": torch.__version__,
        "transformers": transformers.__version__, "python": platform.python_version(), "commit": commit(),
    }  # fmt: skip


def publish(given: argparse.Namespace, title: str, rows: Sequence[Mapping[str, Any]], **extra: Any) -> None:
    """Print a table, a column a key of its rows, and write it with options, environment and `extra` to `given.out`."""
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row.values()))
    console = Console()
    Console(width=max(console.width, 16 * len(rows[0]))).print(table)
    if given.out is not None:
        chosen = {name: shown(value) for name, value in vars(given).items() if name not in ("out", "preset")}
        data = {"title": title, "environment": environment(), "options": chosen, "rows": rows, **extra}
        given.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(given.out, (json.dumps(data, indent=1, default=str) + "\n").encode())
        print(f"written to {given.out}")


def shown(value: Any) -> Any:
    """Return an option as it is recorded: of a folder its name, since its place is this machine's."""
    if isinstance(value, list):
        return [shown(one) for one in value]
    return Path(value).name if isinstance(value, str | Path) and Path(value).is_dir() and str(value) else value
