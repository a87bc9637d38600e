"""Measure what every layer loses when it alone evicts, and with it the share of all slots that each should have.

A layer's share of the slots that are not protected is (its KL - full KV's) ** 0.6: of the powers 0.3, 0.6, 0.8 and 1
this lost least on other answers (docs/results/layers).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from transformers import PreTrainedModel

from reasonkv.budget import Budget
from reasonkv.calibration import Calibration, CalibrationError, find_calibration
from reasonkv.calibration.chosen import method_for
from reasonkv.evaluate.cells import RunConfig
from reasonkv.evaluate.chunks import TraceRow
from reasonkv.evaluate.job import Job
from reasonkv.evaluate.progress import Progress, silent
from reasonkv.evaluate.replay import replay_batch
from reasonkv.evaluate.traces import Trace, reference_logprobs
from reasonkv.layers import bounded_layers
from reasonkv.methods import get_method
from reasonkv.methods.base import protected_tokens
from reasonkv.models import LoadedModel
from reasonkv.numbers import CALIBRATED, layer_shares

J = TypeVar("J", bound=Job)
"""The same kind of job goes out as came in."""
POWER, LEAST = 0.6, 0.005
"""Of a layer's loss, and the least that is taken for it, relative to the largest."""
BUDGET = Budget(128, interval=64, recent=32)
"""Under which `add_shares` measures."""
_MOST_TEXTS = 16  # that are replayed, as often as there are layers
_BATCH = 8  # traces replayed at once


def add_shares(
    model: PreTrainedModel, rows: Sequence[TraceRow], calibration: Calibration, *, progress: Progress = silent
) -> Calibration:
    """Return a calibration with the layers' shares beside it, measured with the method that it makes the default.

    Args:
        rows: texts, each with its prompt, which is never evicted; of many, 16 that are spread over them.

    Raises:
        CalibrationError: no text is long enough (`long_enough`).
        UnsupportedModelError: a model that cannot be bounded.
        BudgetError: a model whose layers must be alike.
        ReplayError: numbers that cannot be trusted.
    """
    long = long_enough(rows)
    long = long[:: math.ceil(len(long) / _MOST_TEXTS)]
    traces = list[Trace]()
    for row in long:
        (teacher,) = reference_logprobs(model, [row.prompt_P], [row.output_T])
        traces.append(Trace(len(traces), row.prompt_P, row.output_T, teacher, None))
    layers = len(bounded_layers(model.config))
    arms: list[RunConfig] = [RunConfig(get_method("full"), None)]
    method, most = method_for(calibration), max(row.fed for row in long)
    arms += [RunConfig(method, alone(layer, layers, BUDGET, most, method.needs.recent)) for layer in range(layers)]
    kl = []
    for number, arm in enumerate(arms):
        progress("layers measured", number, len(arms))
        lost = losses(model, traces, arm, calibration)
        kl.append(sum(lost) / len(lost))
    progress("layers measured", len(arms), len(arms))
    return replace(calibration, layer_shares=shares_of(kl[0], kl[1:]))


def with_shares(job: J, model: LoadedModel) -> J:
    """Return a job with the shares of the model's calibration in place of the word "calibrated".

    Raises:
        CalibrationError: there are none.
    """
    if job.budget.layer_shares != CALIBRATED:
        return job
    found = find_calibration(model.model, model.calibration_file).shares()
    return replace(job, budget=replace(job.budget, layer_shares=found))


def long_enough(rows: Sequence[TraceRow]) -> list[TraceRow]:
    """Return the texts that go on for an interval after their first compaction.

    Raises:
        CalibrationError: there is none.
    """
    least = (BUDGET.tokens or 0) + 2 * BUDGET.interval
    long = [row for row in rows if len(row.output_T) > least]
    if not long:
        raise CalibrationError(
            f"The texts are too short to tell layers apart: they need more than {least} tokens beside the prompt."
        )
    return long


def losses(model: PreTrainedModel, traces: Sequence[Trace], config: RunConfig, calibration: Calibration) -> list[float]:
    """Return the KL of every trace from full KV, nats a token."""
    lost = []
    for first in range(0, len(traces), _BATCH):
        replayed = replay_batch(model, traces[first : first + _BATCH], config, calibration=calibration)
        lost += [one.metrics.kl for one in replayed]
    return lost


def alone(layer: int, layers: int, budget: Budget, most: int, recent: int = 0) -> Budget:
    """Return the budget with which one layer has the tokens of another budget, and the others are never full.

    Args:
        layer: the one that evicts.
        budget: of a number of tokens.
        most: tokens of the longest text, prompt included.
        recent: newest slots that the method itself always keeps.
    """
    assert budget.tokens is not None
    common = protected_tokens(budget, recent, 0)
    free = [budget.tokens - common if at == layer else most for at in range(layers)]
    sinks, newest = budget.protected()  # which shrank with its tokens, where they are the defaults
    shares = [one / 1000 for one in free]
    return replace(budget, tokens=common + sum(free) // layers, sinks=sinks, recent=newest, layer_shares=shares)


def shares_of(full: float, layers: Sequence[float]) -> str:
    """Return the shares of layers that alone lose so much, where full KV's replay loses `full` by rounding."""
    least = LEAST * max(max(layers) - full, 1e-9)
    sizes = [max(one - full, least) ** POWER for one in layers]
    return layer_shares([round(size * len(sizes) / sum(sizes), 3) for size in sizes])
