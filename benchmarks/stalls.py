"""How long single decode steps take at batch 16 when windows are compacted by a threshold and by a global period.

Kara on the bundled model, 16 rows, 1,500 decode steps. By threshold, a row is compacted when it has a whole window
beyond its buffer: rows that began together stop together, rows that began 8 tokens apart do not. By period (KvLLM's
policy), every so many steps a few rows are compacted. The same tokens are fed to all: only the schedule differs.
"""

from __future__ import annotations

import argparse
import time
from functools import partial

import numpy as np
import torch
from timing import by_turns, publish, script

from reasonkv import CompressedCache, get_method
from reasonkv.budget import Window
from reasonkv.periodic import periodic_events
from reasonkv.testbed import load_testbed

ROWS, PROMPT = 16, 64
WINDOW = Window(size=128, buffer=32, retention=0.3)
Events = list[tuple[int, int]]
STEP = "step "
"""Before the number of a step whose milliseconds are measured."""


def decode(apart: int, events: Events | None, method: str, steps: int) -> dict[str, float]:
    """Measure milliseconds of every step, mean slots kept, compactions, and steps with one.

    Row r has already decoded `apart * r` tokens when the steps begin.
    """
    model, _ = load_testbed()
    ahead = [apart * row for row in range(ROWS)]
    width = PROMPT + max(ahead)
    tokens = torch.randint(20, 80, (ROWS, width + steps), generator=torch.Generator().manual_seed(0))
    cache = CompressedCache(model, get_method(method), WINDOW, prompt_lengths=[PROMPT] * ROWS,
                            max_length=width + steps, window_events=events)  # fmt: skip
    mask = torch.ones(ROWS, width + steps, dtype=torch.long)
    for row, count in enumerate(ahead):
        mask[row, PROMPT : width - count] = 0
    positions, found = mask.cumsum(-1) - 1, dict[str, float]()
    before = stopped = 0
    with cache, torch.inference_mode():
        model(tokens[:, :PROMPT], past_key_values=cache)
        pieces = [(PROMPT, width)] if apart else []
        for start, end in [*pieces, *((width + step, width + step + 1) for step in range(steps))]:
            seen, began = mask[:, :end] if apart else None, time.perf_counter()
            model(
                tokens[:, start:end], attention_mask=seen, position_ids=positions[:, start:end], past_key_values=cache
            )
            if start >= width:
                found[f"{STEP}{start - width}"] = 1e3 * (time.perf_counter() - began)
            done = sum(row.events for row in cache.stats().rows) if cache.compaction_seconds else 0
            stopped += done > before
            before = done
        held = float(np.mean([row.physical_mean for row in cache.stats().rows]))
    return found | {"compactions": before, "stopped": stopped, "held": held}


@script(small={"rounds": 1, "steps": 150}, method="kara", rounds=3, steps=1500)
def main(given: argparse.Namespace) -> None:
    period = WINDOW.size + 1
    listed = {
        most: periodic_events(WINDOW, [PROMPT] * ROWS, [PROMPT + given.steps] * ROWS, period, most)
        for most in (2, 8, 16)
    }
    schedules: dict[str, tuple[int, Events | None]] = {
        "threshold, together": (0, None),
        "threshold, 8 apart": (8, None),
    }
    schedules |= {f"{most} rows a period": (0, events) for most, events in listed.items()}
    arms = {name: partial(decode, *one, given.method, given.steps) for name, one in schedules.items()}
    rows = []
    for name, found in by_turns(arms, given.rounds, warm_up=0).items():
        median_S = np.array([np.median(values) for key, values in found.items() if key.startswith(STEP)])
        percentiles = map(float, np.percentile(median_S, [50, 99, 99.9, 100]))
        rows.append({
            "schedule": name, **dict(zip(("p50 ms", "p99 ms", "p99.9 ms", "longest ms"), percentiles, strict=True)),
            "tokens/s": float(1e3 * ROWS * given.steps / median_S.sum()), "compactions": found["compactions"][-1],
            "steps with one": found["stopped"][-1], "mean slots kept": found["held"][-1],
        })  # fmt: skip
    title = f"Decode steps of {ROWS} rows, {given.method}, windows of {WINDOW.size} kept to {WINDOW.tokens}"
    publish(given, title, rows, window=WINDOW.to_dict(), period=period)
