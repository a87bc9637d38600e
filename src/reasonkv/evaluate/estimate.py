"""What a plan would take: tokens, bytes and hours, from the tasks' own prompts and a rate measured on the model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from reasonkv.evaluate.cells import make_budgets, make_methods
from reasonkv.evaluate.decoding import Request, write_full
from reasonkv.evaluate.generate import room
from reasonkv.evaluate.job import GenerateJob, ReplayJob
from reasonkv.evaluate.plan import Cell, Group, load_once
from reasonkv.evaluate.published import with_published
from reasonkv.evaluate.records import RECORDS, AnswerRecord, ReplayRecord, read_lines
from reasonkv.evaluate.run import FULL_LIMIT
from reasonkv.evaluate.traces import encode_prompts
from reasonkv.models import LoadedModel, one_thread_if_small
from reasonkv.schedule import bound
from reasonkv.tasks import get_task

MEASURED_PROMPT, MEASURED_STEPS = 256, 16
"""Tokens of the prompts, and decode steps, on which rates are measured."""


@dataclass(frozen=True)
class Rates:
    """How fast a model is with full KV, in tokens per second of a whole batch, and the bytes of a token's slots."""

    prompt: float
    decode: float
    bytes_per_token: float


@dataclass(frozen=True)
class Estimate:
    """What is left of a group."""

    cells: int  # that are not done
    prompt_tokens: int  # fed in one piece or in chunks: prompts, and the traces of replays
    output_tokens: int  # decoded one by one, at most
    bytes_peak: int  # of keys and values of the largest batch, at most
    seconds: float  # on one worker, at most
    rates: Rates


def measure_rates(model: LoadedModel, prompts: Sequence[Tensor]) -> Rates:
    """Measure a batch of prompts, cut to 256 tokens: once with one output token, once with 16 more."""
    short = [prompt_P[:MEASURED_PROMPT] for prompt_P in prompts]

    def seconds(limit: int) -> tuple[float, int, float]:
        began = time.perf_counter()
        found = write_full(model.model, [Request(one, limit) for one in short])
        stats = found[0].stats
        written = sum(len(one.tokens) for one in found)
        return time.perf_counter() - began, written, stats.bytes_full / stats.length

    with one_thread_if_small(model.model):
        seconds(1)  # warms up
        first, _, size = seconds(1)
        whole, written, _ = seconds(1 + MEASURED_STEPS)
    decoded = max(1, written - len(short))
    return Rates(sum(map(len, short)) / first, decoded / max(whole - first, 1e-9), size)


def estimate(group: Group) -> Estimate:
    """Return what is left of a group. Where full KV has finished, its outputs' lengths count instead of the limit.

    Raises:
        ReasonKVError: a task or the model cannot be had.
    """
    model = load_once(group.cells[0].source)
    rates: Rates | None = None
    prefilled = decoded = peak = left = 0
    by_task: dict[str, list[Tensor]] = {}
    for cell in group.cells:
        task = str(cell.job.task[0])
        if task not in by_task:
            own = get_task(task, cell.job.options).for_tokenizer(model.tokenizer)
            many = range(cell.job.limit if own.size is None else min(cell.job.limit, own.size))
            problems = [own.problem(example, seed=cell.job.seed) for example in many]
            by_task[task] = encode_prompts(model.model, model.tokenizer, own, problems, cell.job.options)
        prompts = by_task[task]
        rates = rates or measure_rates(model, prompts[: cell.job.batch_size])
        if cell.is_done:
            continue
        left += 1
        fed, written, slots = _tokens(cell, model, prompts)
        prefilled, decoded = prefilled + fed, decoded + written
        rows = min(cell.job.batch_size, len(prompts) * getattr(cell.job, "samples", 1))
        peak = max(peak, round(rows * slots * rates.bytes_per_token))
    assert rates is not None, "a group has full KV's cell at least"
    return Estimate(left, prefilled, decoded, peak, prefilled / rates.prompt + decoded / rates.decode, rates)


def _tokens(cell: Cell, model: LoadedModel, prompts: Sequence[Tensor]) -> tuple[int, int, int]:
    """Return the tokens a cell feeds at once and decodes one by one, and the slots its longest sequence needs."""
    job, longest = with_published(cell.job, model), max(map(len, prompts))
    limit = job.traces.max_new_tokens if isinstance(job, ReplayJob) else job.max_new_tokens
    lengths = _known_outputs(cell) or [room(model.model, len(one), limit or FULL_LIMIT) for one in prompts]
    written = round(sum(lengths) / len(lengths) * len(prompts))
    whole = longest + max(lengths)
    keeps_all = cell.full is None or make_methods(job)[-1].needs.selects
    slots = whole if keeps_all else bound(make_budgets(job.budget)[0], longest, whole)
    if job.budget.mean_slots:
        slots = min(whole, job.budget.mean_slots[0] + job.budget.interval)
    total = sum(map(len, prompts))
    if isinstance(job, GenerateJob):
        return total * job.samples, written * job.samples, slots
    if cell.full is None:  # the trace is written, then scored by full KV, then replayed
        return total + 2 * (total + written), written, slots
    return total + written, 0, slots


def _known_outputs(cell: Cell) -> list[int]:
    """Return the lengths of full KV's outputs, where its cell has finished."""
    path = (cell.full or cell.folder) / RECORDS
    kind = AnswerRecord if isinstance(cell.job, GenerateJob) else ReplayRecord
    return [one.output_tokens for one in read_lines(path, kind) if one.budget is None]
