"""Milliseconds of one event of every method at Qwen3-8B geometry, beside what the event cannot do without.

36 layers, 32 query and 8 KV heads of 128, 1,152 -> 1,024 slots, one row. An event is everything the cache does: views,
scores, choice, check, gather, fold, write back. Caches are fed keys, values and queries directly, no model runs; keys
drift and are rotated as a model's are. The event before the timed ones is not timed, so slots, sums and norms that
methods carry along stand as they do in the middle of a long generation. Every layer has its own memory, and 256 MiB
are written before every event, so nothing is warm in the caches.

The cost is divided by the largest of: the time to read the layers' keys and values once; the products of the method's
formula over the rate of a matrix product; its exponentials, logarithms and roots over the rate of `exp`; all three
measured in the same run. `FORMULAS` says what was counted.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from common import median_interval, publish
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from reasonkv import Budget, CompressedCache, get_method
from reasonkv.budget import Window
from reasonkv.calibration import Calibration
from reasonkv.methods import Method, method_names
from reasonkv.rotary import Rotary
from reasonkv.runtimes.transformers.attention import LogitRule

LAYERS, QUERY_HEADS, KV_HEADS, D, WIDTH = 36, 32, 8, 128, 4096
HELD, KEEP = 1152, 1024
FLUSH = 64 * 2**20
NO_EVENT = ("full", "oracle", "quest", "seer")  # they drop nothing, or look into the future
FURTHER = (
    "rkv:form=port", "cask:fold=neighbours", "cask:per_layer=true", "triattention:mode=global",
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
    "rkv:form=port": attention(64) + ONCE + ONCE,
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
}
"""Of one layer, by spec, or else by name."""


def formula(spec: str, method: Method) -> Formula:
    """What a method's formula takes."""
    return FORMULAS.get(spec) or FORMULAS[method.name]


