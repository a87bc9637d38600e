"""How long single decode steps take at batch 16 when windows are compressed by a threshold and by a global period.

Kara on the bundled model, 16 rows, 1,500 decode steps. By threshold, a row is compressed when it has a whole window
beyond its buffer: rows that began together stop together, rows that began 8 tokens apart do not. By period (KvLLM's
policy), every so many steps a few rows are compressed. The same tokens are fed to all: only the schedule differs.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from common import publish

from reasonkv import CompressedCache, get_method
from reasonkv.budget import Window
from reasonkv.periodic import periodic_events
from reasonkv.testbed import load_testbed

ROWS, STEPS, PROMPT = 16, 1500, 64
WINDOW = Window(size=128, buffer=32, retention=0.3)


def decode(apart: int, events: list[tuple[int, int]] | None, method: str) -> tuple[np.ndarray, float, int, int]:
    """Milliseconds of every step, mean slots held, compressions, and steps with one.

    Row r has already decoded `apart * r` tokens when the steps begin.
    """
    model, _ = load_testbed()
    ahead = [apart * row for row in range(ROWS)]
    width = PROMPT + max(ahead)
    tokens = torch.randint(20, 80, (ROWS, width + STEPS), generator=torch.Generator().manual_seed(0))
    cache = CompressedCache(
        model,
        get_method(method),
        WINDOW,
        prompt_lengths=[PROMPT] * ROWS,
        max_length=width + STEPS,
        window_events=events,
    )
    mask = torch.ones(ROWS, width + STEPS, dtype=torch.long)
    for row, count in enumerate(ahead):
        mask[row, PROMPT : width - count] = 0
    positions = mask.cumsum(-1) - 1
    took, stopped, before = [], 0, 0
    with cache, torch.inference_mode():
        model(tokens[:, :PROMPT], past_key_values=cache)
        starts = [width + step for step in range(STEPS)]
        for start, end in [*([(PROMPT, width)] if apart else []), *((one, one + 1) for one in starts)]:
            began = time.perf_counter()
            model(
                tokens[:, start:end],
                attention_mask=mask[:, :end] if apart else None,
                position_ids=positions[:, start:end],
                past_key_values=cache,
            )
            took.append(1e3 * (time.perf_counter() - began))
            done = sum(row.events for row in cache.stats().rows) if cache.compaction_seconds else 0
            stopped += done > before
            before = done
        held = float(np.mean([row.physical_mean for row in cache.stats().rows]))
    took = took[-STEPS:]
    return np.array(took), held, before, stopped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", default="kara")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    period = WINDOW.size + 1

    def listed(most: int) -> list[tuple[int, int]]:
        return periodic_events(WINDOW, [PROMPT] * ROWS, [PROMPT + STEPS] * ROWS, period, most)

    settings: dict[str, tuple[int, list[tuple[int, int]] | None]] = {
        "threshold, together": (0, None),
        "threshold, 8 apart": (8, None),
        "2 rows a period": (0, listed(2)),
        "8 rows a period": (0, listed(8)),
        "16 rows a period": (0, listed(16)),
    }
    times: dict[str, list[np.ndarray]] = {name: [] for name in settings}
    facts: dict[str, list[float]] = {}
    for _ in range(arguments.repeats):
        for name, (apart, events) in settings.items():  # interleaved: a slow minute hits all alike
            took, *facts[name] = decode(apart, events, arguments.method)
            times[name].append(took)
    rows = []
    for name, runs in times.items():
        fastest_S = np.median(np.stack(runs), axis=0)  # of each step, over the repeats
        p50, p99, p999 = np.percentile(fastest_S, [50, 99, 99.9])
        held, events, stopped = facts[name]
        rate = 1e3 * ROWS * STEPS / fastest_S.sum()
        rows.append([name, p50, p99, p999, float(fastest_S.max()), float(rate), events, stopped, held])
    publish(
        "stalls",
        f"Decode steps of {ROWS} rows, {arguments.method}, windows of {WINDOW.size} kept to {WINDOW.tokens}",
        ["schedule", "p50 ms", "p99 ms", "p99.9 ms", "longest ms", "tokens/s", "compressions", "steps with one",
         "mean slots held"],
        rows,
        {"window": WINDOW.to_dict(), "period": period, "steps": STEPS, "repeats": arguments.repeats},
    )  # fmt: skip


if __name__ == "__main__":
    main()
