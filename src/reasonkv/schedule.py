"""When an event falls and how many slots stay: pure integer functions of what was fed.

The transformers cache, the replay harness and a serving engine each compute these functions and agree without a
message, because nothing here looks at a tensor. A method decides *which* slots stay, never how many or when.

Feeding the same tokens in other pieces gives the same states if and only if every boundary `next_event` names ends
a piece; a piece that crosses boundaries has one event, at its end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from reasonkv.budget import Budget, BudgetError, ExplicitEventsWindow, PeriodicWindow, Window

Integers = NDArray[np.int64]
_NEVER = np.iinfo(np.int64).max


class State(NamedTuple):
    """One row of one layer.

    Args:
        length: logical length L, tokens seen.
        held: physical length P, slots held per KV head.
        prompt: tokens of the prompt, known from the first forward on.

    """

    length: int = 0
    held: int = 0
    prompt: int = 0


def target(budget: Budget, state: State) -> int:
    """Slots that stay after an event at `state.length`, `state.held` of them held before it.

    min(L, p + tokens), p = the prompt's tokens if on top; of a `Window`, what is left once every complete one is cut.
    """
    if isinstance(budget, Window):
        start, end = _due(budget, state)
        return state.held - (end - start) // budget.size * budget.dropped
    on_top = min(state.length, state.prompt) if budget.prompt == "on_top" else 0
    return min(state.length, on_top + budget.tokens)


def next_event(budget: Budget | None, state: State) -> int | None:
    """The logical length (> `state.length`) at which the next event falls when tokens arrive one by one.

    Args:
        budget: None for a cache without bound.
        state: the row now.

    Returns:
        None when no event will ever fall.

    """
    if budget is None:
        return None
    dropped = state.length - state.held  # constant until the next event: at length n, n - dropped slots are held
    if isinstance(budget, ExplicitEventsWindow):
        return next(iter(budget.events[dropped // budget.dropped :]), None)
    if isinstance(budget, Window):
        return max(state.length + 1, state.prompt + (dropped // budget.dropped + 1) * budget.size + budget.buffer)
    if state.length < state.prompt:
        if budget.prefill_chunk and budget.prompt == "count":
            first = max(state.length, dropped + budget.tokens) + 1
            boundary = _ceil_to(first, budget.prefill_chunk)
            if boundary < state.prompt:
                return boundary
        whole = state._replace(length=state.prompt)
        if budget.cut_prompt == "prefill" and state.prompt - dropped > target(budget, whole):
            return state.prompt
    first_decode = max(state.length, state.prompt) + 1
    on_top = state.prompt if budget.prompt == "on_top" else 0
    if budget.trigger == "occupancy":
        return max(first_decode, dropped + on_top + budget.tokens + budget.interval)
    counted_out = state.prompt if budget.trigger_counts == "decode" else 0
    # an event must drop something, so at least one slot more than stays has to be held
    held_needed = max(counted_out + budget.tokens, on_top + budget.tokens + 1)
    return _ceil_to(max(first_decode, dropped + held_needed), budget.interval)


def step(budget: Budget | None, state: State, fed: int) -> tuple[State, int | None]:
    """Feed `fed` tokens in one forward.

    Returns:
        The state after the forward, and the number of slots its event keeps (None: no event).

    Raises:
        BudgetError: the forward does not end at the event of an `ExplicitEventsWindow`, or no window is whole.

    """
    grown = State(state.length + fed, state.held + fed, state.prompt)
    boundary = next_event(budget, state)
    if budget is None or boundary is None or fed == 0 or grown.length < boundary:
        return grown, None
    keep = target(budget, grown)
    return grown._replace(held=keep), keep


def one_by_one(budget: Budget | None, state: State, length: int) -> State:
    """The state once tokens have arrived one by one up to `length`."""
    while state.length < length:
        boundary = next_event(budget, state)
        end = length if boundary is None else min(boundary, length)
        state, _ = step(budget, state, end - state.length)
    return state


class Event(NamedTuple):
    """One row's event at the end of a forward.

    Args:
        row: which one, counted among the forward's.
        before: its state before the forward.
        held: slots it holds until the event, the forward's among them.
        after: its state after the event, which keeps `after.held`.

    """

    row: int
    before: State
    held: int
    after: State


class BatchSchedule:
    """Many rows on their way through their budgets: of each it says what `step` says.

    Between two events of a row nothing but its length grows. So a forward of all rows is a few array operations, and
    `next_event` is asked once an event instead of once a token.

    Args:
        places: rows there can be at once; each has a place, from 0 on.

    """

    def __init__(self, places: int) -> None:
        self.budgets: list[Budget | None] = [None] * places
        self.prompts = [0] * places
        self._numbers = np.zeros((3, places), dtype=np.int64)
        self._lengths, self._held, self._boundaries = self._numbers
        self._peaks = [0] * places  # before the newest event

    def start(self, place: int, budget: Budget | None, state: State) -> None:
        """A row begins; None is one without bound."""
        self._lengths[place], self._held[place], self.prompts[place] = state
        self._peaks[place] = 0
        self.set_budget(place, budget)

    def set_budget(self, place: int, budget: Budget | None) -> None:
        """From now on a row follows this one."""
        self.budgets[place] = budget
        boundary = next_event(budget, self.state(place))
        self._boundaries[place] = _NEVER if boundary is None else boundary

    def state(self, place: int) -> State:
        """A row now."""
        return State(int(self._lengths[place]), int(self._held[place]), self.prompts[place])

    def peak(self, place: int) -> int:
        """Most slots a row held at once so far, until its events among them."""
        return max(self._peaks[place], int(self._held[place]))

    def lengths(self, places_B: Integers) -> Integers:
        """Logical and physical lengths of some rows, [2, B]."""
        return self._numbers[:2, places_B]

    def advance(self, places_B: Integers, fed_B: Integers) -> list[Event]:
        """Feed so many tokens to each of some rows in one forward.

        Raises:
            BudgetError: as `step`.

        """
        now = self._numbers[:, places_B]
        grown = now[:2] + fed_B
        due = [(row, int(places_B[row])) for row in np.flatnonzero(grown[0] >= now[2]).tolist()]
        events = []
        for row, place in due:
            before = self.state(place)
            after, keep = step(self.budgets[place], before, int(fed_B[row]))
            if keep is not None:
                events.append(Event(row, before, int(grown[1, row]), after))
        self._numbers[:2, places_B] = grown
        for row, _, held, after in events:
            place = places_B[row]
            self._held[place], self._peaks[place] = after.held, max(self._peaks[place], held)
        for _, place in due:
            self.set_budget(place, self.budgets[place])
        return events


def open_tokens(window: Window, before: State, after: State) -> tuple[int, int]:
    """Half-open range of token indices that the event of a forward from `before` to `after` chooses from.

    All of them are still held: nothing inside was ever cut. Every other slot is protected at this event.
    """
    return _due(window, after._replace(held=before.held + after.length - before.length))


def _due(window: Window, state: State) -> tuple[int, int]:
    """The tokens that an event at `state.length` cuts, as a half-open range: a whole number of windows."""
    done = (state.length - state.held) // window.dropped
    if not isinstance(window, ExplicitEventsWindow):
        start = state.prompt + done * window.size
        return start, start + max(0, state.length - window.buffer - start) // window.size * window.size
    if state.length != window.events[done]:
        raise BudgetError(
            f"A forward ends at {state.length} tokens of a row whose event was listed at {window.events[done]}; "
            "end a forward there (tokens_to_next_event says how far it is)."
        )
    start = state.length - window.buffer - window.size
    if start < state.prompt:
        raise BudgetError(
            f"An event listed at {state.length} tokens finds no window of {window.size} before its buffer of "
            f"{window.buffer}: the prompt alone is {state.prompt} tokens."
        )
    return start, start + window.size


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
            row: State(prompt + now, prompt=prompt) for row, prompt in enumerate(prompts) if prompt + now < lengths[row]
        }
        for row in periodic_round(policy, now, {row: raw_tokens(rows[row], state) for row, state in states.items()}):
            rows[row] = listed(rows[row], states[row].length)
            events.append((row, states[row].length))
    return events


Row = TypeVar("Row", int, str)


def periodic_round(policy: PeriodicWindow, step: int, raw: Mapping[Row, int]) -> list[Row]:
    """Which rows of an engine's step have an event at its end.

    Args:
        policy: how often, and how many.
        step: its number; a round falls on every multiple of `policy.period`.
        raw: `raw_tokens` of every row the step feeds, by what it is called, in the step's order.

    Returns:
        Those with most uncompressed tokens first; of equals, those that stand first in `raw`.

    """
    if step == 0 or step % policy.period:
        return []
    ready = [row for row, tokens in raw.items() if tokens >= policy.size + policy.buffer]
    return sorted(ready, key=lambda row: -raw[row])[: policy.most]


def row_budget(budget: Budget) -> Budget:
    """What one row of an engine starts with: the engine's budget, or a list that its steps will add events to."""
    return budget.row() if isinstance(budget, PeriodicWindow) else budget


