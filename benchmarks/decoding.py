"""What the timing scripts share: models, prompts, caches of any length, and steps on the clock."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timing import milliseconds
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
    StaticCache,
)
from transformers.initialization import no_init_weights

from reasonkv import Budget, CompressedCache, get_method
from reasonkv.calibration import Calibration
from reasonkv.floor import compaction, decode_step, measure_rates, prompt_tokens, shape_of
from reasonkv.models import ModelError, load_model
from reasonkv.rotary import Rotary
from reasonkv.runtimes.transformers.attention import LogitRule
from reasonkv.tasks import get_task

CHUNK = 4096
"""Tokens that are written at once, where no model runs."""
WARM_UP = 2
"""Steps before the timed ones: the first of a new cache touches memory that nobody touched before."""
SHAPES = {
    name: {"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads, "head_dim": 128,
           "num_key_value_heads": kv_heads, "intermediate_size": inner,
           "vocab_size": vocab, "max_position_embeddings": 2**18, "tie_word_embeddings": False, "rope_theta": 1e6}
    for name, layers, hidden, heads, kv_heads, inner, vocab in (
        ("Qwen3-8B", 36, 4096, 32, 8, 12288, 151936), ("Qwen3-14B", 40, 5120, 40, 8, 17408, 151936),
        ("tiny", 2, 64, 4, 2, 128, 512),
    )
}  # fmt: skip
"""Published shapes by name, and one that a CPU runs in no time."""
Piece = tuple[Tensor, Tensor, Tensor]
"""Keys, values and queries of some tokens of a layer."""


def random_model(
    shape: str = "Qwen3-8B", dtype: torch.dtype = torch.bfloat16, device: str = "cpu", **fields: Any
) -> PreTrainedModel:
    """Return a model of a shape with random weights; `fields` are those of its configuration that differ."""
    config = Qwen3Config(**SHAPES[shape] | fields, dtype=dtype)
    with no_init_weights(), torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02) if parameter.ndim > 1 else parameter.data.fill_(1.0)
    return model


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

    def prompt_seconds(self, batch: int, tokens: int, before: int = 0) -> float:
        """Return seconds of feeding so many tokens of every row at once, beside so many slots of earlier ones."""
        return prompt_tokens(self.shape, batch, tokens, before, self.dtype).seconds(self.rates)


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


def pieces_of(model: PreTrainedModel, batch: int, tokens: int, start: int = 0) -> list[Piece]:
    """Return keys, values and queries of random tokens, equal in all rows; keys drift and are rotated."""
    config, device = model.config, model.device
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    rotary, found = Rotary.from_config(config), list[Piece]()
    positions_N = torch.arange(start, start + tokens)
    for _ in range(config.num_hidden_layers):
        drift = torch.randn(kv_heads, tokens, dim).cumsum_(1).div_(max(tokens, 1024) ** 0.5)
        drift += torch.randn(kv_heads, 1, dim) + 0.3 * torch.randn(kv_heads, tokens, dim)
        every = (rotary.rotate(drift, positions_N), torch.randn_like(drift), torch.randn(heads, tokens, dim))
        found.append(tuple(one.to(device, model.dtype)[None].expand(batch, -1, -1, -1) for one in every))  # type: ignore[arg-type]
    return found


def feed(
    cache: Cache, model: PreTrainedModel, pieces: Sequence[Piece], mask_BL: Tensor | None = None,
    module: nn.Module | None = None,
) -> None:  # fmt: skip
    """Write tokens to all layers of a cache as a forward does; nothing else of a model runs.

    A `CompressedCache` is announced the forward and gets queries, and compacts where its schedule says. It is shown
    `module` instead of the model's attention modules, if there is one.
    """
    ours, (batch, _, tokens, dim) = isinstance(cache, CompressedCache), pieces[0][0].shape
    if ours:
        cache.token_ids.announced = torch.zeros(batch, tokens, dtype=torch.int64, device=model.device)
        cache.begin_forward(batch, tokens, mask_BL)
    for index, (layer, (keys, values, queries)) in enumerate(zip(model.get_decoder().layers, pieces, strict=True)):
        cache.update(keys, values, index)
        if ours:
            cache.layers[index].after_attention(queries, LogitRule(dim**-0.5), module or layer.self_attn)


@torch.no_grad()
def fill(cache: Cache, model: PreTrainedModel, batch: int, tokens: int, mask_BL: Tensor | None = None) -> Cache:
    """Feed random tokens, so many at once as a chunk has, and return the cache."""
    for start in range(0, tokens, CHUNK):
        end = min(tokens, start + CHUNK)
        feed(cache, model, pieces_of(model, batch, end - start, start), None if mask_BL is None else mask_BL[:, :end])
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
    ids, taken = torch.full((batch, 1), 9, device=model.device), list[float]()

    def step() -> None:
        nonlocal ids
        out = model(ids, attention_mask=mask_BL, past_key_values=cache, use_cache=True)
        ids = out.logits[:, -1].argmax(-1, keepdim=True)
        if ids.is_cuda:
            torch.cuda.synchronize()

    while len(taken) < warm_up + steps and (len(taken) < warm_up + 3 or sum(taken[warm_up:]) < most_ms):
        mask_BL = None if mask_BL is None else nn.functional.pad(mask_BL, (0, 1), value=1)
        taken.append(milliseconds(step))
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
        self._feed(self.after, ids, 0, prompt)
        self.before = copy.deepcopy(self.after)
        (left,) = self.before.tokens_to_next_event()
        assert left == turn
        self._feed(self.before, ids, prompt, prompt + left - WARM_UP - self.steps)
        self.after.detach()
        self.before.detach()

    @torch.no_grad()
    def _feed(self, cache: CompressedCache, ids: Tensor | None, start: int, stop: int) -> None:
        if ids is None:
            fill(cache, self.model, 1, stop - start)
        else:
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
        (*rest, last), held = found[1], stats.bytes_allocated + stats.bytes_beside
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
