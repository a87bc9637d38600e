"""Milliseconds of one compaction of every method at Qwen3-8B geometry, beside what it cannot do without.

36 layers, 32 query and 8 KV heads of 128, 1,152 -> 1,024 slots, one row. A compaction is everything the cache does:
views, scores, choice, check, gather, merge, write back. Caches are fed keys, values and queries directly, no model
runs; keys drift and are rotated as a model's are. The compaction before the timed ones is not timed, so slots, sums and
norms that methods carry along stand as they do in the middle of a long generation. Every layer has its own memory, and
256 MiB are written before each, so nothing is warm in the caches.

The cost is divided by the largest of: the time to read the layers' keys and values once; the products of the method's
formula over the rate of a matrix product; its exponentials, logarithms and roots over the rate of `exp`; all three
measured in the same run. `FORMULAS` says what was counted.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from timing import interval, median, median_interval, publish, random_model, script
from torch import Tensor, nn
from transformers import PreTrainedModel

from reasonkv import Budget, CompressedCache, get_method
from reasonkv.budget import Window
from reasonkv.calibration import Calibration
from reasonkv.methods import Method, method_names
from reasonkv.rotary import Rotary
from reasonkv.runtimes.transformers.attention import LogitRule

QUERY_HEADS, KV_HEADS, D, WIDTH = 32, 8, 128, 4096
HELD, KEEP = 1152, 1024
FLUSH = 64 * 2**20
FURTHER = (
    "rkv:variant=port", "cask:fold=neighbours", "cask:per_layer=true", "triattention:mode=global",
    "expected:covariance=full",
)  # fmt: skip


@dataclass(frozen=True)
class Formula:
    """What a method's formula takes for one layer: multiply-adds count 2; elements are exponentials, logarithms, roots.

    Args:
        flops: products and sums.
        elements: elements that a special function is taken of.
        quadratic: the formula compares all slots with each other, or a window's with each other.
    """

    flops: float
    elements: float = 0.0
    quadratic: bool = False

    def __add__(self, other: Formula) -> Formula:
        """Both."""
        return Formula(self.flops + other.flops, self.elements + other.elements, self.quadratic or other.quadratic)


def attention(queries: int, slots: int = HELD) -> Formula:
    """Logits of that many queries of every query head, and their softmax."""
    return Formula(2 * QUERY_HEADS * queries * slots * D, QUERY_HEADS * queries * slots)


ONCE = Formula(2 * KV_HEADS * HELD * D)
"""One product per entry of all keys, or of all values."""
PER_QUERY_HEAD = Formula(2 * QUERY_HEADS * HELD * D)
FREQUENCY = PER_QUERY_HEAD + Formula(QUERY_HEADS * HELD * D, KV_HEADS * HELD * D / 2)  # moduli are roots
FORMULAS = {
    "streaming": Formula(0),
    "random": Formula(0),
    "random-attention": Formula(0),
    "knorm": ONCE,
    "keydiff": ONCE + ONCE,
    "snapkv": attention(64),
    "adakv": attention(64),
    "pyramidkv": attention(64),
    "chunkkv": attention(64),
    "rkv": attention(8) + Formula(2 * KV_HEADS * HELD * HELD * D, quadratic=True),
    "rkv:variant=port": attention(64) + ONCE + ONCE,
    "triattention": FREQUENCY,
    "expected": PER_QUERY_HEAD + PER_QUERY_HEAD + Formula(QUERY_HEADS * HELD * D, QUERY_HEADS * HELD) + ONCE,
    "expected:covariance=full": PER_QUERY_HEAD + Formula(2 * QUERY_HEADS * HELD * D * D, QUERY_HEADS * HELD) + ONCE,
    "cask": FREQUENCY + ONCE + ONCE,
    "vase-attnv": attention(64) + Formula(0, 3 * KV_HEADS * HELD),
    "vase-dkv": Formula(4 * KV_HEADS * HELD * D * 20, 20 * D),
    "kara": attention(512, 512) + Formula(0, quadratic=True),
    "h2o": attention(128),
    "tova": attention(1),
    "curdkv": ONCE + ONCE,
    "lagkv": ONCE + ONCE + ONCE + ONCE,
    "defensivekv": attention(32) + Formula(2 * QUERY_HEADS * (HELD - KEEP) * D * WIDTH),
    "beaconkv": attention(32),
    "gkv": attention(8),
    "lazyeviction": attention(128),
    "raas": attention(128),
    "cake": attention(32),
    "keyformer": attention(128) + Formula(0, 2 * QUERY_HEADS * 128 * HELD),  # two logarithms per number of noise
    "nacl": attention(32),
    "scissorhands": attention(128),
    "sagekv": attention(1),
    "rpc": attention(32),
    "inertiakv": attention(128),
    "d2o": attention(128) + Formula(2 * KV_HEADS * HELD * KEEP * D, quadratic=True),
    "ams": attention(64) + attention(32),
}
"""Of one layer, by spec, or else by name."""


def cold_milliseconds(work: Callable[[], object]) -> float:
    """Time work on memory that lies in no cache."""
    torch.zeros(FLUSH).add_(1)  # 256 MiB
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)


def skeleton(layers: int) -> PreTrainedModel:
    """A model of the right number of layers and heads that is never run: what caches are made for."""
    few = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8}
    return random_model(layers, QUERY_HEADS, KV_HEADS, rope_theta=1e6, max_position_embeddings=32768, **few)


def random_calibration(layers: int) -> Calibration:
    """Statistics of queries that point one way in some pairs and every way in others."""
    mean = torch.randn(layers, QUERY_HEADS, D // 2, dtype=torch.complex64)
    modulus = mean.abs() + torch.rand(layers, QUERY_HEADS, D // 2)
    return Calibration(mean, modulus, modulus.square() * 1.2, head_dim=D)


class Attention(nn.Module):
    """The one thing a method may ask of an attention module: 64 MiB of float32, more than fit a core's cache."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.o_proj = nn.Linear(QUERY_HEADS * D, WIDTH, bias=False, dtype=dtype)


