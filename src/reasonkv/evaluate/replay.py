"""Replay: feed full KV's traces through a bounded cache and score every token it would have had to predict."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from reasonkv.budget import Budget
from reasonkv.calibration import Calibration
from reasonkv.errors import ReasonKVError
from reasonkv.evaluate.diagnostics import Diagnostics
from reasonkv.evaluate.metrics import NonFiniteError, TraceMetrics, TraceScore
from reasonkv.evaluate.pieces import MAX_PIECE, Row, feed
from reasonkv.evaluate.records import Record
from reasonkv.evaluate.reference import FullAttention
from reasonkv.evaluate.traces import Trace
from reasonkv.methods import Method
from reasonkv.runtimes.transformers import CompressedCache, RowStats


class ReplayError(ReasonKVError, RuntimeError):
    """A replay whose numbers cannot be trusted."""


@dataclass(frozen=True)
class Cell:
    """One method at one budget; the budget is None exactly for full KV."""

    method: Method
    budget: Budget | None

    @property
    def label(self) -> str:
        """For people: the method, and its tokens."""
        return self.method.spec() + (f" @ {self.budget.label}" if self.budget else "")


@dataclass(frozen=True)
class Replayed:
    """One trace's outcome.

    Args:
        metrics: means over output tokens.
        stats: the row's physical lengths, bytes and events, at the end.
        nll_T: float32, negative log-likelihood of every output token.
        seconds: wall-clock seconds of the batch divided by its rows.
        diagnostics: measures of what was lost, where asked for.
    """

    metrics: TraceMetrics
    stats: RowStats
    nll_T: torch.Tensor
    seconds: float
    diagnostics: dict[str, float] = field(default_factory=dict)


def replay_batch(
    model: PreTrainedModel,
    traces: Sequence[Trace],
    cell: Cell,
    *,
    seed: int = 0,
    chunked: bool = True,
    calibration: Calibration | None = None,
    diagnostics: bool = False,
) -> list[Replayed]:
    """Replay a batch of traces.

    A trace's row seed is its example number, so that methods that draw random numbers draw other ones for every
    trace, and the same ones whatever batch it is in.

    For a method that looks into the future, full KV's attention is collected from the same traces first; that time is
    not counted, while the method's use of it is.

    Args:
        model: the model that wrote the traces.
        traces: rows of the batch.
        cell: what to replay them through.
        seed: of methods that draw random numbers.
        chunked: feed in pieces that end where the schedule puts an event; False feeds token by token after the
            prompt, which gives the same numbers slowly.
        calibration: statistics of the model's queries, for methods that need them; looked up unless given.
        diagnostics: also measure what was lost, against full KV's attention over the trace; a bounded method then
            takes about twice as long.

    Raises:
        BudgetError: a prompt does not fit.
        UnsupportedModelError: the model's attention cannot be bounded.
        ReplayError: NaN or infinity came out.
    """
    rows = [Row(trace.prompt_P, trace.output_T) for trace in traces]
    diagnosed = diagnostics and cell.method.bounded
    future = FullAttention.collect(model, rows) if diagnosed or cell.method.needs.future else None
    observer = Diagnostics(future) if diagnosed and future is not None else None
    began = time.perf_counter()
    scores = [TraceScore() for _ in traces]
    with CompressedCache(
        model,
        cell.method,
        cell.budget,
        prompt_lengths=[len(row.prompt_P) for row in rows],
        seed=seed,
        row_seeds=[trace.example for trace in traces],
        max_length=max(row.fed for row in rows),
        reference=future,
        calibration=calibration,
        observer=observer,
    ) as cache:
        distances = cache.tokens_to_next_event
        for scored in feed(model, cache, rows, distances=distances, max_piece=MAX_PIECE if chunked else 1):
            trace, stop = traces[scored.row], scored.start + len(scored.logits_NV)
            reference = trace.reference.rows(scored.start, stop).to(scored.logits_NV.device)
            tokens_N = trace.output_T[scored.start : stop].to(scored.logits_NV.device)
            scores[scored.row].add(scored.logits_NV, tokens_N, reference)
        stats = cache.stats()
    seconds = (time.perf_counter() - began) / len(traces)
    measures: list[dict[str, float]] = observer.measures() if observer else [{} for _ in traces]
    outcomes = []
    for trace, score, row, found in zip(traces, scores, stats.rows, measures, strict=True):
        try:
            outcomes.append(Replayed(score.result(trace.answer_at), row, score.nll_N(), seconds, found))
        except NonFiniteError as error:
            raise ReplayError(
                f"Replaying example {trace.example} through {cell.label} failed because {error}; "
                f"try --dtype float32, or look for a defect of the method."
            ) from None
    return outcomes


def to_record(run: str, task: str, seed: int, cell: Cell, trace: Trace, outcome: Replayed) -> Record:
    """The record of one trace, one method and one budget."""
    metrics, stats = outcome.metrics, outcome.stats
    return Record(
        run=run,
        method=cell.method.name,
        options=cell.method.options(),
        budget=cell.budget.to_dict() if cell.budget else None,
        task=task,
        example=trace.example,
        seed=seed,
        prompt_tokens=len(trace.prompt_P),
        output_tokens=len(trace.output_T),
        trace_correct=trace.correct,
        top1=metrics.top1,
        top5=metrics.top5,
        nll=metrics.nll,
        kl=metrics.kl,
        first_mismatch=metrics.first_mismatch,
        answer_top1=metrics.answer_top1,
        physical_mean=float(stats.physical_mean),
        physical_peak=float(stats.physical_peak),
        physical_terminal=float(stats.physical_terminal),
        saved_ratio_terminal=1 - stats.physical_terminal / stats.length,
        bytes_held=int(stats.bytes_held),
        bytes_peak=int(stats.bytes_peak),
        bytes_full=int(stats.bytes_full),
        events=stats.events,
        tokens_dropped=stats.tokens_dropped,
        guards=dict(stats.fallbacks),
        seconds=round(outcome.seconds, 4),
        diagnostics={name: round(measure, 6) for name, measure in outcome.diagnostics.items()},
        slots_read_mean=stats.slots_read_mean,
        bytes_read_mean=stats.bytes_read_mean,
    )
