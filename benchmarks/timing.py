"""The harness of the timing scripts: options, rounds by turns, medians with intervals, a table and a JSON file."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
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
Main = Callable[[Sequence[str] | None], None]


def script(small: Mapping[str, Any], **defaults: Any) -> Callable[[Callable[[argparse.Namespace], None]], Main]:
    """Make a function of options the `main` of its module, and run it where the module is a script.

    There is a flag for each default, of its type; a tuple takes several words. `--threads`, `--small` and `--out`
    belong to every script. Without `--out`, the JSON file is `results/SCRIPT.json`; a small run writes none.

    Args:
        small: defaults of `--small`, a run of seconds that shows that the script works, and measures nothing.
        defaults: all others.
    """

    def wrap(function: Callable[[argparse.Namespace], None]) -> Main:
        module = sys.modules[function.__module__]

        def main(argv: Sequence[str] | None = None) -> None:
            parser = argparse.ArgumentParser(
                description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
            )
            parser.add_argument("--small", action="store_true", help="a run of seconds: shows that the script works")
            parser.add_argument("--out", type=Path, help="JSON file to write (default: results/SCRIPT.json)")
            for name, default in ({"threads": torch.get_num_threads()} | defaults).items():
                kind: dict[str, Any] = {"type": type(default), "default": default, "help": f"default: {default}"}
                if isinstance(default, bool):
                    kind = {"action": "store_true"}
                elif isinstance(default, tuple):
                    kind = {"nargs": "+", "default": list(default), "help": "several words"}
                parser.add_argument("--" + name.replace("_", "-"), **kind)
            if parser.parse_known_args(argv)[0].small:
                parser.set_defaults(**small)
            given = parser.parse_args(argv)
            if given.out is None and not given.small:
                given.out = RESULTS / f"{Path(str(module.__file__)).stem}.json"
            torch.set_num_threads(given.threads)
            function(given)

        if function.__module__ == "__main__":
            main()
        return main

    return wrap


def by_turns(
    arms: Mapping[str, Callable[[], Mapping[str, Any]]], rounds: int, warm_up: int = 1, seconds: float | None = None
) -> dict[str, Measures]:
    """Return what every arm measured in every round; arms take turns, so that a slow minute hits all alike.

    Args:
        arms: what to run, by name.
        rounds: that count.
        warm_up: rounds before them.
        seconds: no further round begins if it would probably end later than this; one that counts is always made.
    """
    found: dict[str, Measures] = {name: {} for name in arms}
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


def random_model(
    layers: int, query_heads: int, kv_heads: int, dtype: torch.dtype = torch.float32, **fields: Any
) -> transformers.PreTrainedModel:
    """Return a Qwen3 of random weights with heads of 128; `fields` are further ones of its configuration."""
    config = transformers.Qwen3Config(
        num_hidden_layers=layers, num_attention_heads=query_heads, num_key_value_heads=kv_heads, head_dim=128, **fields
    )
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


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
        chosen = {name: shown(value) for name, value in vars(given).items() if name not in ("out", "small")}
        data = {"title": title, "environment": environment(), "options": chosen, "rows": rows, **extra}
        given.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(given.out, (json.dumps(data, indent=1, default=str) + "\n").encode())
        print(f"written to {given.out}")


def shown(value: Any) -> Any:
    """Return an option as it is recorded: of a folder its name, since its place is this machine's."""
    if isinstance(value, list):
        return [shown(one) for one in value]
    return Path(value).name if isinstance(value, str | Path) and Path(value).is_dir() and str(value) else value


def interval(values: tuple[float, float, float], name: str = "median") -> dict[str, float]:
    """Return the columns of a median and its 95 % interval."""
    return dict(zip((name, "95 % low", "95 % high"), values, strict=True))
