"""Results folders with made-up numbers, for the tests of the report: 5,000 records cannot be computed in a test."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from reasonkv.budget import Budget
from reasonkv.evaluate.manifest import MANIFEST, Manifest
from reasonkv.evaluate.records import RECORDS, AnswerRecord, ReplayRecord, append_records

TASKS = ("program", "search", "arithmetic", "recall", "longdoc")
METHODS = ("random", "streaming", "snapkv", "rkv", "keydiff", "knorm")
HOSTILE = "</script><img src=x onerror=alert(1)>"


def _common(task: str, method: str, tokens: int | None, example: int) -> dict[str, Any]:
    budget = None
    if tokens is not None:
        budget = {"tokens": tokens, "interval": 32, "sinks": 4, "recent": 16, "prompt": "on_top",
                  "trigger": "occupancy", "trigger_counts": "all", "cut_prompt": "prefill", "prefill_chunk": None}  # fmt: skip
    held = 2_000_000 if tokens is None else 1000 * tokens
    return {
        "run": "r", "method": method, "options": {}, "budget": budget, "task": task, "example": example, "seed": 0,
        "prompt_tokens": 300, "output_tokens": 800, "physical_mean": float(tokens or 700), "physical_peak": 900.0,
        "physical_terminal": 400.0, "saved_ratio_terminal": 0.5, "bytes_held": held, "bytes_peak": held,
        "bytes_full": 2_000_000, "events": 0 if tokens in (None, 1024) else 20, "tokens_dropped": 500,
        "seconds": 0.1, "guards": {},
    }  # fmt: skip


def make_record(task: str, method: str, tokens: int | None, example: int, dice: random.Random) -> ReplayRecord:
    top1 = 1.0 if tokens is None else 1 - dice.random() * 20 / tokens
    return ReplayRecord(**_common(task, method, tokens, example), trace_correct=True, top1=top1, top5=1.0, nll=0.1 + 1 - top1,
                  kl=1 - top1, first_mismatch=None if tokens is None else 7,
                  answer_top1=None if example % 2 else top1)  # fmt: skip


def make_answer(task: str, method: str, tokens: int | None, example: int, dice: random.Random) -> AnswerRecord:
    guards = {} if tokens is None else {"merge_inactive": 1}
    return AnswerRecord(**(_common(task, method, tokens, example) | {"guards": guards}), sample=0, correct=tokens is None or dice.random() < 0.8,
                        truncated=False, repetition=0.0, first_divergence=None, output=f"{HOSTILE} {example}")  # fmt: skip


def record(example: int = 0, **changes: Any) -> ReplayRecord:
    """A record of snapkv at 128 slots, the prompt inside the budget."""
    values: dict[str, Any] = {
        "run": "0123456789ab", "method": "snapkv", "options": {"window": 16}, "task": "program", "example": example,
        "budget": Budget(128, prompt="count").to_dict(), "seed": 0, "prompt_tokens": 90, "output_tokens": 800,
        "trace_correct": True, "top1": 0.75, "top5": 0.9, "nll": 0.3, "kl": 1e-9, "first_mismatch": None,
        "physical_mean": 170.25, "physical_peak": 255.0, "physical_terminal": 200.0, "saved_ratio_terminal": 0.8,
        "bytes_held": 10, "bytes_peak": 12, "bytes_full": 100, "events": 5, "tokens_dropped": 640, "guards": {},
        "seconds": 0.5,
    }  # fmt: skip
    return ReplayRecord(**(values | changes))


def write_folder(path: Path, records: Any, command: str = "replay", model: str = "0123", **arguments: Any) -> Path:
    """A results folder that holds these records."""
    path.mkdir()
    named = {"name": "testbed", "hash": model}
    Manifest(command=command, arguments=arguments, model=named, device="CPU").write(path / MANIFEST)
    append_records(path / RECORDS, records)
    return path


def make_folder(path: Path, command: str, make: Any, tasks: Any, methods: Any, budgets: Any, limit: int) -> Path:
    """A results folder with full KV, and every method at every budget."""
    dice = random.Random(0)
    cells = [("full", None), *((method, tokens) for method in methods for tokens in budgets)]
    records = [make(task, *cell, example, dice) for task in tasks for cell in cells for example in range(limit)]
    arguments = {"task": list(tasks), "methods": ["full", *methods], "limit": limit, "seed": 0}
    return write_folder(path, records, command, **arguments)