class Feeder:
    """A cache that is fed the tokens of every layer directly, as a model's layers would.

    Args:
        method, budget: the cache's.
        model: a `skeleton`.
        prompt: tokens of the prompt.
        dtype: of keys, values and queries.
    """

    def __init__(self, method: Method, model: PreTrainedModel, budget: Budget, prompt: int, dtype: torch.dtype) -> None:
        needs, layers = method.needs, model.config.num_hidden_layers
        self.cache = CompressedCache(
            model, method, budget, prompt_lengths=[prompt], max_length=16 * HELD,
            calibration=random_calibration(layers) if needs.calibration else None,
        )  # fmt: skip
        self.module = Attention(dtype) if needs.output_projection else nn.Module()
        self.rotary, self.dtype, self.length = Rotary.from_config(model.config), dtype, 0
        self.level_LHD = torch.randn(layers, KV_HEADS, D)  # where each layer's keys have drifted to

    def feed(self, tokens: int) -> tuple[float, float]:
        """Feed one piece to all layers: milliseconds of the cache's compactions, and of all it does."""
        cache, before = self.cache, self.cache.compaction_seconds
        pieces = [self._piece(layer, tokens) for layer in range(len(self.level_LHD))]
        if cache.method.needs.token_ids:
            cache.token_ids.announced = torch.zeros(1, tokens, dtype=torch.int64)

        def forward() -> None:
            cache.begin_forward(1, tokens, None)
            for layer, (keys, values, queries) in zip(cache.compressed_layers, pieces, strict=True):
                layer.update(keys, values)
                layer.after_attention(queries, LogitRule(D**-0.5), self.module)

        took = cold_milliseconds(forward)
        self.length += tokens
        return 1e3 * (cache.compaction_seconds - before), took

    def read(self) -> float:
        """Milliseconds to read the keys and values of all layers once."""
        stored = [layer.storage for layer in self.cache.compressed_layers]
        both = [(one.keys, one.values) for one in stored if one is not None]
        return cold_milliseconds(lambda: [x[:, :, :HELD].view(torch.int64).sum() for pair in both for x in pair])

    def _piece(self, layer: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        drift_HND = torch.randn(KV_HEADS, tokens, D).cumsum_(1).div_(HELD**0.5).add_(self.level_LHD[layer][:, None])
        self.level_LHD[layer] = drift_HND[:, -1]
        positions_N = torch.arange(self.length, self.length + tokens)
        keys = self.rotary.rotate(drift_HND + 0.3 * torch.randn(KV_HEADS, tokens, D), positions_N)[None]
        values, queries = torch.randn(1, KV_HEADS, tokens, D), torch.randn(1, QUERY_HEADS, tokens, D)
        return keys.to(self.dtype), values.to(self.dtype), queries.to(self.dtype)


def events(method: Method, model: PreTrainedModel, repeats: int, dtype: torch.dtype) -> Iterator[tuple[float, ...]]:
    """Yield milliseconds of a compaction mid-generation, of a token without one, and of reading K and V once.

    Of a method whose layers have budgets of their own: one compaction of every layer, an interval long.
    """
    window, uneven = Window() if method.name == "kara" else None, method.needs.layer_budgets
    interval, prompt = HELD - KEEP, HELD - window.size - window.buffer if window else 1
    budget = window or Budget(KEEP, interval=interval, prompt="count")
    feeder: Feeder | None = None
    for repeat in range(repeats + 1):  # the first is not timed
        if feeder is None or window:  # what stays of windows grows, and they carry nothing along
            feeder = Feeder(method, model, budget, prompt, dtype)
            feeder.feed(prompt)
            feeder.feed(2 * HELD if uneven else HELD - 2 - prompt)  # until the largest share is full
        elif not uneven:
            feeder.feed(interval - 2)
        inside, plain = feeder.feed(1)
        read = feeder.read()
        took = inside + feeder.feed(interval - 1)[0] if uneven else feeder.feed(1)[0]
        assert took > 0.0
        if repeat:
            yield took, plain - inside, read
        if window or repeat == repeats:
            feeder.cache.detach()


def rates() -> tuple[float, float]:
    """Operations per millisecond of a float32 matrix product, and exponentials per millisecond in a core's cache."""
    a, b = torch.randn(2, 2048, 2048)
    x = torch.randn(1 << 18)
    out = torch.empty_like(x)
    products = [cold_milliseconds(lambda: a @ b) for _ in range(5)]
    exponentials = [cold_milliseconds(lambda: [torch.exp(x, out=out) for _ in range(64)]) / 64 for _ in range(5)]
    return 2 * 2048**3 / median(products), x.numel() / median(exponentials)


@script(
    small={"layers": 1, "repeats": 1, "methods": ["snapkv", "kara"]},
    layers=36, repeats=5, dtype="float32", methods=("all",),
)  # fmt: skip
def main(given: argparse.Namespace) -> None:
    torch.manual_seed(0)
    model, rows, evicting = skeleton(given.layers), [], (get_method(name) for name in method_names())
    # the others evict nothing, or look into the future
    every = [one.name for one in evicting if one.name != "full" and not (one.needs.selects or one.needs.future)]
    for spec in [*every, *FURTHER] if given.methods == ["all"] else given.methods:
        method = get_method(spec)
        counted = FORMULAS.get(spec) or FORMULAS[method.name]
        with torch.no_grad():
            flops, elements = rates()
            timed, plain, read = zip(*events(method, model, given.repeats, getattr(torch, given.dtype)), strict=True)
        least = (median(read), given.layers * counted.flops / flops, given.layers * counted.elements / elements)
        middle = median(timed)
        rows.append({
            "method": spec, **interval(median_interval(timed), "ms"), "(a) ms to read K and V once": least[0],
            "(b) ms of products": least[1], "(c) ms of exponentials": least[2],
            "ratio to the largest": middle / max(least), "ms of a token without a compaction": median(plain),
            "quadratic": "yes" if counted.quadratic else "",
        })  # fmt: skip
        print(f"{spec:30s} {middle:8.1f} ms, {middle / max(least):5.2f} times the least", flush=True)
    geometry = f"{given.layers} layers at Qwen3-8B geometry, {HELD} -> {KEEP} slots, {given.dtype}"
    publish(given, f"One compaction of {geometry}, one row, CPU", rows)
