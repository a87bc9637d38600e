"""The floor of a decode step, a compaction and a replayed token, beside the time they take here.

The floor is what must be moved and computed (`reasonkv.floor`) over this machine's measured rates of copying and of a
square product; a table of shapes that do not fit here stands without a measurement. Where a path takes over 1.5 times
its floor, its three largest lines by torch.profiler stand beside it: own time, share.

`--validate` measures what `reasonkv plan-capacity` says instead: tokens per second of decoding, bounded and full, at
two lengths, beside the plan's step, with the efficiencies of products and attention that it measures.
Both with as many threads as there are idle cores: `--threads 1` where another job runs. `--cpu-time` then counts what
this process was given of the core instead of the time on the clock.

    python benchmarks/floor.py --validate --threads 1 --models Qwen/Qwen2.5-Coder-0.5B-Instruct
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from decoding import LARGE, SMALL
from timing import RESULTS, median, publish, script
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, Qwen3Config

from reasonkv import CompressedCache
from reasonkv.capacity import find_device, step_seconds, with_efficiencies
from reasonkv.checkpoints import load_config
from reasonkv.floor import Rates, Shape, Work, compaction, decode_step, measure_rates, prompt_tokens, shape_of
from reasonkv.rates import Clock

TOKENS, INTERVAL, BLOCK, FAR = 256, 128, 64, 1.5


def qwen3_8b() -> PreTrainedConfig:
    return Qwen3Config(
        hidden_size=4096, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
        intermediate_size=12288, vocab_size=151936, tie_word_embeddings=False, dtype=torch.bfloat16,
    )  # fmt: skip


def filled(model: PreTrainedModel, method: str, batch: int, prompt: int, slots: int) -> CompressedCache:
    """Return a cache of equal sequences that has seen a prompt, and has compacted it to `slots` if that is fewer."""
    kept = {} if method == "full" else {"tokens": slots, "interval": INTERVAL, "prompt": "count"}
    cache = CompressedCache(model, method, max_length=prompt + 2 * INTERVAL, **kept)
    ids = torch.randint(5, 60, (1, prompt), generator=torch.Generator().manual_seed(0))
    model(ids, past_key_values=cache, logits_to_keep=1)
    cache.batch_repeat_interleave(batch)
    return cache


def timed(work: Callable[[], object], repeats: int, clock: Clock) -> float:
    """Return the median seconds after one run that warms up."""
    took = []
    for _ in range(1 + repeats):
        start = clock()
        work()
        took.append(clock() - start)
    return median(took[1:])


def largest_lines(work: Callable[[], object]) -> str:
    """Return the three operations that take the most time of their own."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        work()
    lines = sorted(found.key_averages(), key=lambda one: -one.self_cpu_time_total)
    total = sum(one.self_cpu_time_total for one in lines)
    return ", ".join(f"{one.key} {one.self_cpu_time_total / total:.0%}" for one in lines[:3])


def measured(
    model: PreTrainedModel, shape: Shape, batch: int, repeats: int, rates: Rates, clock: Clock
) -> list[dict[str, Any]]:
    """Return the rows of one model and batch: a decode step, a block of tokens, and a compaction."""
    rows = []
    with filled(model, "random", batch, TOKENS + BLOCK, TOKENS) as cache:
        token = torch.full((batch, 1), 7)

        def decode() -> object:
            return model(token, past_key_values=cache, logits_to_keep=1)

        seconds = timed(decode, repeats, clock)
        held = cache.stats().rows[0].physical_terminal
        step = decode_step(shape, batch, held - (repeats - 1) / 2, model.dtype)
        rows.append(line("decode step", batch, step, rates, seconds, largest_lines, decode))
        near = min(left for left in cache.tokens_to_next_event() if left) - 1  # as replay feeds: up to a compaction
        held = cache.stats().rows[0].physical_terminal
        block = torch.full((batch, near), 7)
        start = clock()
        model(block, past_key_values=cache)
        seconds = (clock() - start) / near
        whole = prompt_tokens(shape, batch, near, held, model.dtype)
        each = Work(whole.bytes / near, whole.operations / near)
        rows.append(line(f"replay token (of {near})", batch, each, rates, seconds))
        before = cache.compaction_seconds
        decode()
        kept = cache.stats().rows[0].physical_terminal
        moved = compaction(shape, batch, kept + INTERVAL, kept, model.dtype)
        rows.append(line("compaction", batch, moved, rates, cache.compaction_seconds - before))
        again = torch.full((batch, INTERVAL - 1), 7)  # once more for the profiles
        for row, work in zip(rows[1:], (lambda: model(again, past_key_values=cache), decode), strict=True):
            lines = largest_lines(work)
            row["largest lines"] = lines if row["measured / floor"] > FAR else ""
    return rows


