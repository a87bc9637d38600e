"""How long single decode steps take at batch 16 when windows are compacted by a threshold and by a global period.

Kara on the bundled model, 16 rows, 1,500 decode steps. By threshold, a row is compacted when it has a whole window
beyond its buffer: rows that began together stop together, rows that began 8 tokens apart do not. By period (KvLLM's
policy), every so many steps a few rows are compacted. The same tokens are fed to all: only the schedule differs.
"""

from __future__ import annotations

import argparse
from functools import partial

import numpy as np
import torch
from timing import Found, by_turns, milliseconds, script

from reasonkv import CompressedCache, get_method
from reasonkv.budget import Window
from reasonkv.periodic import periodic_events
from reasonkv.testbed import load_testbed

ROWS, PROMPT = 16, 64
WINDOW = Window(size=128, buffer=32, retention=0.3)
Events = list[tuple[int, int]]


def decode(apart: int, events: Events | None, method: str, steps: int) -> dict[str, float]:
    """Measure milliseconds of every step, mean slots kept, compactions, and steps with one.

    Row r has already decoded `apart * r` tokens when the steps begin.
    """
    model, _ = load_testbed()
    ahead = apart * torch.arange(ROWS)[:, None]
    width = PROMPT + int(ahead[-1])
    tokens = torch.randint(20, 80, (ROWS, width + steps), generator=torch.Generator().manual_seed(0))
    column = torch.arange(width + steps)
    mask = ((column < PROMPT) | (column >= width - ahead)).long()
    positions, found, stopped = mask.cumsum(-1) - 1, dict[str, float](), 0
    cache = CompressedCache(model, get_method(method), WINDOW, prompt_lengths=[PROMPT] * ROWS,
                            max_length=width + steps, window_events=events)  # fmt: skip

    def forward(start: int, end: int) -> None:
        seen = mask[:, :end] if apart else None
        model(tokens[:, start:end], attention_mask=seen, position_ids=positions[:, start:end], past_key_values=cache)

    with cache, torch.inference_mode():
        forward(0, PROMPT)
        if apart:
            forward(PROMPT, width)
        done = sum(row.events for row in cache.stats().rows)
        for step in range(steps):
            found[str(step)] = milliseconds(partial(forward, width + step, width + step + 1))
            before, rows = done, cache.stats().rows
            done = sum(row.events for row in rows)
            stopped += done > before
    held = float(np.mean([row.physical_mean for row in rows]))
    return found | {"compactions": done, "stopped": stopped, "held": held}


@script
def main(given: argparse.Namespace) -> Found:
    period, ends = WINDOW.size + 1, [PROMPT + given.steps] * ROWS
    schedules: dict[str, tuple[int, Events | None]] = {
        "threshold, together": (0, None), "threshold, 8 apart": (8, None),
        **{f"{most} rows a period": (0, periodic_events(WINDOW, [PROMPT] * ROWS, ends, period, most))
           for most in (2, 8, 16)},
    }  # fmt: skip
    arms = {name: partial(decode, *one, given.method, given.steps) for name, one in schedules.items()}
    rows = []
    for name, found in by_turns(arms, given.rounds).items():
        median_S = np.median([found[str(step)] for step in range(given.steps)], axis=1)
        percentiles = map(float, np.percentile(median_S, [50, 99, 99.9, 100]))
        rows.append({
            "schedule": name, **dict(zip(("p50 ms", "p99 ms", "p99.9 ms", "longest ms"), percentiles, strict=True)),
            "tokens/s": float(1e3 * ROWS * given.steps / median_S.sum()), "compactions": found["compactions"][-1],
            "steps with one": found["stopped"][-1], "mean slots kept": found["held"][-1],
        })  # fmt: skip
    title = f"Decode steps of {ROWS} rows, {given.method}, windows of {WINDOW.size} kept to {WINDOW.tokens}"
    yield {"title": title, "rows": rows, "window": WINDOW.to_dict(), "period": period}
