"""What the scripts about decoding share: models, prompts, caches of any length, and steps on the clock."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase, StaticCache

from reasonkv import Budget, CompressedCache, get_method
from reasonkv.calibration import Calibration
from reasonkv.calibration.job import CalibrateJob
from reasonkv.calibration.run import run as calibrate
from reasonkv.evaluate.fitting import add_forecast
from reasonkv.floor import compaction, decode_step, measure_rates, prompt_tokens, shape_of
from reasonkv.models import ModelError, load_model
from reasonkv.runtimes.transformers.attention import LogitRule
from reasonkv.tasks import get_task

SMALL, LARGE = "Qwen/Qwen2.5-Coder-0.5B-Instruct", "Qwen/Qwen2.5-Coder-1.5B-Instruct"
CHUNK = 4096
"""Tokens that are written at once, where no model runs."""
WARM_UP = 2
"""Steps before the timed ones: the first of a new cache touches memory that nobody touched before."""


@dataclass(frozen=True)
class Subject:
    """A model to measure, with its tokenizer unless its weights are random."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def dtype(self) -> str:
        """Of the weights."""
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def token_bytes(self) -> int:
        """Bytes of a token's keys and values in all layers."""
        layers = plain(self.model, "stock", 1, 8).layers
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers) // 8


class Floor:
    """The time that a model's decode steps and prompts cannot go below on this machine (`reasonkv.floor`)."""

    def __init__(self, subject: Subject) -> None:
        self.dtype, self.shape = subject.model.dtype, shape_of(subject.model.config)
        self.rates = measure_rates(self.dtype)

    def step_ms(self, batch: int, slots: float, budget: Budget | None = None) -> float:
        """Return milliseconds of a decode step; with a budget, its part of a compaction included."""
        seconds = decode_step(self.shape, batch, slots, self.dtype).seconds(self.rates)
        if budget is not None and budget.tokens is not None:
            held = budget.tokens + budget.interval
            moved = compaction(self.shape, batch, held, budget.tokens, self.dtype)
            seconds += moved.seconds(self.rates) / budget.interval
        return 1e3 * seconds

    def bounded_ms(self, batch: int, budget: Budget) -> float:
        """Return mean milliseconds of a step of a cache that stays within a budget."""
        assert budget.tokens is not None
        return self.step_ms(batch, budget.tokens + budget.interval / 2, budget)

    def prompt_seconds(self, batch: int, tokens: int) -> float:
        """Return seconds of feeding so many tokens of every row at once."""
        return prompt_tokens(self.shape, batch, tokens, 0, self.dtype).seconds(self.rates)


def load(name: str) -> Subject | None:
    """Load a model, in bfloat16 where the CPU multiplies in it; None, and one sentence, where it is not there."""
    try:
        loaded = load_model(name)
    except ModelError as error:
        print(f"Without {name}: {error}", flush=True)
        return None
    return Subject(Path(name).name, loaded.model, loaded.tokenizer)


def text_ids(tokenizer: PreTrainedTokenizerBase, tokens: int) -> Tensor:
    """Return int64 ids [1, tokens] of generated problems and their reference traces."""
    task, ids, example = get_task("program"), list[int](), 0
    while len(ids) < tokens:
        problem = task.problem(example)
        ids += tokenizer(f"{problem.prompt} {problem.trace}\n", add_special_tokens=False)["input_ids"]
        example += 1
    return torch.tensor([ids[:tokens]])


def calibration_of(subject: Subject, methods: Sequence[str], limit: int = 2) -> Calibration | None:
    """Return statistics from a few prompts, if a method asks for any, as `reasonkv calibrate --forecast` makes them."""
    if not any(get_method(method).needs.calibration for method in methods):
        return None
    assert subject.tokenizer is not None
    job = CalibrateJob(task=["program:lines=24"], limit=limit, forecast="forecast" in methods)
    tasks = [get_task(spec) for spec in job.task]
    found = calibrate(job, subject.model, subject.tokenizer, tasks=tasks)
    return add_forecast(job, subject.model, subject.tokenizer, found, tasks=tasks)[0] if job.forecast else found


