"""What can be said about an output from its tokens alone: loops, and where it leaves another output."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

LONGEST_PERIOD = 64
"""Longest n-gram whose repetition counts as a loop, tokens."""
REPEATS = 3
"""How often an n-gram must stand back to back to count as one."""


def repetition(tokens: Sequence[int]) -> float:
    """Share of tokens that lie in a loop: a run in which one n-gram of 1 to 64 tokens stands at least 3 times in a row.

    Only exact, immediate periodicity counts; text that comes back to the same words after others is no loop. The run
    ends with its last token that still follows the period, so that a last, unfinished repeat counts as well.

    Returns:
        0 to 1; 0 for no tokens.
    """
    ids_T = np.asarray(tokens, dtype=np.int64)
    total = len(ids_T)
    change = np.zeros(total + 1, dtype=np.int64)  # +1 where a run of any period begins, -1 after it ends
    for period in range(1, min(LONGEST_PERIOD, total // REPEATS) + 1):
        starts, stops = _runs(ids_T[period:] == ids_T[:-period])
        long = stops - starts >= (REPEATS - 1) * period
        # a match at place i is between tokens i and i + period, so a run of matches covers `period` more tokens
        np.add.at(change, starts[long], 1)
        np.add.at(change, stops[long] + period, -1)
    return float((change.cumsum()[:total] > 0).mean()) if total else 0.0


def first_divergence(tokens: Sequence[int], reference: Sequence[int]) -> int | None:
    """Index of the first token in which an output differs from another, or None if they are equal.

    Where one is the beginning of the other, they differ where it ends.
    """
    shared = min(len(tokens), len(reference))
    different = np.asarray(tokens[:shared], dtype=np.int64) != np.asarray(reference[:shared], dtype=np.int64)
    if different.any():
        return int(different.argmax())
    return None if len(tokens) == len(reference) else shared


def _runs(flags_N: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First and past-the-last index of every run of True."""
    edges = np.diff(np.concatenate([[0], flags_N.astype(np.int8), [0]]))
    return np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
