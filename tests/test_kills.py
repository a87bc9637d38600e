"""Killed three times at random moments, a run of twelve bounded cells leaves the records of an uninterrupted one."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
from processes import kill, run_job, start
from tiny import save_tiny

from reasonkv.evaluate.job import BudgetOptions, GenerateJob, ReplayJob, TraceSettings

METHODS = ("random", "streaming", "knorm", "keydiff")
BUDGETS = (16, 20, 24)
LIMIT, TOKENS = 6, 32
TOTAL = LIMIT * (1 + len(METHODS) * len(BUDGETS))
SHARED: dict[str, Any] = {
    "task": "program:lines=4", "methods": ("full", *METHODS), "limit": LIMIT, "batch_size": 3,
    "budget": BudgetOptions(tokens=BUDGETS, interval=8, sinks=2, recent=6, prompt="count"),
}  # fmt: skip
JOBS = {
    "evaluate": GenerateJob(max_new_tokens=TOKENS, **SHARED),
    "replay": ReplayJob(traces=TraceSettings(max_new_tokens=TOKENS), **SHARED),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("models") / "tiny"))


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
    job, whole, killed = JOBS[command], tmp_path / "whole", tmp_path / "killed"
    draw, path = random.Random(7), killed / "records.jsonl"
    for third in range(3):
        # some time after some number of records, so that kills fall into writing, into generating, and between cells
        wanted = draw.randrange(third * TOTAL // 4, (third + 1) * TOTAL // 4)
        delay = draw.uniform(0, 0.05)
        process = start(run_job, job, model, killed)
        while process.is_alive() and lines(path) < wanted:
            time.sleep(0.002)
        time.sleep(delay)
        kill(process, "the run")
        assert wanted <= lines(path) < TOTAL
    before = path.read_bytes()
    run_job(job, model, killed)
    assert path.read_bytes().startswith(before[: before.rfind(b"\n") + 1]), "finished records are kept"
    run_job(job, model, whole)
    assert len(canonical(path)) == TOTAL
    assert canonical(path) == canonical(whole / "records.jsonl")