@torch.no_grad()
def fill(cache: Cache, model: PreTrainedModel, batch: int, tokens: int, mask_BL: Tensor | None = None) -> Cache:
    """Write random keys and values of so many tokens to all layers, equal in all rows; nothing else of a model runs.

    A `CompressedCache` is announced a forward and gets queries, and compacts where its schedule says.
    """
    config = model.config
    heads, dim = config.num_attention_heads, getattr(config, "head_dim", None)
    dim = dim or config.hidden_size // heads
    ours = isinstance(cache, CompressedCache)
    if ours:
        cache.token_ids.announced = torch.zeros(batch, tokens, dtype=torch.int64)
        cache.begin_forward(batch, tokens, mask_BL)
    for index, layer in enumerate(model.get_decoder().layers):
        pair = torch.randn(2, 1, config.num_key_value_heads, tokens, dim, dtype=model.dtype)
        keys, values = pair.expand(2, batch, -1, -1, -1)
        cache.update(keys, values, index)
        if ours:
            queries = torch.randn(1, heads, tokens, dim, dtype=model.dtype).expand(batch, -1, -1, -1)
            cache.layers[index].after_attention(queries, LogitRule(dim**-0.5), layer.self_attn)
    return cache


def ragged_mask(batch: int, tokens: int) -> Tensor:
    """Return a mask [B, L] of left pads: rows of all lengths from the whole down to half of it."""
    pads_B1 = torch.arange(batch)[:, None] * tokens // max(1, 2 * batch - 2)
    return (torch.arange(tokens) >= pads_B1).long()


def plain(
    model: PreTrainedModel, kind: str, batch: int, tokens: int, mask_BL: Tensor | None = None, room: int = 64
) -> Cache:
    """Return a cache that holds every token: "stock" (dynamic), "static" (as large as tokens + room), or "full"."""
    if kind == "static":
        cache: Cache = StaticCache(config=model.config, max_cache_len=tokens + room)
    else:
        cache = CompressedCache(model, "full") if kind == "full" else DynamicCache(config=model.config)
    return fill(cache, model, batch, tokens, mask_BL)


@torch.no_grad()
def step_ms(
    model: PreTrainedModel, cache: Cache, batch: int, steps: int, warm_up: int = WARM_UP,
    most_ms: float = float("inf"), mask_BL: Tensor | None = None,
) -> list[float]:  # fmt: skip
    """Decode greedily and return the milliseconds of every step after the first `warm_up`.

    After the third of them, and once they took `most_ms` together, no further one is made: long steps vary little.
    """
    ids, taken = torch.full((batch, 1), 9), list[float]()
    while len(taken) < warm_up + steps and (len(taken) < warm_up + 3 or sum(taken[warm_up:]) < most_ms):
        mask_BL = None if mask_BL is None else torch.nn.functional.pad(mask_BL, (0, 1), value=1)
        start = time.perf_counter()
        ids = (
            model(ids, attention_mask=mask_BL, past_key_values=cache, use_cache=True)
            .logits[:, -1]
            .argmax(-1, keepdim=True)
        )
        taken.append(1e3 * (time.perf_counter() - start))
    if isinstance(cache, CompressedCache):
        cache.detach()
    return taken[warm_up:]


@dataclass(frozen=True)
class Steady:
    """Steps of a bounded cache in the middle of a long generation.

    Args:
        plain_ms: of steps without a compaction: after one, and before the next.
        event_ms: of steps with one.
        compaction_ms: of it the cache's own work.
        kv_bytes: of keys, values and all that stands beside them.
        interval: steps from one compaction of a layer to its next.
        turns: compactions in it, each of some of the layers.
    """

    plain_ms: list[float]
    event_ms: list[float]
    compaction_ms: list[float]
    kv_bytes: int
    interval: int
    turns: int = 1

    @property
    def mean_ms(self) -> float:
        """Of a step, its part of the compactions included."""
        return float(np.median(self.plain_ms)) + self.turns * float(np.median(self.compaction_ms)) / self.interval

    @property
    def share(self) -> float:
        """Compactions' part of the time, in percent."""
        return 100 * (1 - float(np.median(self.plain_ms)) / self.mean_ms)

    def percentile(self, percent: float) -> float:
        """Return a percentile of the steps of a generation, `turns` of `interval` of which compact."""
        every = np.array([*self.plain_ms, *self.event_ms])
        counts = [len(self.plain_ms), len(self.event_ms)]
        weight = np.repeat([(self.interval - self.turns) / counts[0], self.turns / counts[1]], counts)
        order = np.argsort(every)
        reached = np.cumsum(weight[order]) / self.interval
        return float(every[order][np.searchsorted(reached, percent / 100 - 1e-9)])

    def __add__(self, other: Steady) -> Steady:
        """Both."""
        lists = (self.plain_ms + other.plain_ms, self.event_ms + other.event_ms)
        ends = (other.kv_bytes, self.interval, self.turns)
        return Steady(*lists, self.compaction_ms + other.compaction_ms, *ends)


