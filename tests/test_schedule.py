"""The schedule is pure integers: checked against the rule written naively, and against what a real cache holds."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import batch, tiny_model

from reasonkv import Budget, BudgetError, CompressedCache, Window, batch_schedule, schedule
from reasonkv.batch_schedule import BatchSchedule, Event
from reasonkv.budget import ExplicitEventsWindow
from reasonkv.schedule import Lengths, bound, capacity, next_event, one_by_one, step, target


@st.composite
def budgets(draw: st.DrawFn, shares: bool = True) -> Budget:
    tokens = draw(st.integers(4, 40))
    sinks = draw(st.integers(0, 2))
    is_share = shares and draw(st.booleans())
    size = {"keep": draw(st.sampled_from([0.05, 0.1, 0.25, 1 / 3, 0.5, 0.7, 0.99]))} if is_share else {"tokens": tokens}
    recent = draw(st.integers(0, tokens - sinks))
    trigger = draw(st.sampled_from(["occupancy", "grid"]))
    cut = draw(st.sampled_from(["prefill", "first_event"]))
    interval = draw(st.integers(1, 16))
    return Budget(
        **size,
        interval=interval,
        early=draw(st.just(0) | st.integers(0, interval - 1)),
        sinks=sinks,
        recent=recent,
        prompt=draw(st.sampled_from(["count", "on_top", *(["keep"] if is_share else [])])),
        trigger=trigger,
        trigger_counts=draw(st.sampled_from(["all", "decode"])) if trigger == "grid" else "all",
        cut_prompt=cut,
        prefill_chunk=draw(st.none() | st.integers(4, 32)) if cut == "prefill" else None,
    )


def naive_kept(budget: Budget, L: int, prompt: int) -> int:
    """Slots that a compaction keeps beside a prompt on top, by the docstring of `Budget`."""
    if budget.keep is None:
        return budget.tokens
    counted = L - min(L, prompt) if budget.prompt == "on_top" else L
    least = max(1, budget.sinks + budget.recent)
    least = max(least, prompt + budget.recent + 1) if budget.prompt == "keep" else least
    return max(least, int(counted * Fraction(str(budget.keep))))


def naive_event(budget: Budget, state: Lengths, is_first: bool) -> bool:
    """Whether a compaction runs at `state`, right after its newest token, by the rules of the budget's docstring.

    `is_first`: none ran yet but those that the prompt's length alone made.
    """
    L, P, prompt = state.logical, state.physical, state.prompt
    on_top = min(L, prompt) if budget.prompt == "on_top" else 0
    tokens = naive_kept(budget, L, prompt)
    over = min(L, on_top + tokens) < P
    if prompt > L:
        return bool(budget.prefill_chunk) and L % budget.prefill_chunk == 0 and over
    if prompt == L:
        return budget.cut_prompt == "prefill" and over
    if budget.trigger == "occupancy":
        return on_top + tokens + budget.interval - (budget.early if is_first else 0) <= P
    counted = P - prompt if budget.trigger_counts == "decode" else P
    return (L + budget.early) % budget.interval == 0 and counted >= tokens and over


def naive_walk(budget: Budget, prompt: int, length: int) -> list[Lengths]:
    states, state, is_first = [], Lengths(prompt=prompt), True
    for _ in range(length):
        state = state._replace(logical=state.logical + 1, physical=state.physical + 1)
        if naive_event(budget, state, is_first):
            is_forced = state.logical <= prompt
            if state.logical == prompt + 1 and budget.cut_prompt == "first_event":
                is_forced = naive_event(budget, state, is_first=False)  # due without coming early
            is_first = is_first and is_forced
            state = state._replace(physical=target(budget, state))
        states.append(state)
    return states


@settings(max_examples=400, deadline=None)
@given(budgets(), st.integers(1, 120), st.integers(1, 250))
def test_one_token_at_a_time_follows_the_rule(budget: Budget, prompt: int, length: int) -> None:
    state = Lengths(prompt=prompt)
    for expected in naive_walk(budget, prompt, length):
        boundary = next_event(budget, state)
        state, keep = step(budget, state, 1)
        assert state == expected
        assert (keep is not None) == (boundary == state.logical)


@settings(max_examples=400, deadline=None)
@given(budgets(), st.integers(1, 120), st.integers(1, 250), st.data())
def test_pieces_that_end_at_every_boundary_give_the_same_states(
    budget: Budget, prompt: int, length: int, data: st.DataObject
) -> None:
    walk = naive_walk(budget, prompt, length)
    state = Lengths(prompt=prompt)
    while state.logical < length:
        boundary = next_event(budget, state)
        room = min(length, boundary or length) - state.logical
        state, _ = step(budget, state, data.draw(st.integers(1, room)))
        assert state == walk[state.logical - 1]


@settings(max_examples=400, deadline=None)
@given(budgets(), st.integers(1, 120), st.lists(st.integers(0, 60), min_size=1, max_size=12))
def test_a_piece_that_crosses_boundaries_has_one_event_at_its_end(
    budget: Budget, prompt: int, pieces: list[int]
) -> None:
    state = Lengths(prompt=prompt)
    for fed in pieces:
        boundary = next_event(budget, state)
        after, keep = step(budget, state, fed)
        assert after.logical == state.logical + fed
        if fed and boundary is not None and after.logical >= boundary:
            on_top = min(after.logical, prompt) if budget.prompt == "on_top" else 0
            kept = min(after.logical, on_top + naive_kept(budget, after.logical, prompt))
            assert keep == after.physical == kept < state.physical + fed
        else:
            assert keep is None
            assert after.physical == state.physical + fed
        state = after


def rows_of(any_budget: st.SearchStrategy[Budget | None]) -> st.SearchStrategy[list[tuple[Budget | None, int]]]:
    return st.lists(st.tuples(any_budget, st.integers(0, 120)), min_size=1, max_size=4)


any_budget = (
    st.none() | budgets() | st.builds(Window, st.integers(4, 20), st.integers(0, 8), st.sampled_from([0.25, 0.5]))
)


@settings(max_examples=400, deadline=None)
@given(rows_of(any_budget), st.data())
def test_courses_say_what_step_says(rows: list[tuple[Budget | None, int]], data: st.DataObject) -> None:
    courses, states, peaks = (
        BatchSchedule(len(rows) + 1),
        [Lengths(prompt=prompt) for _, prompt in rows],
        [0] * len(rows),
    )
    for place, (budget, _) in enumerate(rows):
        courses.start(place, budget, states[place])
    for _ in range(data.draw(st.integers(1, 40))):
        # a forward feeds some of the rows, in any order
        places = data.draw(st.permutations(range(len(rows))))[: data.draw(st.integers(1, len(rows)))]
        fed = data.draw(st.lists(st.integers(0, 60) | st.just(1), min_size=len(places), max_size=len(places)))
        expected = []
        for row, (place, n) in enumerate(zip(places, fed, strict=True)):
            before, (after, keep) = states[place], step(rows[place][0], states[place], n)
            held = before.physical + n
            if keep is not None:
                expected.append(Event(row, before, held, after))
            states[place], peaks[place] = after, max(peaks[place], held)
        assert courses.advance(np.array(places), np.array(fed)) == expected
        assert [courses.state(place) for place in range(len(rows))] == states
        assert [courses.peak(place) for place in range(len(rows))] == peaks
        assert [one.tolist() for one in courses.lengths(np.arange(len(rows)))] == [
            [state.logical for state in states], [state.physical for state in states],
        ]  # fmt: skip
    courses.start(
        0, Budget(8, interval=4, sinks=1, recent=1, prompt="count"), Lengths(100, 11, 100)
    )  # nothing is carried on
    assert courses.advance(np.array([0]), np.array([1])) == [Event(0, Lengths(100, 11, 100), 12, Lengths(101, 8, 100))]
    assert courses.peak(0) == 12


def test_courses_ask_for_the_next_event_once_an_event(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    for module in (schedule, batch_schedule):
        monkeypatch.setattr(module, "next_event", lambda *given: asked.append(1) or next_event(*given))
    courses, events = BatchSchedule(1), 0
    courses.start(0, Budget(64, interval=32, recent=16, prompt="count"), Lengths(prompt=10))
    for _ in range(1000):
        events += len(courses.advance(np.array([0]), np.array([1])))
    assert events == 29 and len(asked) == 2 * events + 1  # `step` asks, too, where there is one


def test_a_forward_that_cannot_be_moves_no_row() -> None:
    courses, places = BatchSchedule(2), np.arange(2)
    courses.start(0, None, Lengths(prompt=4))
    courses.start(1, ExplicitEventsWindow(8, 2, 0.25, events=(20,)), Lengths(prompt=4))
    with pytest.raises(BudgetError, match="listed at 20"):
        courses.advance(places, np.array([3, 21]))
    assert courses.state(0) == courses.state(1) == Lengths(prompt=4)


@settings(max_examples=400, deadline=None)
@given(any_budget, st.integers(0, 60), st.integers(0, 60), st.integers(0, 120))
def test_one_by_one_is_a_step_a_token(budget: Budget | None, prompt: int, start: int, more: int) -> None:
    first, _ = step(budget, Lengths(prompt=prompt), start)
    state = first
    for _ in range(more):
        state, _ = step(budget, state, 1)
    assert one_by_one(budget, first, start + more) == state


@settings(max_examples=400, deadline=None)
@given(budgets(), st.integers(1, 120), st.integers(1, 250), st.integers(1, 20), st.data())
def test_nothing_ever_holds_more_than_the_bound(
    budget: Budget, prompt: int, length: int, max_piece: int, data: st.DataObject
) -> None:
    state = Lengths(prompt=prompt)
    limit = bound(budget, prompt, max(length, prompt), max_piece)
    while state.logical < length:
        if state.logical < prompt:
            size = min(next_event(budget, state) or prompt, prompt) - state.logical
        else:
            size = data.draw(st.integers(1, min(max_piece, length - state.logical)))
        assert state.physical + size <= limit
        state, _ = step(budget, state, size)
    assert capacity(budget, prompt, length) <= bound(budget, prompt, length)


def test_the_bound_is_tight_in_steady_state() -> None:
    budget = Budget(32, interval=8, sinks=0, recent=0, prompt="count")
    most, state = 0, Lengths(prompt=10)
    for _ in range(200):
        most = max(most, state.physical + 1)
        state, _ = step(budget, state, 1)
    assert most == bound(budget, 10, 200) == capacity(budget, 10, 200) == 40


@pytest.mark.parametrize("prompt", ["count", "on_top"])
def test_a_share_of_the_length_is_kept_at_every_compaction(prompt: str) -> None:
    """0.1 is a tenth, whatever a float says, and 30 slots (4 sinks, 26 recent tokens) are kept at least."""
    budget = Budget(keep=0.1, interval=10, sinks=4, recent=26, prompt=prompt)
    state, kept = Lengths(prompt=50), []
    for _ in range(3000):
        state, keep = step(budget, state, 1)
        if keep is not None:
            kept.append((state.logical, keep))
    on_top = 50 if prompt == "on_top" else 0
    assert len(kept) > 200 and all(keep == on_top + max(30, (L - on_top) // 10) for L, keep in kept)
    assert kept[-1][1] > on_top + 280


def test_default_sinks_and_recent_tokens_shrink_with_a_small_budget_and_set_ones_do_not() -> None:
    assert [Budget(n).protected() for n in (512, 68, 67, 64, 16, 1)] == [
        (4, 64), (4, 64), (4, 33), (4, 32), (2, 8), (0, 0)
    ]  # fmt: skip
    assert Budget(64, recent=16).protected(recent=20) == (4, 20)
    assert Budget(64) == Budget(64, recent=64), "fields stay as they are, so that a sweep can replace tokens"
    with pytest.raises(BudgetError, match="8 tokens cannot hold 6 sinks"):
        Budget(8, sinks=6)


def test_no_budget_never_has_an_event() -> None:
    assert next_event(None, Lengths(100, 100, 10)) is None
    assert step(None, Lengths(100, 100, 10), 50) == (Lengths(150, 150, 10), None)
    assert bound(None, 10, 200) == 200


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tokens": 0}, "tokens must be"),
        ({"tokens": 0.5}, "whole number of at least 1, not 0.5 .for a share of the length give keep=0.5"),
        ({"tokens": "512"}, "tokens must be a whole number of at least 1, not '512'"),
        ({"tokens": None}, "either tokens, such as tokens=512, or a share"),
        ({"tokens": np.float32(64)}, "whole number"),
        ({"tokens": 64, "keep": 0.5}, "either tokens"),
        ({"keep": 1}, "keep must be a number between 0 and 1, not 1"),
        ({"keep": "0.2"}, "between 0 and 1, not '0.2'"),
        ({"keep": 0.5, "interval": None}, "interval must be a whole number of at least 1, not None"),
        ({"tokens": 10, "recent": 30}, "10 tokens cannot hold 1 sinks and 30 recent"),
        ({"tokens": 100, "interval": 0}, "interval must be"),
        ({"tokens": 100, "prompt": "drop"}, "count, keep, on_top"),
        ({"tokens": 100, "trigger_counts": "decode"}, "trigger='grid'"),
        ({"tokens": 100, "prefill_chunk": 64, "cut_prompt": "first_event"}, "prefill_chunk"),
        ({"tokens": 100, "prefill_chunk": 0}, "prefill_chunk must be"),
        ({"tokens": True}, "tokens must be"),
    ],
)
def test_a_budget_that_makes_no_sense_says_so_in_one_sentence(fields: dict, words: str) -> None:
    with pytest.raises(BudgetError, match=words) as error:
        Budget(**fields)
    assert "\n" not in str(error.value)


def test_numbers_of_numpy_become_plain_ones() -> None:
    made = Budget(np.int64(512), interval=np.int32(8), prefill_chunk=np.int16(32))
    assert made == Budget(512, interval=8, prefill_chunk=32)
    assert all(type(value) in (int, str) for value in made.to_dict().values())
    assert type(Budget(keep=np.float64(0.25)).keep) is float


def test_a_budget_survives_its_record() -> None:
    budget = Budget(100, interval=7, prompt="on_top", trigger="grid", trigger_counts="decode")
    assert Budget.from_dict(budget.to_dict()) == budget
    assert "keep" not in budget.to_dict(), "records of budgets in tokens are what they were"
    share = Budget(keep=0.25, prompt="count")
    assert Budget.from_dict(share.to_dict()) == share
    with pytest.raises(BudgetError, match="colour"):
        Budget.from_dict({"tokens": 100, "colour": 1})


MODEL = tiny_model("llama", torch.float32)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["random", "keydiff", "streaming", "snapkv:window=3,kernel=3"]),
    budgets(shares=False).filter(lambda b: b.tokens >= b.sinks + max(b.recent, 3)),
    st.lists(st.integers(1, 30), min_size=1, max_size=3),
    st.lists(st.integers(1, 12), min_size=1, max_size=10),
)
def test_a_real_cache_holds_what_the_schedule_says(
    method: str, budget: Budget, prompts: list[int], pieces: list[int]
) -> None:
    """Occupancy, sinks, recent tokens and a protected prompt, for ragged batches cut in arbitrary pieces."""
    width = max(prompts)
    ids, mask, positions = batch([p + sum(pieces) for p in prompts])
    states = [Lengths(prompt=prompt) for prompt in prompts]
    with CompressedCache(MODEL, method, budget, prompt_lengths=prompts) as cache, torch.no_grad():
        end = 0
        for size in [width, *pieces]:
            start, end = end, end + size
            MODEL(
                ids[:, start:end],
                attention_mask=mask[:, :end],
                position_ids=positions[:, start:end],
                past_key_values=cache,
            )
            fed = mask[:, start:end].sum(-1).tolist()
            stepped = [step(budget, state, count) for state, count in zip(states, fed, strict=True)]
            states = [state for state, _ in stepped]
            assert [row.state for row in cache.rows] == states
            kept = cache.slot_positions(1)
            recent = max(budget.recent, cache.method.needs.recent)
            for index, state in enumerate(states):
                slots = kept[index]
                assert slots.shape[1] == state.physical
                assert bool((slots[:, 1:] > slots[:, :-1]).all())
                assert int(slots.max()) < state.logical  # padding is never stored
                must = set(range(min(budget.sinks, state.logical)))
                if budget.prompt == "on_top":
                    must |= set(range(min(state.prompt, state.logical)))
                had_event = stepped[index][1] is not None
                newest = min(recent, state.physical) if had_event else fed[index]
                must |= set(range(max(state.logical - newest, 0), state.logical))
                for head in slots.tolist():
                    assert must <= set(head)
