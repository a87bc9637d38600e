"""The budget of an engine whose steps decide which rows are compressed, and when."""

from __future__ import annotations

import pytest

from reasonkv.budget import Budget, BudgetError, ExplicitEventsWindow, PeriodicWindow, Window
from reasonkv.schedule import Lengths, capacity, listed, periodic_round, raw_tokens, row_budget, step

POLICY = PeriodicWindow(8, 3, 0.25, period=12, most=2)


def test_records_give_the_budget_back() -> None:
    assert Budget.from_dict(POLICY.to_dict()) == POLICY
    assert Budget.from_dict(Window(8, 3, 0.25).to_dict()) == Window(8, 3, 0.25)
    assert Budget.from_dict(POLICY.row().to_dict()) == ExplicitEventsWindow(8, 3, 0.25)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"period": 8}, "longer than a window of 8"),
        ({"most": 0}, "at least 1 row"),
        ({"period": 12.5}, "whole number"),
        ({"most": True}, "whole number"),
    ],
)
def test_a_round_that_makes_no_sense_is_refused(fields: dict[str, object], sentence: str) -> None:
    with pytest.raises(BudgetError, match=sentence):
        PeriodicWindow(8, 3, 0.25, **{"period": 12, "most": 2, **fields})  # type: ignore[arg-type]


def test_a_round_takes_the_rows_with_most_uncompressed_tokens() -> None:
    raw = {"c": 11, "b": 14, "a": 14, "d": 30, "e": 10}
    assert periodic_round(POLICY, 24, raw) == ["d", "b"]  # of equals the first
    assert periodic_round(POLICY, 24, {"c": 11, "e": 10}) == ["c"]  # a window and its buffer are 11 tokens
    assert periodic_round(POLICY, 0, raw) == periodic_round(POLICY, 25, raw) == []


def test_uncompressed_tokens_count_from_the_prompt_or_the_last_windows_buffer() -> None:
    row = row_budget(POLICY, 9)
    assert isinstance(row, ExplicitEventsWindow) and row_budget(Budget(128, prompt="count"), 9) == Budget(
        128, prompt="count"
    )
    assert raw_tokens(row, Lengths(3, 3, prompt=5)) == 0  # the prompt is not whole yet
    assert raw_tokens(row, Lengths(20, 20, prompt=5)) == 15
    assert raw_tokens(listed(row, 20), Lengths(22, 16, prompt=5)) == 5  # the buffer of 3 and two more


@pytest.mark.parametrize("prompt", [1, 7, 30])
@pytest.mark.parametrize("phase", range(12))
def test_capacity_holds_a_row_alone_whenever_it_comes(prompt: int, phase: int) -> None:
    longest = prompt + 150
    row, state, peak = row_budget(POLICY, 9), Lengths(prompt, prompt, prompt), prompt
    assert isinstance(row, ExplicitEventsWindow)
    for now in range(phase + 1, phase + 151):
        length = state.logical + 1
        if periodic_round(POLICY, now, {"": raw_tokens(row, Lengths(length, 0, prompt))}):
            row = listed(row, length)
        peak = max(peak, state.physical + 1)
        state, _ = step(row, state, 1)
        assert peak <= capacity(POLICY, prompt, state.logical)
    assert state.logical == longest and len(row.events) >= 10
    assert capacity(POLICY, prompt, longest) <= peak + POLICY.dropped * 2  # and is not far above
