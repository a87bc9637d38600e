"""Evaluation: replay of full KV's traces, answers by real generation, the search for a budget, and their records.

Jobs are importable without torch; `reasonkv.evaluate.run.run` and `reasonkv.evaluate.tune.tune` carry them out.
"""

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

__all__ = [
    "BudgetOptions",
    "GenerateJob",
    "Job",
    "JobError",
    "ReplayJob",
    "Sampling",
    "TraceSettings",
    "TuneJob",
]
