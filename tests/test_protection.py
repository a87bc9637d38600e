"""One rule says what no method may drop, for every runtime."""

from __future__ import annotations

import pytest
import torch

from reasonkv import Budget, Window
from reasonkv.budget import ExplicitEventsWindow
from reasonkv.protection import protected_slots
from reasonkv.schedule import Lengths


def protected(
    budgets: list[Budget], states: list[tuple[Lengths, Lengths]], held: int, recent: int = 0
) -> list[list[int]]:
    """Token indices that are protected, per row; every row holds its newest `held` tokens in two heads."""
    before, after = [one for one, _ in states], [one for _, one in states]
    ends = torch.tensor([one.logical for one in after])
    index = (ends[:, None, None] - held + torch.arange(held)).expand(-1, 2, -1)
    prompts = torch.tensor([one.prompt for one in after])
    found = protected_slots(index, index < prompts[:, None, None], budgets, before, after, recent)
    assert torch.equal(found[:, 0], found[:, 1])
    return [row[mask].tolist() for row, mask in zip(index[:, 0], found[:, 0], strict=True)]


def decoded(length: int, held: int, prompt: int, keep: int) -> tuple[Lengths, Lengths]:
    """A one-token forward that ends at `length` tokens with `held` slots, of which its event keeps some."""
    return Lengths(length - 1, held - 1, prompt), Lengths(length, keep, prompt)


@pytest.mark.parametrize(
    ("budget", "recent", "expected"),
    [
        (Budget(12, interval=8, sinks=2, recent=3, prompt="count"), 0, [0, 1, 17, 18, 19]),
        (
            Budget(12, interval=8, sinks=2, recent=3, prompt="count"),
            5,
            [0, 1, 15, 16, 17, 18, 19],
        ),  # the larger window, once
        (Budget(12, interval=8, sinks=0, recent=0, prompt="count"), 0, []),
        (Budget(12, interval=8, sinks=0, recent=2, prompt="keep"), 0, [0, 1, 2, 3, 18, 19]),
        (Budget(5, interval=15, sinks=0, recent=2, prompt="keep"), 0, [18, 19]),  # 4 + 2 do not fit into 5
        (Budget(5, interval=15, sinks=0, recent=2, prompt="on_top"), 0, [0, 1, 2, 3, 18, 19]),
    ],
)
def test_sinks_newest_slots_and_a_kept_prompt_that_fits(budget: Budget, recent: int, expected: list[int]) -> None:
    assert protected([budget], [decoded(20, 20, 4, budget.tokens)], 20, recent) == [expected]


def test_every_row_keeps_its_own_prompt() -> None:
    budget = Budget(12, interval=8, sinks=0, recent=1, prompt="keep")
    states = [decoded(20, 20, 3, 12), decoded(20, 20, 15, 12)]  # the second prompt does not fit
    assert protected([budget, budget], states, 20) == [[0, 1, 2, 19], [19]]


def test_of_a_window_only_the_tokens_whose_turn_it_is_are_open() -> None:
    window = Window(size=8, buffer=3, retention=0.5)
    states = [decoded(15, 15, 4, 11), decoded(16, 16, 5, 12)]
    every = [set(range(15)), set(range(1, 16))]
    found = protected([window, window], states, 15)
    assert [sorted(all_ - set(row)) for all_, row in zip(every, found, strict=True)] == [
        list(range(4, 12)), list(range(5, 13)),
    ]  # fmt: skip


def test_rows_whose_events_are_listed_have_windows_of_their_own() -> None:
    budgets = [ExplicitEventsWindow(8, 3, 0.5, events=(20,)), ExplicitEventsWindow(8, 3, 0.5, events=(18,))]
    found = protected(budgets, [decoded(20, 20, 4, 16), decoded(18, 18, 4, 14)], 18)
    assert sorted(set(range(2, 20)) - set(found[0])) == list(range(9, 17))
    assert sorted(set(range(18)) - set(found[1])) == list(range(7, 15))