def raw_tokens(window: ExplicitEventsWindow, state: State) -> int:
    """Tokens of a row, beyond its prompt, that came since the last window cut from it: 0 at least."""
    start = window.events[-1] - window.buffer if window.events else state.prompt
    return max(0, state.length - start)


def listed(window: ExplicitEventsWindow, length: int) -> ExplicitEventsWindow:
    """A row's window with one more event, at that length."""
    return replace(window, events=(*window.events, length))


def capacity(budget: Budget | None, prompt: int, max_length: int) -> int:
    """Slots to allocate for a row that decodes one token at a time, once a prompt cut at prefill has been cut.

    A longer piece, or a longer prompt before its cut, is staged beside this storage; see `bound` for that peak.
    """
    if budget is None:
        return max_length
    if isinstance(budget, Window):
        return _window_capacity(budget, prompt, max_length)
    on_top = prompt if budget.prompt == "on_top" else 0
    needed = on_top + budget.tokens + budget.interval
    if budget.trigger == "grid" and budget.trigger_counts == "decode":
        needed = max(needed, prompt + budget.tokens + budget.interval)
    if budget.cut_prompt == "first_event":
        needed = max(needed, prompt + (1 if budget.trigger == "occupancy" else budget.interval))
    return min(max_length, needed)


def bound(budget: Budget | None, prompt: int, max_length: int, max_piece: int = 1) -> int:
    """Most slots a row ever holds at once per KV head, the forward that triggers an event included.

    Args:
        budget: None for a cache without bound.
        prompt: tokens of the prompt.
        max_length: most tokens the row will ever see.
        max_piece: most tokens of one forward after the prompt. The prompt is fed whole, or in pieces that end at its
            boundaries.

    """
    if budget is None:
        return max_length
    in_prompt = prompt
    if budget.prefill_chunk and budget.prompt == "count":
        in_prompt = min(prompt, budget.tokens + budget.prefill_chunk)
    return min(max_length, max(capacity(budget, prompt, max_length) + max_piece - 1, in_prompt))


def _window_capacity(window: Window, prompt: int, max_length: int) -> int:
    """Most slots of a row fed one token at a time: at its end, or at an event before, its cut not yet made."""
    if isinstance(window, ExplicitEventsWindow):
        events = [length for length in window.events if length <= max_length]
        done, peaks = len(events), [length - number * window.dropped for number, length in enumerate(events)]
    elif isinstance(window, PeriodicWindow):  # of a row alone, whose first round just missed it
        first = prompt + window.size + window.buffer - 1 + window.period
        done = max(0, (max_length - first) // window.period + 1)
        last = first + (done - 1) * window.period
        peaks = [last - (done - 1) * window.dropped] if done else []
    else:
        done = max(0, max_length - prompt - window.buffer) // window.size
        last = prompt + done * window.size + window.buffer  # every event's peak is higher than those before it
        peaks = [last - (done - 1) * window.dropped] if done else []
    return max(max_length - done * window.dropped, *peaks, 0)


def _ceil_to(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