class Bounded:
    """A bounded cache in the middle of a long generation: just after a compaction, and just before the next one.

    One row is prefilled by the model with twice the budget, which compacts it; the other rows are its copies. With a
    `length`, or without a tokenizer, random keys and values are written instead of it, and compacted on the way.

    Args:
        subject, method, budget, calibration: what decodes.
        steps: timed steps on each side of a compaction.
        length: logical length at the first compaction, instead of twice the budget.
    """

    def __init__(
        self, subject: Subject, method: str, budget: Budget, calibration: Calibration | None = None, *, steps: int,
        length: int | None = None,
    ) -> None:  # fmt: skip
        assert budget.tokens is not None
        turn = budget.interval // budget.stagger
        self.model, self.budget, self.steps = subject.model, budget, min(steps, (turn - 2) // 2 - WARM_UP)
        prompt, tokenizer = length or 2 * budget.tokens, None if length else subject.tokenizer
        ids = None if tokenizer is None else text_ids(tokenizer, prompt + budget.interval)
        self.after = CompressedCache(
            self.model, method, replace(budget, prefill_chunk=None if tokenizer else CHUNK), prompt_lengths=prompt,
            calibration=calibration if get_method(method).needs.calibration else None,
        )  # fmt: skip
        for start in range(0, prompt, prompt if tokenizer else CHUNK):
            self._feed(self.after, ids, start, prompt if tokenizer else min(prompt, start + CHUNK))
        self.before = copy.deepcopy(self.after)
        (left,) = self.before.tokens_to_next_event()
        assert left == turn
        self._feed(self.before, ids, prompt, prompt + left - WARM_UP - self.steps)
        self.after.detach()
        self.before.detach()

    def _feed(self, cache: CompressedCache, ids: Tensor | None, start: int, stop: int) -> None:
        if ids is None:
            fill(cache, self.model, 1, stop - start)
        else:
            with torch.no_grad():
                self.model(ids[:, start:stop], past_key_values=cache, logits_to_keep=1)

    def measure(self, batch: int) -> Steady:
        """Time steps after a compaction, and before and at one."""
        after, before = copy.deepcopy(self.after), copy.deepcopy(self.before)
        found = []
        for cache in (after, before):
            cache.batch_repeat_interleave(batch)
            found.append(step_ms(self.model, cache, batch, self.steps))
        inside = 1e3 * (before.compaction_seconds - self.before.compaction_seconds)
        assert inside > 0 and before.stats().rows[0].events == self.before.stats().rows[0].events + 1
        stats = before.stats()
        *rest, last = found[1]
        held = stats.bytes_allocated + stats.bytes_beside
        return Steady(found[0] + rest, [last], [inside], held, self.budget.interval, self.budget.stagger)


def run_seconds(lengths: Sequence[int], ms: Sequence[float], first: int, tokens: int) -> float:
    """Return the seconds of decoding `tokens` tokens from length `first` on, a step's time linear between lengths.

    Beyond the lengths that were measured, the nearest piece goes on.
    """
    at = np.arange(first, first + tokens)
    piece = np.clip(np.searchsorted(lengths, at) - 1, 0, len(lengths) - 2)
    x, y = np.asarray(lengths, dtype=float), np.asarray(ms)
    slope = (y[piece + 1] - y[piece]) / (x[piece + 1] - x[piece])
    return float((y[piece] + slope * (at - x[piece])).sum() / 1e3)
