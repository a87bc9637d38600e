"""The sliding window's schedule: pure integers, checked against a list of tokens that is cut by hand, and real caches."""

from __future__ import annotations

import copy
import json
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import batch, tiny_model

from reasonkv import Budget, BudgetError, CompressedCache
from reasonkv.budget import ExplicitEventsWindow, Window
from reasonkv.periodic import periodic_events
from reasonkv.schedule import Lengths, bound, capacity, next_event, open_tokens, step, target

MODEL = tiny_model("llama", torch.float32)


@st.composite
def windows(draw: st.DrawFn, largest: int = 40) -> Window:
    size = draw(st.integers(2, largest))
    kept = draw(st.integers(1, size - 1))
    return Window(size, draw(st.integers(0, 12)), kept / size)


def plain_walk(window: Window, prompt: int, length: int) -> list[tuple[Lengths, int | None]]:
    """One token at a time with the tokens themselves: what is frozen, what is raw; of a window the first ones stay."""
    frozen, raw, states = list(range(prompt)), [], [(Lengths(n, n, prompt), None) for n in range(1, prompt + 1)]
    for token in range(prompt, length):
        raw.append(token)
        keep = None
        if len(raw) == window.size + window.buffer:
            frozen += raw[: round(window.retention * window.size)]
            raw = raw[window.size :]
            keep = len(frozen) + len(raw)
        states.append((Lengths(token + 1, len(frozen) + len(raw), prompt), keep))
    return states[:length]


@settings(max_examples=300, deadline=None)
@given(windows(), st.integers(1, 60), st.integers(1, 300))
def test_one_token_at_a_time_follows_the_rule(window: Window, prompt: int, length: int) -> None:
    state = Lengths(prompt=prompt)
    for expected, keep in plain_walk(window, prompt, length):
        boundary = next_event(window, state)
        assert boundary > state.logical
        state, event = step(window, state, 1)
        assert (state, event) == (expected, keep)
        assert (event is not None) == (boundary == state.logical)


@settings(max_examples=300, deadline=None)
@given(windows(), st.integers(1, 60), st.lists(st.integers(1, 90), min_size=1, max_size=12))
def test_any_pieces_give_the_same_states(window: Window, prompt: int, pieces: list[int]) -> None:
    """Stronger than for a budget: pieces may cross events, since an event at their end cuts every complete window."""
    walk = plain_walk(window, prompt, prompt + sum(pieces))
    state, _ = step(window, Lengths(prompt=prompt), prompt)
    assert state == Lengths(prompt, prompt, prompt)
    for fed in pieces:
        before, boundary = state, next_event(window, state)
        state, keep = step(window, state, fed)
        assert state == walk[state.logical - 1][0]
        assert (keep is not None) == (boundary <= state.logical)
        if keep is not None:
            start, end = open_tokens(window, before, state)
            assert (end - start) % window.size == 0 < end - start
            assert before.physical + fed - keep == (end - start) // window.size * (window.size - window.tokens)
            assert prompt <= start
            assert window.buffer <= state.logical - end < window.buffer + window.size


def test_windows_do_not_overlap_and_leave_nothing_out() -> None:
    window, state, spans = Window(8, 3, 0.5), Lengths(prompt=5), []
    for fed in [5] + [1] * 40 + [30] + [2] * 20:
        before = state
        state, keep = step(window, state, fed)
        if keep is not None:
            spans.append(open_tokens(window, before, state))
    assert spans[0][0] == 5
    assert all(end == start for (_, end), (start, _) in pairwise(spans))


