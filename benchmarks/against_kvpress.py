"""Decode rates of kvpress's `DecodingPress` and of ours: same model, retained tokens, interval and batch, by turns.

kvpress needs an older transformers, so it gets a virtual environment of its own, made at the first run. Each side is a
process that decodes only when it is told to. Both hold `budget` slots after a compaction and compact `interval` tokens
later. One prompt is repeated for all rows. kvpress has no R-KV, CASK, TriAttention or VaSE.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from decoding import LARGE, SMALL, load, text_ids
from kvpress_worker import AFTER
from timing import by_turns, interval, median, publish, ratio, script

ROOT = Path(__file__).parent.parent
KVPRESS = "kvpress==0.5.5"
METHODS = ("random", "knorm", "keydiff", "snapkv", "expected")
FEW = ("random", "expected")


def environment_of_kvpress(folder: Path) -> Path:
    """Return the Python of a virtual environment with kvpress, made if it is not there.

    Raises:
        SystemExit: one sentence, if it cannot be made.
    """
    python, ready = folder / "bin" / "python", folder / ".ready"
    if ready.exists():
        return python
    torch = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    print(f"Making {folder.name} with {KVPRESS} and {torch}.", flush=True)
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-compile", KVPRESS, torch]
    for command in ([sys.executable, "-m", "venv", str(folder)], install):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise SystemExit(f"kvpress could not be installed: {reason}")
    ready.touch()
    return python


class Side:
    """A process that decodes one turn at a time.

    Args:
        name: "kvpress" or "reasonkv".
        python: its interpreter.
        model, dtype, threads: what it decodes with.
    """

    def __init__(self, name: str, python: str, model: str, dtype: str, threads: int) -> None:
        command = [python, str(Path(__file__).with_name("kvpress_worker.py")), name, model, dtype, str(threads)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.name, self.versions = name, self._answer()

    def __enter__(self) -> Side:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def measure(self, order: dict[str, Any]) -> dict[str, Any]:
        """Decode one turn: milliseconds of a step, of the compaction beside it, and tokens per second."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        found, at = self._answer(), order["first"] - 1
        ms = np.array(found["ms"])
        plain = np.delete(ms, [0, at])  # the first step touches new memory
        event = max(0.0, float(ms[at] - np.median(plain)))
        mean = float(np.median(plain)) + event / order["interval"]
        assert found["held"] == order["budget"] + AFTER, "both sides retain equally many tokens"
        return {"rate": 1e3 * order["batch"] / mean, "p50": float(np.median(plain)), "event": event}

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"The process of {self.name} ended early with code {self.process.wait()}.")
        return dict(json.loads(line))


def cell(
    given: argparse.Namespace, python: Path, name: str, methods: Sequence[str], batch: int, budget: int, first: int
) -> list[dict[str, Any]]:
    """Measure one model at one batch size: a row a method."""
    subject = load(name)
    if subject is None or subject.tokenizer is None:
        return []
    label, path, dtype = subject.name, subject.model.name_or_path, subject.dtype
    prompt = text_ids(subject.tokenizer, budget + given.interval - first)[0].tolist()
    del subject
    with ExitStack() as stack:
        sides = [
            stack.enter_context(Side(side, str(its), path, dtype, given.threads))
            for side, its in (("kvpress", python), ("reasonkv", sys.executable))
        ]
        shared = {"batch": batch, "budget": budget, "interval": given.interval, "first": first, "prompt": prompt}
        arms = {
            f"{side.name} {method}": partial(side.measure, {**shared, "method": method})
            for method in methods for side in sides
        }  # fmt: skip
        found = by_turns(arms, given.rounds, warm_up=0, seconds=given.seconds)
        versions = {side.name: side.versions["transformers"] for side in sides}
    rows = []
    for method in methods:
        theirs, ours = found[f"kvpress {method}"], found[f"reasonkv {method}"]
        rows.append({
            "model": f"{label} {dtype}", "batch": batch, "budget": budget, "method": method,
            "kvpress tokens/s": median(theirs["rate"]), "ours tokens/s": median(ours["rate"]),
            **interval(ratio(ours["rate"], theirs["rate"]), "ours over kvpress"),
            "kvpress step p50 ms": median(theirs["p50"]), "ours step p50 ms": median(ours["p50"]),
            "kvpress ms per compaction": median(theirs["event"]), "ours ms per compaction": median(ours["event"]),
            "rounds": len(ours["rate"]), "transformers": f"{versions['kvpress']}, {versions['reasonkv']}",
        })  # fmt: skip
    return rows


# first: the step that compacts; kvpress's SnapKV reads the hidden states of 64 steps before it
@script(
    small={"model": "testbed", "large": "", "methods": ["random"], "batch": 2, "budget": 32, "interval": 16,
           "first": 8, "rounds": 1},
    model=SMALL, methods=METHODS, batch=8, budget=256, first=70, interval=128, rounds=3, seconds=60.0,
    large=LARGE, large_methods=FEW, large_batch=32, large_budget=512, large_first=6, venv=".venv-kvpress",
)  # fmt: skip
def main(given: argparse.Namespace) -> None:
    began, python = time.monotonic(), environment_of_kvpress(ROOT / given.venv)
    rows = []
    for name, methods, batch, budget, first in (
        (given.model, given.methods, given.batch, given.budget, given.first),
        (given.large, given.large_methods, given.large_batch, given.large_budget, given.large_first),
    ):
        rows += cell(given, python, name, methods, batch, budget, first) if name else []
    if not rows:
        raise SystemExit("No model was there, so nothing was measured.")
    title = f"{KVPRESS} and reasonkv by turns, a compaction every {given.interval} tokens"
    publish(given, title, rows, seconds=time.monotonic() - began)