def skeleton() -> PreTrainedModel:
    """A model of the right number of layers and heads that is never run: what caches are made for."""
    config = Qwen3Config(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=LAYERS, num_attention_heads=QUERY_HEADS,
        num_key_value_heads=KV_HEADS, head_dim=D, rope_theta=1e6, max_position_embeddings=32768,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval()


def random_calibration() -> Calibration:
    """Statistics of queries that point one way in some pairs and every way in others."""
    mean = torch.randn(LAYERS, QUERY_HEADS, D // 2, dtype=torch.complex64)
    modulus = mean.abs() + torch.rand(LAYERS, QUERY_HEADS, D // 2)
    return Calibration(mean, modulus, modulus.square() * 1.2, head_dim=D)


class Attention(nn.Module):
    """The one thing a method may ask of an attention module: 64 MiB of float32, more than fit a core's cache."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.o_proj = nn.Linear(QUERY_HEADS * D, WIDTH, bias=False, dtype=dtype)


class Feeder:
    """A cache that is fed the tokens of every layer directly, as a model's layers would.

    Args:
        method: the cache's.
        model: `skeleton()`.
        prompt: tokens of the prompt.
        dtype: of keys, values and queries.

    """

    def __init__(self, method: Method, model: PreTrainedModel, budget: Budget, prompt: int, dtype: torch.dtype) -> None:
        needs = method.needs
        self.cache = CompressedCache(
            model, method, budget, prompt_lengths=[prompt], max_length=16 * HELD,
            calibration=random_calibration() if needs.calibration else None,
        )  # fmt: skip
        self.module = Attention(dtype) if needs.output_projection else nn.Module()
        self.rotary, self.dtype, self.length = Rotary.from_config(model.config), dtype, 0
        self.level_LHD = torch.randn(LAYERS, KV_HEADS, D)  # where each layer's keys have drifted to

    def feed(self, tokens: int) -> tuple[float, float]:
        """Feed one piece to all layers: seconds in the cache's events, and in all it does."""
        cache, before = self.cache, self.cache.compaction_seconds
        pieces = [self._piece(layer, tokens) for layer in range(LAYERS)]
        torch.zeros(FLUSH).add_(1)  # 256 MiB
        if cache.method.needs.token_ids:
            cache.token_ids.announced = torch.zeros(1, tokens, dtype=torch.int64)
        start = time.perf_counter()
        cache.begin_forward(1, tokens, None)
        for layer, (keys, values, queries) in zip(cache.compressed_layers, pieces, strict=True):
            layer.update(keys, values)
            layer.after_attention(queries, LogitRule(D**-0.5), self.module)
        took = time.perf_counter() - start
        self.length += tokens
        return cache.compaction_seconds - before, took

    def read(self) -> float:
        """Seconds to read the keys and values of all layers once."""
        torch.zeros(FLUSH).add_(1)
        start = time.perf_counter()
        for layer in self.cache.compressed_layers:
            assert layer.storage is not None and layer.storage.keys is not None and layer.storage.values is not None
            layer.storage.keys[:, :, :HELD].view(torch.int64).sum()
            layer.storage.values[:, :, :HELD].view(torch.int64).sum()
        return time.perf_counter() - start

    def _piece(self, layer: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        drift_HND = torch.randn(KV_HEADS, tokens, D).cumsum_(1).div_(HELD**0.5).add_(self.level_LHD[layer][:, None])
        self.level_LHD[layer] = drift_HND[:, -1]
        positions_N = torch.arange(self.length, self.length + tokens)
        keys = self.rotary.rotate(drift_HND + 0.3 * torch.randn(KV_HEADS, tokens, D), positions_N)[None]
        values, queries = torch.randn(1, KV_HEADS, tokens, D), torch.randn(1, QUERY_HEADS, tokens, D)
        return keys.to(self.dtype), values.to(self.dtype), queries.to(self.dtype)


def events(
    method: Method, model: PreTrainedModel, repeats: int, dtype: torch.dtype
) -> Iterator[tuple[float, float, float]]:
    """Milliseconds of an event in the middle of a generation, of a token without one, and of reading K and V once."""
    window = Window() if method.name == "kara" else None
    prompt = HELD - window.size - window.buffer if window else 1
    if method.needs.layer_budgets:
        yield from uneven_events(method, model, repeats, dtype)
        return
    feeder: Feeder | None = None
    for repeat in range(repeats + 1):  # the first is not timed
        if feeder is None or window:  # what stays of windows grows, and they carry nothing along
            feeder = Feeder(method, model, window or Budget(KEEP, interval=HELD - KEEP, prompt="count"), prompt, dtype)
            feeder.feed(prompt)
            feeder.feed(HELD - 2 - prompt)
        else:
            feeder.feed(HELD - KEEP - 2)
        plain = feeder.feed(1)[1]
        read = feeder.read()
        took = feeder.feed(1)[0]
        assert took > 0.0
        if repeat:
            yield took * 1e3, plain * 1e3, read * 1e3
        if window:
            feeder.cache.detach()
    if feeder is not None:
        feeder.cache.detach()


def uneven_events(
    method: Method, model: PreTrainedModel, repeats: int, dtype: torch.dtype
) -> Iterator[tuple[float, float, float]]:
    """The same of a method whose layers have budgets of their own: one event of every layer, an interval long."""
    interval = HELD - KEEP
    feeder = Feeder(method, model, Budget(KEEP, interval=interval, prompt="count"), 1, dtype)
    for tokens in (1, 2 * HELD):  # until the largest share is full
        feeder.feed(tokens)
    for repeat in range(repeats + 1):
        in_event, plain = feeder.feed(1)
        read = feeder.read()
        took = in_event + feeder.feed(interval - 1)[0]
        if repeat:
            yield took * 1e3, (plain - in_event) * 1e3, read * 1e3
    feeder.cache.detach()


def rates() -> tuple[float, float]:
    """Operations per second of a float32 matrix product, and exponentials per second in a core's cache."""
    a, b = torch.randn(2, 2048, 2048)
    x = torch.randn(1 << 18)
    out = torch.empty_like(x)
    product, exponential = [], []
    for _ in range(5):
        start = time.perf_counter()
        a @ b
        product.append(time.perf_counter() - start)
        start = time.perf_counter()
        for _ in range(64):
            torch.exp(x, out=out)
        exponential.append((time.perf_counter() - start) / 64)
    return 2 * 2048**3 / median_interval(product)[0], x.numel() / median_interval(exponential)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of keys, values and queries"
    )
    parser.add_argument("--methods", nargs="*", help="specs; all methods that make events unless given")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    load = os.getloadavg()[0]
    specs = arguments.methods or [name for name in method_names() if name not in NO_EVENT] + list(FURTHER)
    model, rows = skeleton(), []
    for spec in specs:
        method = get_method(spec)
        with torch.no_grad():
            flops, elements = rates()
            timed = list(zip(*events(method, model, arguments.repeats, getattr(torch, arguments.dtype)), strict=True))
        middle, low, high = median_interval(list(timed[0]))
        plain, read = (median_interval(list(part))[0] for part in timed[1:])
        counted = formula(spec, method)
        least = (read, 1e3 * LAYERS * counted.flops / flops, 1e3 * LAYERS * counted.elements / elements)
        rows.append([spec, middle, low, high, *least, middle / max(least), plain, "yes" if counted.quadratic else ""])
        parts = " ".join(f"{part:6.1f}" for part in least)
        print(f"{spec:30s} {middle:8.1f} ms  least {parts}  ratio {middle / max(least):5.2f}", flush=True)
    if arguments.methods:
        return
    publish(
        "event_cost" if arguments.dtype == "float32" else f"event_cost_{arguments.dtype}",
        f"One event of {LAYERS} layers at Qwen3-8B geometry, {HELD} -> {KEEP} slots, {arguments.dtype}, one row, CPU",
        ["method", "ms", "95 % low", "95 % high", "(a) ms to read K and V once", "(b) ms of products",
         "(c) ms of exponentials", "ratio to the largest", "ms of a token without an event", "quadratic"],
        rows,
        {"layers": LAYERS, "query_heads": QUERY_HEADS, "kv_heads": KV_HEADS, "head_dim": D, "dtype": arguments.dtype,
         "repeats": arguments.repeats, "load_average_before": load},
    )  # fmt: skip


if __name__ == "__main__":
    main()
