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
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from calibrated import random_calibration
from decoding import feed, pieces_of, random_model
from timing import Found, interval, median, median_interval, milliseconds, script
from torch import nn
from transformers import PreTrainedModel

from reasonkv import Budget, CompressedCache, get_method
from reasonkv.budget import Window
from reasonkv.evaluate.fitting import UNITS
from reasonkv.methods import Method, method_names

QUERY_HEADS, KV_HEADS, D, WIDTH = 32, 8, 128, 4096
HELD, KEEP = 1152, 1024
FURTHER = (
    "rkv:variant=port", "cask:fold=neighbours", "cask:per_layer=true", "triattention:mode=global",
    "expected:covariance=full",
)  # fmt: skip


class Formula(NamedTuple):
    """What a method's formula takes for one layer: multiply-adds count 2; elements are exponentials, logarithms, roots.

    Args:
        flops: products and sums.
        elements: elements that a special function is taken of.
        quadratic: the formula compares all slots with each other, or a window's with each other.
    """

    flops: float = 0.0
    elements: float = 0.0
    quadratic: bool = False

    def plus(self, flops: float = 0.0, elements: float = 0.0, quadratic: bool = False) -> Formula:
        """Return it with more to do."""
        return Formula(self.flops + flops, self.elements + elements, self.quadratic or quadratic)


def attention(queries: int, slots: int = HELD) -> Formula:
    """Return logits of that many queries of every query head, and their softmax."""
    return Formula(2 * QUERY_HEADS * queries * slots * D, QUERY_HEADS * queries * slots)


ONCE = 2 * KV_HEADS * HELD * D
"""One product per entry of all keys, or of all values."""
PER_QUERY_HEAD = 2 * QUERY_HEADS * HELD * D
FREQUENCY = Formula(PER_QUERY_HEAD + QUERY_HEADS * HELD * D, KV_HEADS * HELD * D / 2)  # moduli are roots
EXPECTED = Formula(2 * PER_QUERY_HEAD + QUERY_HEADS * HELD * D + ONCE, QUERY_HEADS * HELD)
FORMULAS = {
    **dict.fromkeys(("streaming", "random", "random-attention"), Formula()),
    **{name: Formula(count * ONCE) for name, count in {"knorm": 1, "keydiff": 2, "curdkv": 2, "lagkv": 4}.items()},
    **{name: attention(queries) for queries, names in {
        1: "tova sagekv", 8: "gkv", 32: "beaconkv cake nacl rpc", 64: "snapkv adakv pyramidkv chunkkv",
        128: "h2o lazyeviction raas scissorhands inertiakv"}.items() for name in names.split()},
    "rkv": attention(8).plus(2 * KV_HEADS * HELD * HELD * D, quadratic=True),
    "rkv:variant=port": attention(64).plus(2 * ONCE),
    "triattention": FREQUENCY,
    "expected": EXPECTED,
    "importance": EXPECTED.plus(0, KV_HEADS * HELD),
    "expected:covariance=full": Formula(PER_QUERY_HEAD * (1 + D) + ONCE, QUERY_HEADS * HELD),
    "cask": FREQUENCY.plus(2 * ONCE),
    "vase-attnv": attention(64).plus(0, 3 * KV_HEADS * HELD),
    "vase-dkv": Formula(4 * KV_HEADS * HELD * D * 20, 20 * D),
    "kara": attention(512, 512).plus(quadratic=True),
    "defensivekv": attention(32).plus(2 * QUERY_HEADS * (HELD - KEEP) * D * WIDTH),
    "keyformer": attention(128).plus(0, 2 * QUERY_HEADS * 128 * HELD),  # two logarithms per number of noise
    "d2o": attention(128).plus(2 * KV_HEADS * HELD * KEEP * D, quadratic=True),
    "forecast": attention(64).plus(2 * KV_HEADS * HELD * (D + 7) * UNITS, KV_HEADS * HELD * UNITS),
    "ams": attention(64 + 32),
}  # fmt: skip
"""Of one layer, by spec, or else by name."""


