"""Evaluation: replay of full KV's traces, answers by real generation, the search for a budget, and their records."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from reasonkv.evaluate.job import (
    BudgetOptions,
    GenerateJob,
    Job,
    JobError,
    ReplayJob,
    Sampling,
    TraceSettings,
    TuneJob,
)

if TYPE_CHECKING:
    from reasonkv.evaluate.records import AnswerRecord, RecordError, ReplayRecord, read_answers, read_records
    from reasonkv.evaluate.table import read_results, summarize

__all__ = [
    "AnswerRecord",
    "BudgetOptions",
    "GenerateJob",
    "Job",
    "JobError",
    "RecordError",
    "ReplayJob",
    "ReplayRecord",
    "Sampling",
    "TraceSettings",
    "TuneJob",
    "read_answers",
    "read_records",
    "read_results",
    "summarize",
]

_HOMES = {
    "reasonkv.evaluate.records": ("AnswerRecord", "RecordError", "ReplayRecord", "read_answers", "read_records"),
    "reasonkv.evaluate.table": ("read_results", "summarize"),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module 'reasonkv.evaluate' has no attribute {name!r}")
