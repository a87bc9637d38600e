"""Killed three times at random moments, a run of twelve bounded cells leaves the records of an uninterrupted one."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import save_tiny

TASK = "program:lines=4"
METHODS = ("random", "streaming", "knorm", "keydiff")
BUDGETS = (16, 20, 24)
LIMIT, TOKENS = 6, 40
TOTAL = LIMIT * (1 + len(METHODS) * len(BUDGETS))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("models") / "tiny"))


SCRIPT = """
import sys
from pathlib import Path
from reasonkv.evaluate.job import BudgetOptions, GenerateJob, ReplayJob, TraceSettings
from reasonkv.evaluate.run import run
from reasonkv.models import load_model

shared = dict(
    task={task!r}, methods={methods!r}, limit={limit}, batch_size=2,
    budget=BudgetOptions(tokens={budgets!r}, interval=8, sinks=2, recent=6, prompt="count"),
)
jobs = {{
    "evaluate": GenerateJob(max_new_tokens={tokens}, **shared),
    "replay": ReplayJob(traces=TraceSettings(max_new_tokens={tokens}), **shared),
}}
run(jobs[sys.argv[1]], load_model(sys.argv[2]), Path(sys.argv[3]))
""".format(task=TASK, methods=("full", *METHODS), limit=LIMIT, budgets=BUDGETS, tokens=TOKENS)


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def canonical(path: Path) -> list[str]:
    """The file's lines without `seconds`, byte for byte, sorted."""
    found = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    for record in found:
        assert record.pop("seconds") >= 0
    return sorted(json.dumps(record) for record in found)


@pytest.mark.parametrize("command", ["evaluate", "replay"])
def test_three_random_kills_leave_the_records_of_an_uninterrupted_run(command: str, model: str, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    quiet = {"env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    start = [sys.executable, "-c", SCRIPT, command, model]
    draw, path = random.Random(7), killed / "records.jsonl"
    for third in range(3):
        # some time after some number of records, so that kills fall into writing, into generating, and between cells
        wanted = draw.randrange(third * TOTAL // 4, (third + 1) * TOTAL // 4)
        delay = draw.uniform(0, 0.2)
        process = subprocess.Popen([*start, str(killed)], **quiet)
        while process.poll() is None and lines(path) < wanted:
            time.sleep(0.002)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "the run must not have ended by itself"
        assert wanted <= lines(path) < TOTAL
    before = path.read_bytes()
    subprocess.run([*start, str(killed)], check=True, **quiet)
    assert path.read_bytes().startswith(before[: before.rfind(b"\n") + 1]), "finished records are kept"
    subprocess.run([*start, str(whole)], check=True, **quiet)
    assert len(canonical(path)) == TOTAL
    assert canonical(path) == canonical(whole / "records.jsonl")