@settings(max_examples=300, deadline=None)
@given(windows(), st.integers(1, 60), st.integers(1, 300), st.integers(1, 50), st.data())
def test_nothing_ever_holds_more_than_the_bound(
    window: Window, prompt: int, length: int, max_piece: int, data: st.DataObject
) -> None:
    state = Lengths(prompt=prompt)
    length = max(prompt, length)
    limit, most = bound(window, prompt, length, max_piece), 0
    while state.logical < length:
        left = (prompt if state.logical < prompt else length) - state.logical
        size = data.draw(st.integers(1, min(max_piece, left)))
        most = max(most, state.physical + size)
        state, _ = step(window, state, size)
    assert most <= limit <= length
    slope = -(-window.tokens * (length - prompt) // window.size)
    assert limit <= prompt + slope + window.size + window.buffer + max_piece - 1


@settings(max_examples=200, deadline=None)
@given(windows(), st.integers(1, 60), st.integers(1, 300))
def test_the_capacity_is_reached_and_no_more(window: Window, prompt: int, length: int) -> None:
    walk = plain_walk(window, prompt, length)
    peak = max((0, *(before.physical + 1 for before, _ in [(Lengths(), None), *walk[:-1]])))
    assert capacity(window, prompt, max(length, prompt)) == max(peak, prompt)


def test_physical_length_grows_with_the_retention() -> None:
    for retention in (0.2, 0.3, 0.6):
        window, state = Window(512, 64, retention), Lengths(prompt=100)
        state, _ = step(window, state, 100)
        for _ in range(100):
            state, _ = step(window, state, 512)
        frozen = 100 + window.tokens * ((51200 - 64) // 512)
        assert frozen + 64 <= state.physical < frozen + 64 + 512
        assert target(window, state) == state.physical  # nothing is due


def test_published_sizes_keep_whole_numbers_of_slots() -> None:
    assert [Window(size, 64, rho).tokens for size in (256, 384, 512) for rho in (0.2, 0.3)] == [
        51,
        77,
        77,
        115,
        102,
        154,
    ]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"size": 1}, "size must be a whole number of at least 2"),
        ({"size": 8.0}, "size must be"),
        ({"buffer": -1}, "buffer must be"),
        ({"retention": 0.0}, "between 0 and 1"),
        ({"retention": 1}, "between 0 and 1"),
        ({"size": 4, "retention": 0.1}, "keeps 0 of a window of 4"),
        ({"size": 4, "retention": 0.9}, "keeps 4 of a window of 4"),
    ],
)
def test_a_window_that_makes_no_sense_says_so_in_one_sentence(fields: dict, words: str) -> None:
    with pytest.raises(BudgetError, match=words) as error:
        Window(**fields)
    assert "\n" not in str(error.value)


def test_a_window_survives_its_record() -> None:
    for window in (Window(), Window(256, 32, 0.2), ExplicitEventsWindow(8, 2, 0.5, events=(20, 40))):
        back = Budget.from_dict(json.loads(json.dumps(window.to_dict())))
        assert back == window
        assert type(back) is type(window)
    assert Window().to_dict() | {"tokens": 154, "interval": 512, "recent": 64, "prompt": "on_top"} == Window().to_dict()
    with pytest.raises(BudgetError, match="colour"):
        Budget.from_dict({"retention": 0.3, "colour": 1})
    with pytest.raises(BudgetError, match="tokens of a window follow"):
        Budget.from_dict({**Window().to_dict(), "tokens": 100})
    with pytest.raises(ValueError, match="retention"):
        Window(retention=2.0)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["random", "keydiff", "streaming", "snapkv:window=3,kernel=3"]),
    windows(16).filter(lambda w: w.buffer >= 3),
    st.lists(st.integers(1, 30), min_size=1, max_size=3),
    st.lists(st.integers(1, 40), min_size=1, max_size=6),
)
def test_a_real_cache_holds_what_the_schedule_says(
    method: str, window: Window, prompts: list[int], pieces: list[int]
) -> None:
    """Any method: prompt and buffer are whole, frozen slots are never touched again, ragged batches in any pieces."""
    width = max(prompts)
    ids, mask, positions = batch([p + sum(pieces) for p in prompts])
    states = [Lengths(prompt=prompt) for prompt in prompts]
    with CompressedCache(MODEL, method, window, prompt_lengths=prompts) as cache, torch.no_grad():
        end = 0
        settled = [[list(range(prompt))] * 2 for prompt in prompts]
        for size in [width, *pieces]:
            start, end = end, end + size
            distances = cache.tokens_to_next_event()
            assert distances == [next_event(window, s) - s.logical for s in states]
            inputs = {"attention_mask": mask[:, :end], "position_ids": positions[:, start:end]}
            MODEL(ids[:, start:end], past_key_values=cache, **inputs)
            fed = mask[:, start:end].sum(-1).tolist()
            before = states
            stepped = [step(window, state, count) for state, count in zip(states, fed, strict=True)]
            states = [state for state, _ in stepped]
            assert [row.state for row in cache.rows] == states
            for row, (state, keep) in enumerate(stepped):
                slots = cache.slot_positions(1)[row]
                assert slots.shape[1] == state.physical
                assert bool((slots[:, 1:] > slots[:, :-1]).all())
                for head, old in zip(slots.tolist(), settled[row], strict=True):
                    assert head[: len(old)] == old
                if keep is None:
                    continue
                first, last = open_tokens(window, before[row], state)
                for head in slots.tolist():
                    inside = [token for token in head if first <= token < last]
                    assert len(inside) == (last - first) // window.size * window.tokens
                    assert head[last - state.logical :] == list(range(last, state.logical))
                settled[row] = [[token for token in head if token < last] for head in slots.tolist()]


