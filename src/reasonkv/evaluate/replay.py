"""Replay: feed full KV's traces through a bounded cache and score every token it would have had to predict."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedModel

from reasonkv.calibration import Calibration
from reasonkv.errors import ReasonKVError
from reasonkv.evaluate.cells import RunConfig
from reasonkv.evaluate.chunks import MAX_CHUNK, feed
from reasonkv.evaluate.decoding import OnTokens
from reasonkv.evaluate.diagnostics import Diagnostics
from reasonkv.evaluate.metrics import NonFiniteError, TraceMetrics, TraceScore
from reasonkv.evaluate.reference import FullAttention
from reasonkv.evaluate.traces import Trace
from reasonkv.numbers import KVDtype
from reasonkv.runtimes.transformers import CompressedCache, RowStats


class ReplayError(ReasonKVError, RuntimeError):
    """A replay whose numbers cannot be trusted."""


@dataclass(frozen=True)
class Replayed:
    """One trace's outcome."""

    metrics: TraceMetrics
    stats: RowStats
    seconds: float
    diagnostics: dict[str, float] = field(default_factory=dict)


def replay_batch(
    model: PreTrainedModel,
    traces: Sequence[Trace],
    config: RunConfig,
    *,
    seed: int = 0,
    chunked: bool = True,
    calibration: Calibration | None = None,
    diagnostics: bool = False,
    dtype: KVDtype | None = None,
    on_tokens: OnTokens = lambda count: None,
) -> list[Replayed]:
    """Replay a batch of traces.

    A trace's row seed is its example number, so that methods that draw random numbers draw other ones for every
    trace, and the same ones whatever batch it is in.

    For a method that looks into the future, full KV's attention is collected from the same traces first; that time is
    not counted, while the method's use of it is.

    Args:
        chunked: feed in chunks that end where the schedule compacts; False feeds token by token after the prompt, which
            gives the same numbers slowly.
        diagnostics: also measure what was lost, against full KV's attention over the trace; a bounded method then
            takes about twice as long.
        dtype: of the slots a bounded method keeps, as in `CompressedCache`.

    Raises:
        BudgetError: a prompt does not fit.
        UnsupportedModelError: the model's attention cannot be bounded.
        ReplayError: NaN or infinity came out.
    """
    rows = [trace.row for trace in traces]
    diagnosed = diagnostics and config.method.bounded
    future = FullAttention.collect(model, rows) if diagnosed or config.method.needs.future else None
    observer = Diagnostics(future) if diagnosed and future is not None else None
    began = time.perf_counter()
    scores = [TraceScore() for _ in traces]
    with CompressedCache(
        model,
        config.method,
        config.budget,
        prompt_lengths=[len(row.prompt_P) for row in rows],
        seed=seed,
        row_seeds=[trace.example for trace in traces],
        max_length=max(row.fed for row in rows),
        reference=future,
        calibration=calibration,
        observer=observer,
        dtype=dtype if config.budget is not None else None,
    ) as cache:
        distances = cache.tokens_to_next_event
        for scored in feed(model, cache, rows, distances=distances, max_piece=MAX_CHUNK if chunked else 1):
            trace, device = traces[scored.row], scored.logits_NV.device
            stop = scored.start + len(scored.logits_NV)
            tokens_N = trace.output_T[scored.start : stop].to(device)
            on_tokens(len(tokens_N))
            scores[scored.row].add(scored.logits_NV, tokens_N, trace.teacher.rows(scored.start, stop, device))
        stats = cache.stats()
    seconds = (time.perf_counter() - began) / len(traces)
    measures = observer.measures() if observer is not None else [{} for _ in traces]
    outcomes = []
    for trace, score, row, lost in zip(traces, scores, stats.rows, measures, strict=True):
        try:
            outcomes.append(Replayed(score.result(trace.answer_at), row, seconds, lost))
        except NonFiniteError as error:
            raise ReplayError(
                f"Replaying example {trace.example} through {config.label} failed because {error}; "
                f"try --dtype float32, or look for a defect of the method."
            ) from None
    return outcomes
