"""Rows by budget: layers whose budgets are equal in every row share one account of what is held, and one forward.

Methods with one budget have one track, and nothing below costs them anything per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from reasonkv import schedule
from reasonkv.budget import Budget
from reasonkv.methods import Method, layer_budgets
from reasonkv.runtimes.transformers.rows import Piece, Row
from reasonkv.runtimes.transformers.setup import listed_budgets


@dataclass
class Track:
    """Layers that hold equally many slots of every row at all times.

    Args:
        layers: how many.
        rows: what each of them holds of every row.
        piece: the forward under way, or None.
    """

    layers: int
    rows: list[Row]
    piece: Piece | None = None


def make_tracks(
    method: Method,
    budget: Budget | None,
    layers: int,
    prompts: Sequence[int],
    *,
    seeds: Sequence[int] | None = None,
    window_events: Sequence[tuple[int, int]] | None = None,
) -> tuple[list[Track], list[int]]:
    """Empty rows of a batch, and the number of every compressed layer's track.

    Args:
        method: says how layers share a budget; most give all the same.
        budget: of the cache, None for full KV.
        layers: compressed layers.
        prompts: tokens of each row's prompt.
        seeds: of each row, 0 unless given.
        window_events: as in `CompressedCache`.

    Raises:
        BudgetError: what is protected does not fit a layer's share.

    """
    seeds = seeds or [0] * len(prompts)
    rows = listed_budgets(budget, window_events, len(prompts))
    own = [layer_budgets(method, row, layers, prompt) for row, prompt in zip(rows, prompts, strict=True)]
    tracks: dict[tuple[Budget | None, ...], Track] = {}
    for column in zip(*own, strict=True):  # one layer's budget in every row
        if column not in tracks:
            tracks[column] = Track(0, [_row(*one) for one in zip(prompts, column, seeds, strict=True)])
        tracks[column].layers += 1
    numbers = {column: number for number, column in enumerate(tracks)}
    return list(tracks.values()), [numbers[column] for column in zip(*own, strict=True)]


def tokens_to_next_event(tracks: Sequence[Track]) -> list[int | None]:
    """Per row, how many more tokens until the next event of any layer; None: there will be none."""
    found = []
    for rows in zip(*(track.rows for track in tracks), strict=True):
        events = [schedule.next_event(row.budget, row.state) for row in rows]
        found.append(min((event for event in events if event is not None), default=None))
    lengths = [row.state.length for row in tracks[0].rows] if tracks else []
    return [None if event is None else event - length for event, length in zip(found, lengths, strict=True)]


def _row(prompt: int, budget: Budget | None, seed: int) -> Row:
    return Row(schedule.State(prompt=prompt), budget, seed, prompt_spans=[(0, prompt)])