def test_without_an_end_in_sight_storage_grows_and_is_counted() -> None:
    window, (ids, _, _) = Window(16, 4, 0.5), batch([200])
    held = {}
    for max_length in (200, None):
        with CompressedCache(MODEL, "random", window, max_length=max_length) as cache, torch.no_grad():
            MODEL(ids[:, :20], past_key_values=cache)
            for token in range(20, 200):
                MODEL(ids[:, token : token + 1], past_key_values=cache)
            row = cache.stats().rows[0]
            allocated = cache.compressed_layers[0].storage.allocated
            held[max_length] = (row, cache.slot_positions(0)[0])
            needed = capacity(window, 20, 200)
            assert row.physical_peak == needed
            assert allocated == needed if max_length else allocated >= needed
            assert row.events == (200 - 20 - 4) // 16
            assert row.tokens_dropped == row.events * 8
    (known, slots), (unknown, same) = held.values()
    assert torch.equal(slots, same)
    assert known == unknown  # bytes included: a row's share does not depend on how storage grew


def test_what_a_window_cannot_do_is_refused_in_one_sentence() -> None:
    with pytest.raises(BudgetError, match=r"newest 64 slots.*buffer holds 32"):
        CompressedCache(MODEL, "snapkv", Window(128, 32, 0.3))
    with pytest.raises(BudgetError, match="leave reopen_prompt out"):
        CompressedCache(MODEL, "random", Window(), reopen_prompt=True)
    with pytest.raises(BudgetError, match="window_events are for a Window"):
        CompressedCache(MODEL, "random", Budget(100, prompt="count"), window_events=[(0, 100)])
    with pytest.raises(BudgetError, match="give it a Window and window_events"):
        CompressedCache(MODEL, "random", ExplicitEventsWindow())
    with pytest.raises(BudgetError, match="row 2 of a batch of 1"):
        CompressedCache(MODEL, "random", Window(), window_events=[(2, 700)], prompt_lengths=[9]).tokens_to_next_event()


# -- the periodic policy: events from a list ----------------------------------------------------------------------------


def plain_policy(window: Window, prompts: list[int], lengths: list[int], period: int, most: int):
    """Step by step: every row's uncompressed tokens as a number, compressed down to the buffer."""
    raw, events = [0] * len(prompts), []
    for now in range(1, max(lengths)):
        running = [row for row, (p, n) in enumerate(zip(prompts, lengths, strict=True)) if p + now < n]
        for row in running:
            raw[row] += 1
        if now % period == 0:
            ready = sorted((-raw[row], row) for row in running if raw[row] >= window.size + window.buffer)
            for _, row in ready[:most]:
                events.append((row, prompts[row] + now))
                raw[row] = window.buffer
    return events


