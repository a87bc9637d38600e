"""The compactions of a batch under a global step counter, listed beforehand."""

from __future__ import annotations

from collections.abc import Sequence

from reasonkv.budget import PeriodicWindow, Window
from reasonkv.schedule import Lengths, listed, periodic_round, raw_tokens


def periodic_events(
    window: Window, prompts: Sequence[int], lengths: Sequence[int], period: int, most: int
) -> list[tuple[int, int]]:
    """Which rows a global step counter would compress, and when: the periodic policy of KvLLM (arXiv 2607.01237).

    All rows decode one token a step. Every `period` steps, up to `most` of the rows that hold at least a window beyond
    their buffer are compressed, those with most uncompressed tokens first (of equals the first row).

    Args:
        window: what a compression cuts.
        prompts: tokens of each row's prompt.
        lengths: tokens each row sees in all; it leaves the batch then.
        period: steps between two rounds, more than `window.size`, so that nothing is compressed twice.
        most: rows of a round.

    Returns:
        (row, logical length) of every compression, in the order they fall; `CompressedCache(window_events=)` obeys it.

    Raises:
        BudgetError: a period that is too short, or no rows to a round.
    """
    policy = PeriodicWindow(window.size, window.buffer, window.retention, period=period, most=most)
    rows = [policy.row()] * len(prompts)
    events = []
    for now in range(period, max(lengths, default=0) + 1, period):
        states = {
            row: Lengths(prompt + now, prompt=prompt)
            for row, prompt in enumerate(prompts)
            if prompt + now < lengths[row]
        }
        for row in periodic_round(policy, now, {row: raw_tokens(rows[row], state) for row, state in states.items()}):
            rows[row] = listed(rows[row], states[row].logical)
            events.append((row, states[row].logical))
    return events