class Feeder:
    """A cache in the middle of a generation that is fed the tokens of every layer directly, as a model's layers would.

    Args:
        method: the cache's; Kara's is compacted in windows.
        model: of the right number of layers and heads; it is never run.
    """

    def __init__(self, method: Method, model: PreTrainedModel) -> None:
        needs, window = method.needs, Window() if method.name == "kara" else None
        prompt = HELD - window.size - window.buffer if window else 1
        self.cache = CompressedCache(
            model, method, window or Budget(KEEP, interval=HELD - KEEP, prompt="count"), prompt_lengths=[prompt],
            max_length=16 * HELD,
            calibration=random_calibration(model.config, queries=True) if needs.calibration else None,
        )  # fmt: skip
        self.model, self.length, self.module = model, 0, nn.Module()
        if needs.output_projection:  # the one thing a method may ask of a module: 64 MiB, more than fit a core's cache
            self.module.o_proj = nn.Linear(QUERY_HEADS * D, WIDTH, bias=False, dtype=model.dtype)
        self.feed(prompt)
        self.feed(2 * HELD if needs.layer_budgets else HELD - 2 - prompt)  # until the largest share is full

    def feed(self, tokens: int) -> tuple[float, float]:
        """Feed so many tokens at once; return milliseconds of the cache's compactions, and of all it does."""
        before, pieces = self.cache.compaction_seconds, pieces_of(self.model, 1, tokens, self.length)
        self.length += tokens
        took = milliseconds(partial(feed, self.cache, self.model, pieces, module=self.module), cold=True)
        return 1e3 * (self.cache.compaction_seconds - before), took

    def read(self) -> float:
        """Return milliseconds to read the keys and values of all layers once."""
        stored = [layer.storage for layer in self.cache.compressed_layers if layer.storage is not None]
        both = [x[:, :, :HELD].view(torch.int64) for one in stored for x in (one.keys, one.values)]
        return milliseconds(lambda: [x.sum() for x in both], cold=True)


def events(method: Method, model: PreTrainedModel, repeats: int) -> Iterator[tuple[float, ...]]:
    """Yield milliseconds of a compaction mid-generation, of a token without one, and of reading K and V once.

    Of a method whose layers have budgets of their own: one compaction of every layer, an interval long.
    """
    windows, uneven, interval = method.name == "kara", method.needs.layer_budgets, HELD - KEEP
    feeder = Feeder(method, model)
    for repeat in range(repeats + 1):  # the first is not timed
        if repeat and windows:  # what stays of windows grows, and they carry nothing along
            feeder.cache.detach()
            feeder = Feeder(method, model)
        elif repeat and not uneven:
            feeder.feed(interval - 2)
        inside, plain = feeder.feed(1)
        read = feeder.read()
        took = inside + feeder.feed(interval - 1)[0] if uneven else feeder.feed(1)[0]
        assert took > 0.0
        if repeat:
            yield took, plain - inside, read
    feeder.cache.detach()


def rates() -> tuple[float, float]:
    """Return operations per millisecond of a float32 matrix product, and exponentials of a core's cache."""
    a, b = torch.randn(2, 2048, 2048)
    x = torch.randn(1 << 18)
    out = torch.empty_like(x)
    products = [milliseconds(lambda: a @ b, cold=True) for _ in range(5)]
    exponentials = [milliseconds(lambda: [torch.exp(x, out=out) for _ in range(64)], cold=True) for _ in range(5)]
    return 2 * 2048**3 / median(products), 64 * x.numel() / median(exponentials)


def evicting() -> list[str]:
    """Return the methods that evict and do not look into the future."""
    methods = map(get_method, method_names())
    return [one.name for one in methods if one.name != "full" and not (one.needs.selects or one.needs.future)]


@script
def main(given: argparse.Namespace) -> Found:
    torch.manual_seed(0)
    few = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "max_position_embeddings": 32768}
    model, rows = random_model(dtype=getattr(torch, given.dtype), num_hidden_layers=given.layers, **few), []
    geometry = f"{given.layers} layers at Qwen3-8B geometry, {HELD} -> {KEEP} slots, {given.dtype}"
    title = f"One compaction of {geometry}, one row, CPU"
    for spec in [*evicting(), *FURTHER] if given.methods == ["all"] else given.methods:
        method = get_method(spec)
        counted = FORMULAS.get(spec) or FORMULAS[method.name]
        with torch.no_grad():
            flops, elements = rates()
            timed, plain, read = zip(*events(method, model, given.repeats), strict=True)
        least = (median(read), given.layers * counted.flops / flops, given.layers * counted.elements / elements)
        rows.append({
            "method": spec, **interval(median_interval(timed), "ms"), "(a) ms to read K and V once": least[0],
            "(b) ms of products": least[1], "(c) ms of exponentials": least[2],
            "ratio to the largest": median(timed) / max(least), "ms of a token without a compaction": median(plain),
            "quadratic": "yes" if counted.quadratic else "",
        })  # fmt: skip
        print(f"{spec:30s} {median(timed):8.1f} ms, {median(timed) / max(least):5.2f} times the least", flush=True)
        yield {"title": title, "rows": rows}