@settings(max_examples=200, deadline=None)
@given(
    windows(12),
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 200)), min_size=1, max_size=6),
    st.integers(1, 20),
    st.integers(1, 4),
)
def test_the_periodic_policy_is_the_plain_one(window: Window, rows: list, more: int, most: int) -> None:
    prompts, lengths = [p for p, _ in rows], [p + n for p, n in rows]
    period = window.size + more
    events = periodic_events(window, prompts, lengths, period, most)
    assert events == plain_policy(window, prompts, lengths, period, most)
    steps = [length - prompts[row] for row, length in events]
    assert all(step % period == 0 for step in steps)
    assert all(steps.count(step) <= most for step in steps)
    for row, prompt in enumerate(prompts):  # what a row gets is a schedule of its own
        own = tuple(length for other, length in events if other == row)
        listed = ExplicitEventsWindow(window.size, window.buffer, window.retention, events=own)
        state, seen, most_held = Lengths(prompt, prompt, prompt), [], prompt
        while state.logical < lengths[row]:
            most_held = max(most_held, state.physical + 1)
            before, (state, keep) = state, step(listed, state, 1)
            if keep is not None:
                seen.append(state.logical)
                assert before.physical + 1 - keep == window.size - window.tokens
                start, end = open_tokens(listed, before, state)
                assert (end - start, state.logical - end) == (window.size, window.buffer)
        assert tuple(seen) == own
        assert capacity(listed, prompt, lengths[row]) == most_held


def test_a_cache_obeys_a_list_of_events() -> None:
    window, prompts, length = Window(12, 4, 0.5), [10, 7, 13], 70
    events = periodic_events(window, prompts, [prompt + 50 for prompt in prompts], 16, 1)
    assert {row for row, _ in events} == {0, 1, 2}
    ids, mask, positions = batch([prompt + 50 for prompt in prompts])
    seen: list[tuple[int, int]] = []

    def note(layer, rows, view, plan):
        if layer == 0:
            seen.extend(zip(rows, view.length_B.tolist(), strict=True))
            open_BHN = ~view.is_protected_BHN
            assert open_BHN.sum(-1).unique().tolist() == [12]
            assert bool((plan.kept_BHK[..., -4:] >= view.positions_BHN.shape[2] - 4).all())

    with CompressedCache(MODEL, "random", window, prompt_lengths=prompts, window_events=events, observer=note) as cache:
        start = 13
        for end in [start, *range(start + 1, start + 51)]:
            begin = 0 if end == start else end - 1
            inputs = {"attention_mask": mask[:, :end], "position_ids": positions[:, begin:end]}
            with torch.no_grad():
                MODEL(ids[:, begin:end], past_key_values=cache, **inputs)
            if end == 20:
                twin = copy.deepcopy(cache)
        assert sorted(seen) == sorted(events)
        assert [row.events for row in cache.rows] == [sum(r == row for r, _ in events) for row in range(3)]
        assert [row.state.physical for row in cache.rows] == [
            prompt + 50 - 6 * cache.rows[row].events for row, prompt in enumerate(prompts)
        ]
        assert twin.tokens_to_next_event() == [
            next((at for r, at in events if r == row), length) - state.state.logical
            for row, state in enumerate(twin.rows)
        ]


def test_a_listed_event_must_end_a_forward_and_have_a_window() -> None:
    listed = ExplicitEventsWindow(8, 2, 0.5, events=(30,))
    state, _ = step(listed, Lengths(prompt=10), 10)
    with pytest.raises(BudgetError, match=r"ends at 31 tokens.*listed at 30"):
        step(listed, state, 21)
    assert step(listed, state, 20)[1] == 26
    with pytest.raises(BudgetError, match="finds no window of 8"):
        step(ExplicitEventsWindow(8, 2, 0.5, events=(15,)), state, 5)
    with pytest.raises(BudgetError, match="8 tokens apart"):
        ExplicitEventsWindow(8, 2, 0.5, events=(30, 37))
    with pytest.raises(BudgetError, match="longer than a window of 8"):
        periodic_events(Window(8, 2, 0.5), [4], [100], 8, 1)
    with pytest.raises(BudgetError, match="at least 1 row"):
        periodic_events(Window(8, 2, 0.5), [4], [100], 16, 0)
