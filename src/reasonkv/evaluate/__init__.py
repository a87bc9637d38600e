"""Evaluation: replay of full KV's traces, its records, and what they add up to."""

from reasonkv.evaluate.matching import mean_physical, tokens_for_mean
from reasonkv.evaluate.records import Record, RecordError, read_records
from reasonkv.evaluate.replay import Cell, ReplayError, replay_batch
from reasonkv.evaluate.runner import ReplayJob, run_replay
from reasonkv.evaluate.summary import summarize
from reasonkv.evaluate.traces import Trace, TraceError, TraceSettings

__all__ = [
    "Cell",
    "Record",
    "RecordError",
    "ReplayError",
    "ReplayJob",
    "Trace",
    "TraceError",
    "TraceSettings",
    "mean_physical",
    "read_records",
    "replay_batch",
    "run_replay",
    "summarize",
    "tokens_for_mean",
]
