"""Evaluation: replay of full KV's traces, answers by real generation, and what their records add up to."""

from reasonkv.evaluate.accuracy import summarize_answers
from reasonkv.evaluate.answers import AnswerRecord, read_answers
from reasonkv.evaluate.evaluator import EvaluateJob, run_evaluate
from reasonkv.evaluate.matching import mean_physical, tokens_for_mean
from reasonkv.evaluate.records import Record, RecordError, read_records
from reasonkv.evaluate.replay import Cell, ReplayError, replay_batch
from reasonkv.evaluate.results import Results, load_results
from reasonkv.evaluate.runner import ReplayJob, run_replay
from reasonkv.evaluate.summary import summarize
from reasonkv.evaluate.traces import Trace, TraceError, TraceSettings

__all__ = [
    "AnswerRecord",
    "Cell",
    "EvaluateJob",
    "Record",
    "RecordError",
    "ReplayError",
    "ReplayJob",
    "Results",
    "Trace",
    "TraceError",
    "TraceSettings",
    "load_results",
    "mean_physical",
    "read_answers",
    "read_records",
    "replay_batch",
    "run_evaluate",
    "run_replay",
    "summarize",
    "summarize_answers",
    "tokens_for_mean",
]
