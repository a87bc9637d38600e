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
    from reasonkv.evaluate.answers import AnswerRecord, read_answers
    from reasonkv.evaluate.records import Record, RecordError, read_records
    from reasonkv.evaluate.results import Results, load_results

__all__ = [
    "AnswerRecord",
    "BudgetOptions",
    "GenerateJob",
    "Job",
    "JobError",
    "Record",
    "RecordError",
    "ReplayJob",
    "Results",
    "Sampling",
    "TraceSettings",
    "TuneJob",
    "load_results",
    "read_answers",
    "read_records",
]

_HOMES = {
    "reasonkv.evaluate.answers": ("AnswerRecord", "read_answers"),
    "reasonkv.evaluate.records": ("Record", "RecordError", "read_records"),
    "reasonkv.evaluate.results": ("Results", "load_results"),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module 'reasonkv.evaluate' has no attribute {name!r}")
