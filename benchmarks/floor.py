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
from decoding import SHAPES
from timing import RESULTS, Found, Row, median, script
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

from reasonkv import CompressedCache
from reasonkv.capacity import find_device, step_seconds, with_efficiencies
from reasonkv.checkpoints import load_config
from reasonkv.floor import Rates, Work, compaction, decode_step, measure_rates, prompt_tokens, shape_of
from reasonkv.rates import Clock

TOKENS, INTERVAL, BLOCK, FAR = 256, 128, 64, 1.5
DTYPE = torch.bfloat16


def filled(model: PreTrainedModel, method: str, batch: int, prompt: int, slots: int) -> CompressedCache:
    """Return a cache of equal sequences that has seen a prompt, and has compacted it to `slots` if that is fewer."""
    kept = {} if method == "full" else {"tokens": slots, "interval": INTERVAL, "prompt": "count"}
    cache = CompressedCache(model, method, max_length=prompt + 2 * INTERVAL, **kept)
    ids = torch.randint(5, 60, (1, prompt), generator=torch.Generator().manual_seed(0))
    model(ids, past_key_values=cache, logits_to_keep=1)
    cache.batch_repeat_interleave(batch)
    return cache


def largest_lines(work: Callable[[], object]) -> str:
    """Return the three operations that take the most time of their own."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        work()
    lines = sorted(found.key_averages(), key=lambda one: -one.self_cpu_time_total)
    total = sum(one.self_cpu_time_total for one in lines)
    return ", ".join(f"{one.key} {one.self_cpu_time_total / total:.0%}" for one in lines[:3])


def line(
    path: str, batch: int, work: Work, rates: Rates, seconds: float = math.nan,
    again: Callable[[], object] | None = None,
) -> Row:  # fmt: skip
    """Return one row of the table; a path far from its floor is run again, and profiled."""
    floor = work.seconds(rates)
    measured = {"measured ms": 1e3 * seconds, "measured / floor": seconds / floor} if again else (
        {"measured ms": "-", "measured / floor": "-"}
    )  # fmt: skip
    return {
        "path": path, "batch": batch, "MB": work.bytes / 1e6, "GFLOP": work.operations / 1e9, "floor ms": 1e3 * floor,
        **measured, "largest lines": largest_lines(again) if again and seconds > FAR * floor else "",
    }  # fmt: skip


def measured(model: PreTrainedModel, batch: int, repeats: int, rates: Rates, clock: Clock) -> list[Row]:
    """Return the rows of one model and batch: a decode step, a block of tokens, and a compaction."""
    shape, blocks = shape_of(model.config), torch.full((batch, INTERVAL), 7)
    with filled(model, "random", batch, TOKENS + BLOCK, TOKENS) as cache:

        def feed(tokens: int = 1) -> float:
            start = clock()
            model(blocks[:, :tokens], past_key_values=cache, **({"logits_to_keep": 1} if tokens == 1 else {}))
            return clock() - start

        def held() -> float:
            return cache.stats().rows[0].physical_terminal

        seconds = median([feed() for _ in range(1 + repeats)][1:])  # the first warms up
        step = decode_step(shape, batch, held() - (repeats - 1) / 2, DTYPE)
        rows = [line("decode step", batch, step, rates, seconds, feed)]
        near = min(left for left in cache.tokens_to_next_event() if left) - 1  # as replay feeds: up to a compaction
        whole = prompt_tokens(shape, batch, near, held(), DTYPE)
        block, before = feed(near) / near, cache.compaction_seconds
        feed()
        took, kept = cache.compaction_seconds - before, held()
        # profiles come after both were timed: of a block up to the next compaction, and of the step with it
        each = Work(whole.bytes / near, whole.operations / near)
        rows.append(line(f"replay token (of {near})", batch, each, rates, block, lambda: feed(INTERVAL - 1)))
        moved = compaction(shape, batch, kept + INTERVAL, kept, DTYPE)
        return [*rows, line("compaction", batch, moved, rates, took, feed)]


def validate(model: PreTrainedModel, given: argparse.Namespace, clock: Clock) -> list[Row]:
    """Return decode rates beside the plan's, with full KV and with `TOKENS` kept."""
    for parameter in model.parameters():  # a mapped file's small pages make its products 10 to 15 % slower
        parameter.data = parameter.data.clone()
    shape, device, rows = shape_of(model.config), find_device("cpu", DTYPE, clock), []
    for batch, length, method in (
        (batch, length, method)
        for batch in given.batches if batch > 1 for length in given.lengths for method in ("full", "random")
    ):  # fmt: skip
        slots = length if method == "full" else min(TOKENS, length)
        took, found, attended = list[float](), list[Any](), slots + 1 + given.repeats / 2
        with filled(model, method, batch, length, slots) as cache:
            token = torch.full((batch, 1), 7)
            for _ in range(given.repeats):  # by turns, so that a slow minute hits both; the fastest of each counts
                start = clock()
                model(token, past_key_values=cache, logits_to_keep=1)
                took.append(clock() - start)
                if len(took) % 4 == 0:
                    found.append(with_efficiencies(device, model.config, batch, round(attended), DTYPE, "cpu", clock))
        best = {name: max(getattr(one, name) for one in found) for name in ("products", "attention")}
        planned = step_seconds(shape, device._replace(**best), batch, attended, length, DTYPE)
        part = min(took) / planned
        rows.append({
            "batch": batch, "length": length, "kept": method, "slots": attended,
            "measured tokens/s": batch / min(took), "planned tokens/s": batch / planned,
            "planned / measured": part, "within 20 %": "yes" if 0.8 <= part <= 1.2 else "no",
            **{f"{name}, of the rate": one for name, one in best.items()},
        })  # fmt: skip
    return rows


@script
def main(given: argparse.Namespace) -> Found:
    clock, rows = time.process_time if given.cpu_time else time.perf_counter, list[Row]()
    rates = measure_rates(DTYPE, clock=clock)
    with torch.no_grad():
        for name in given.models:
            source = load_config(name).name_or_path or name
            model = AutoModelForCausalLM.from_pretrained(source, dtype=DTYPE).eval()
            found = validate(model, given, clock) if given.validate else [
                row for batch in given.batches for row in measured(model, batch, given.repeats, rates, clock)
            ]  # fmt: skip
            rows += [{"model": Path(name).name, **row} for row in found]
            del model
    if given.validate:
        if given.out == RESULTS / "floor.json":
            given.out = RESULTS / "floor_validation.json"
        yield {"title": "Decode rates beside those of reasonkv plan-capacity, bfloat16", "rows": rows}
        return
    shape = shape_of(Qwen3Config(**SHAPES["Qwen3-8B"], dtype=DTYPE))
    for batch in given.batches:
        step = decode_step(shape, batch, TOKENS + INTERVAL / 2, DTYPE)
        moved = compaction(shape, batch, TOKENS + INTERVAL, TOKENS, DTYPE)
        rows += [{"model": "Qwen3-8B, not run", **line("decode step", batch, step, rates)},
                 {"model": "Qwen3-8B, not run", **line("compaction", batch, moved, rates)}]  # fmt: skip
    title = (
        f"Floors at {rates.bytes_per_second / 1e9:.1f} GB/s and {rates.operations_per_second / 1e9:.0f} GFLOP/s in "
        f"bfloat16; random, {TOKENS} to {TOKENS + INTERVAL} slots"
    )
    yield {"title": title, "rows": rows, "rates": rates._asdict()}
