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
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
from decoding import load, text_ids
from kvpress_worker import AFTER
from timing import Found, Row, by_turns, interval, median, ratio, script

ROOT = Path(__file__).parent.parent
KVPRESS = "kvpress==0.5.5"


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
        words: model, dtype and threads: what it decodes with.
    """

    def __init__(self, name: str, python: str, *words: str) -> None:
        command = [python, str(Path(__file__).with_name("kvpress_worker.py")), name, *words]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, text=True, **pipes)
        self.name, self.transformers = name, self._answer()["transformers"]

    def measure(self, order: Row) -> dict[str, float]:
        """Decode one turn: milliseconds of a step, of the compaction beside it, and tokens per second."""
        assert self.process.stdin is not None
        print(json.dumps(order), file=self.process.stdin, flush=True)
        found, at = self._answer(), order["first"] - 1
        assert found["held"] == order["budget"] + AFTER, "both sides retain equally many tokens"
        ms = np.array(found["ms"])
        middle = median(np.delete(ms, [0, at]))  # the first step touches new memory
        event = max(0.0, float(ms[at]) - middle)
        return {"rate": 1e3 * order["batch"] / (middle + event / order["interval"]), "p50": middle, "event": event}

    def _answer(self) -> Row:
        assert self.process.stdout is not None
        if line := self.process.stdout.readline():
            return dict(json.loads(line))
        raise SystemExit(f"The process of {self.name} ended early with code {self.process.wait()}.")


def cell(
    given: argparse.Namespace, python: Path, name: str, methods: Sequence[str], batch: int, budget: int, first: int
) -> list[Row]:
    """Measure one model at one batch size: a row a method."""
    subject = load(name)
    if subject is None or subject.tokenizer is None:
        return []
    label, path, dtype = subject.name, subject.model.name_or_path, subject.dtype
    order = {"batch": batch, "budget": budget, "interval": given.interval, "first": first,
             "prompt": text_ids(subject.tokenizer, budget + given.interval - first)[0].tolist()}  # fmt: skip
    del subject
    pythons = {"kvpress": str(python), "reasonkv": sys.executable}
    with ExitStack() as stack:
        sides = {name: Side(name, its, path, dtype, str(given.threads)) for name, its in pythons.items()}
        for side in sides.values():
            stack.enter_context(side.process)  # ends, once its input does
        arms = {(name, method): partial(side.measure, order | {"method": method})
                for method in methods for name, side in sides.items()}  # fmt: skip
        found = by_turns(arms, given.rounds, seconds=given.seconds)
    rows = []
    for method in methods:
        theirs, ours = found["kvpress", method], found["reasonkv", method]
        rows.append({
            "model": f"{label} {dtype}", "batch": batch, "budget": budget, "method": method,
            "kvpress tokens/s": median(theirs["rate"]), "ours tokens/s": median(ours["rate"]),
            **interval(ratio(ours["rate"], theirs["rate"]), "ours over kvpress"),
            "kvpress step p50 ms": median(theirs["p50"]), "ours step p50 ms": median(ours["p50"]),
            "kvpress ms per compaction": median(theirs["event"]), "ours ms per compaction": median(ours["event"]),
            "rounds": len(ours["rate"]), "transformers": ", ".join(side.transformers for side in sides.values()),
        })  # fmt: skip
    return rows


@script
def main(given: argparse.Namespace) -> Found:
    python, rows = environment_of_kvpress(ROOT / given.venv), []
    for name, methods, batch, budget, first in (
        (given.model, given.methods, given.batch, given.budget, given.first),
        (given.large, given.large_methods, given.large_batch, given.large_budget, given.large_first),
    ):
        rows += cell(given, python, name, methods, batch, budget, first) if name else []
    if rows:
        title = f"{KVPRESS} and reasonkv by turns, a compaction every {given.interval} tokens"
        yield {"title": title, "rows": rows}