def line(
    path: str, batch: int, work: Work, rates: Rates, seconds: float = math.nan,
    explain: Callable[..., str] | None = None, *given: Any,
) -> dict[str, Any]:  # fmt: skip
    """Return one row of the table; a path far from its floor is profiled."""
    floor = work.seconds(rates)
    ratio = seconds / floor
    lines = explain(*given) if explain and ratio > FAR else ""
    return {
        "path": path, "batch": batch, "MB": work.bytes / 1e6, "GFLOP": work.operations / 1e9, "floor ms": 1e3 * floor,
        "measured ms": "-" if math.isnan(seconds) else 1e3 * seconds,
        "measured / floor": "-" if math.isnan(seconds) else ratio, "largest lines": lines,
    }  # fmt: skip


def validate(
    model: PreTrainedModel, batches: list[int], lengths: list[int], repeats: int, clock: Clock
) -> list[dict[str, Any]]:
    """Return decode rates beside the plan's, with full KV and with `TOKENS` kept."""
    shape, rows = shape_of(model.config), []
    device = find_device("cpu", model.dtype, clock)
    for batch in batches:
        for length, (method, slots) in (
            (n, pair) for n in lengths for pair in (("full", n), ("random", min(TOKENS, n)))
        ):
            took, found, attended = [], [], slots + 1 + repeats / 2
            with filled(model, method, batch, length, slots) as cache:
                token = torch.full((batch, 1), 7)
                for _ in range(repeats):  # by turns, so that a slow minute hits both; the fastest of each counts
                    start = clock()
                    model(token, past_key_values=cache, logits_to_keep=1)
                    took.append(clock() - start)
                    if len(took) % 4 == 0:
                        args = (model.config, batch, round(attended), model.dtype, "cpu", clock)
                        found.append(with_efficiencies(device, *args))
            seconds = min(took)
            here = device._replace(
                products=max(one.products for one in found), attention=max(one.attention for one in found)
            )
            planned = step_seconds(shape, here, batch, attended, length, model.dtype)
            rows.append({
                "batch": batch, "length": length, "kept": method, "slots": attended,
                "measured tokens/s": batch / seconds,
                "planned tokens/s": batch / planned, "planned / measured": seconds / planned,
                "within 20 %": "yes" if 0.8 <= seconds / planned <= 1.2 else "no",
                "products, of the rate": here.products, "attention, of the rate": here.attention,
            })  # fmt: skip
            print({name: f"{one:.3g}" if isinstance(one, float) else one for name, one in rows[-1].items()}, flush=True)
    return rows


@script(
    small={"models": ["testbed"], "batches": ["1", "2"], "lengths": ["300", "400"], "repeats": 4},
    models=(SMALL, LARGE), batches=("1", "8", "32"),
    lengths=("512", "1536"), repeats=8, validate=False, cpu_time=False,
)  # fmt: skip
def main(given: argparse.Namespace) -> None:
    batches, dtype, rows = [int(one) for one in given.batches], torch.bfloat16, []
    clock = time.process_time if given.cpu_time else time.perf_counter
    rates = measure_rates(dtype, clock=clock)
    with torch.no_grad():
        for name in given.models:
            config = load_config(name)
            source = config.name_or_path or name
            model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype).eval()
            if given.validate:
                for parameter in model.parameters():  # a mapped file's small pages make its products 10 to 15 % slower
                    parameter.data = parameter.data.clone()
                lengths = [int(one) for one in given.lengths]
                found = validate(model, [one for one in batches if one > 1], lengths, given.repeats, clock)
            else:
                shape = shape_of(config)
                found = [row for batch in batches for row in measured(model, shape, batch, given.repeats, rates, clock)]
            rows += [{"model": Path(name).name, **row} for row in found]
            del model
    if given.validate:
        if given.out == RESULTS / "floor.json":
            given.out = RESULTS / "floor_validation.json"
        publish(given, "Decode rates beside those of reasonkv plan-capacity, bfloat16", rows)
        return
    shape = shape_of(qwen3_8b())
    for batch in batches:
        rows += [
            {"model": "Qwen3-8B, not run", **row}
            for row in (
                line("decode step", batch, decode_step(shape, batch, TOKENS + INTERVAL / 2, dtype), rates),
                line("compaction", batch, compaction(shape, batch, TOKENS + INTERVAL, TOKENS, dtype), rates),
            )
        ]
    title = (
        f"Floors at {rates.bytes_per_second / 1e9:.1f} GB/s and {rates.operations_per_second / 1e9:.0f} GFLOP/s in "
        f"bfloat16; random, {TOKENS} to {TOKENS + INTERVAL} slots"
    )
    publish(given, title, rows, rates=rates._asdict())
