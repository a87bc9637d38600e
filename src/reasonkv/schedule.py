"""When an event falls and how many slots stay: pure integer functions of what was fed.

The transformers cache, the replay harness and a serving engine each compute these functions and agree without a
message, because nothing here looks at a tensor. A method decides *which* slots stay, never how many or when.

Feeding the same tokens in other chunks gives the same lengths if and only if every boundary `next_event` names ends a
chunk; a chunk that crosses boundaries has one compaction, at its end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple, TypeVar

from reasonkv.budget import Budget, BudgetError, ExplicitEventsWindow, PeriodicWindow, Window


class Lengths(NamedTuple):
    """The lengths of one sequence in one layer."""

    logical: int = 0  # tokens seen, L
    physical: int = 0  # slots stored per KV head, P
    prompt: int = 0  # tokens of the prompt, known from the first forward on


def kept_share(budget: Budget, logical: int, prompt: int) -> int:
    """Return the slots a compaction keeps at a logical length, beside a prompt on top."""
    if budget.tokens is not None:
        return budget.tokens
    counted = logical - _on_top(budget, min(logical, prompt))
    return max(_least(budget, prompt), counted * budget.ratio.numerator // budget.ratio.denominator)


def target(budget: Budget, state: Lengths) -> int:
    """Return the slots that are kept by a compaction at `state`, whose physical length is that before it.

    min(L, p + kept_share), p = the prompt's tokens if on top; of a `Window`, what is left once every complete one is
    compacted.
    """
    if isinstance(budget, Window):
        start, end = _due(budget, state)
        return state.physical - (end - start) // budget.size * budget.dropped
    on_top = _on_top(budget, min(state.logical, state.prompt))
    return min(state.logical, on_top + kept_share(budget, state.logical, state.prompt))


def next_event(budget: Budget | None, state: Lengths) -> int | None:
    """Return the logical length (> `state.logical`) of the next compaction, tokens fed one by one; None: there is none.

    Args:
        budget: None for a cache without bound.
    """
    if budget is None:
        return None
    dropped = state.logical - state.physical  # constant until the next event: at length n, n - dropped slots are held
    if isinstance(budget, ExplicitEventsWindow):
        return next(iter(budget.events[dropped // budget.dropped :]), None)
    if isinstance(budget, Window):
        return max(state.logical + 1, state.prompt + (dropped // budget.dropped + 1) * budget.size + budget.buffer)
    if state.logical < state.prompt:
        if budget.prefill_chunk and budget.prompt == "count":
            first = max(state.logical + 1, _first_with(budget, state.prompt, dropped + 1))
            boundary = _ceil_to(first, budget.prefill_chunk)
            if boundary < state.prompt:
                return boundary
        whole = state._replace(logical=state.prompt)
        if budget.cut_prompt == "prefill" and state.prompt - dropped > target(budget, whole):
            return state.prompt
    first_decode = max(state.logical, state.prompt) + 1
    on_top = _on_top(budget, state.prompt)
    if budget.trigger == "occupancy":
        early = budget.early if dropped <= _dropped_by_prompt(budget, state.prompt) else 0
        return max(first_decode, _first_with(budget, state.prompt, dropped + on_top + budget.interval - early))
    counted_out = state.prompt if budget.trigger_counts == "decode" else 0
    # a compaction must evict something, so at least one slot more than is kept has to be held
    first = _first_with(budget, state.prompt, dropped + max(counted_out, on_top + 1))
    return _ceil_to(max(first_decode, first) + budget.early, budget.interval) - budget.early


def step(budget: Budget | None, state: Lengths, fed: int) -> tuple[Lengths, int | None]:
    """Feed `fed` tokens in one forward.

    Returns:
        The state after the forward, and the number of slots its event keeps (None: no event).

    Raises:
        BudgetError: the forward does not end at the event of an `ExplicitEventsWindow`, or no window is whole.
    """
    grown = Lengths(state.logical + fed, state.physical + fed, state.prompt)
    boundary = next_event(budget, state)
    if budget is None or boundary is None or fed == 0 or grown.logical < boundary:
        return grown, None
    keep = target(budget, grown)
    return grown._replace(physical=keep), keep


def one_by_one(budget: Budget | None, state: Lengths, length: int) -> Lengths:
    """The state once tokens have arrived one by one up to `length`."""
    while state.logical < length:
        boundary = next_event(budget, state)
        end = length if boundary is None else min(boundary, length)
        state, _ = step(budget, state, end - state.logical)
    return state


def walk(budget: Budget | None, prompt: int, length: int) -> Iterator[tuple[Lengths, int, Lengths, bool]]:
    """Yield the chunks of a sequence that is fed alone: prompt first, each up to the next compaction.

    Args:
        budget: None for full KV.
        prompt: tokens of the prompt.
        length: tokens fed in all, prompt included.

    Yields:
        Lengths before a chunk, its tokens, lengths after it, and whether it ends in a compaction.
    """
    state = Lengths(prompt=prompt)
    while state.logical < length:
        end = prompt if state.logical < prompt else length
        event = next_event(budget, state)
        fed = min(end, end if event is None else event) - state.logical
        after, kept = step(budget, state, fed)
        yield state, fed, after, kept is not None
        state = after


def attended_slots(budget: Budget | None, prompt: int, length: int) -> int:
    """Return the slots attended, summed over the tokens fed after the prompt one at a time; arguments as in `walk`."""
    return sum(
        # token i of the chunk (from 1) attends to what was held and to the i newest
        fed * before.physical + fed * (fed + 1) // 2
        for before, fed, _, _ in walk(budget, prompt, length)
        if before.logical >= prompt
    )


def open_tokens(window: Window, before: Lengths, after: Lengths) -> tuple[int, int]:
    """Half-open range of token indices that the event of a forward from `before` to `after` chooses from.

    All of them are still held: nothing inside was ever cut. Every other slot is protected at this event.
    """
    return _due(window, after._replace(physical=before.physical + after.logical - before.logical))


def _due(window: Window, state: Lengths) -> tuple[int, int]:
    """The tokens that an event at `state.logical` cuts, as a half-open range: a whole number of windows."""
    done = (state.logical - state.physical) // window.dropped
    if not isinstance(window, ExplicitEventsWindow):
        start = state.prompt + done * window.size
        return start, start + max(0, state.logical - window.buffer - start) // window.size * window.size
    if state.logical != window.events[done]:
        raise BudgetError(
            f"A forward ends at {state.logical} tokens of a row whose event was listed at {window.events[done]}; "
            "end a forward there (tokens_to_next_event says how far it is)."
        )
    start = state.logical - window.buffer - window.size
    if start < state.prompt:
        raise BudgetError(
            f"An event listed at {state.logical} tokens finds no window of {window.size} before its buffer of "
            f"{window.buffer}: the prompt alone is {state.prompt} tokens."
        )
    return start, start + window.size


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


def in_turn(budget: Budget, number: int) -> Budget:
    """Return what the layer or request of a number follows, where all take turns."""
    if budget.stagger == 1:
        return budget
    return replace(budget, stagger=1, early=number % budget.stagger * budget.interval // budget.stagger)


def row_budget(budget: Budget, prompt: int, seed: int = 0) -> Budget:
    """What one row of an engine starts with: the engine's budget in its turn, or a list that its steps add events to.

    Its turn follows from its own prompt's length and seed, so that a row gets the same whatever else is running.
    """
    return budget.row() if isinstance(budget, PeriodicWindow) else in_turn(budget, prompt + seed)


def raw_tokens(window: ExplicitEventsWindow, state: Lengths) -> int:
    """Tokens of a row, beyond its prompt, that came since the last window cut from it: 0 at least."""
    start = window.events[-1] - window.buffer if window.events else state.prompt
    return max(0, state.logical - start)


def listed(window: ExplicitEventsWindow, length: int) -> ExplicitEventsWindow:
    """A row's window with one more event, at that length."""
    return replace(window, events=(*window.events, length))


def capacity(budget: Budget | None, prompt: int, max_length: int) -> int:
    """Return the slots to allocate for a sequence that decodes one token at a time, its prompt compacted if it is cut.

    A longer chunk, or a longer prompt before its cut, is staged beside this storage; see `bound` for that peak.
    """
    if budget is None:
        return max_length
    if isinstance(budget, Window):
        return _window_capacity(budget, prompt, max_length)
    share = kept_share(budget, max(max_length, prompt), prompt) + budget.interval
    needed = _on_top(budget, prompt) + share
    if budget.trigger == "grid" and budget.trigger_counts == "decode":
        needed = max(needed, prompt + share)
    if budget.cut_prompt == "first_event":
        needed = max(needed, prompt + (1 if budget.trigger == "occupancy" else budget.interval))
    return min(max_length, needed)


def bound(budget: Budget | None, prompt: int, max_length: int, max_piece: int = 1) -> int:
    """Return the most slots a sequence ever holds at once per KV head, before a compaction among them.

    Args:
        budget: None for a cache without bound.
        prompt: tokens of the prompt.
        max_length: most tokens the sequence will ever see.
        max_piece: most tokens of one forward after the prompt. The prompt is fed whole, or in chunks that end at its
            boundaries.
    """
    if budget is None:
        return max_length
    in_prompt = prompt
    if budget.prefill_chunk and budget.prompt == "count":
        in_prompt = min(prompt, kept_share(budget, prompt, prompt) + budget.prefill_chunk)
    return min(max_length, max(capacity(budget, prompt, max_length) + max_piece - 1, in_prompt))


def _on_top(budget: Budget, prompt: int) -> int:
    return prompt if budget.prompt == "on_top" else 0


def _dropped_by_prompt(budget: Budget, prompt: int) -> int:
    """Slots that were dropped because of the prompt's length, before decoding had an event of its own."""
    if not budget.early:
        return 0
    length = prompt + (budget.cut_prompt == "first_event")
    over = length - target(budget, Lengths(length, length, prompt))
    return over if budget.cut_prompt == "prefill" or over >= budget.interval else 0


def _least(budget: Budget, prompt: int) -> int:
    """Slots that a share keeps at least: what is protected, and one that is chosen beside a kept prompt."""
    sinks, recent = budget.protected()
    return max(1, sinks + recent, prompt + recent + 1 if budget.prompt == "keep" else 0)


def _first_with(budget: Budget, prompt: int, surplus: int) -> int:
    """Return the first logical length, past a prompt on top, that exceeds `kept_share` by `surplus` tokens.

    Of a share n / d, c = surplus - p tokens beyond it: m - m n // d >= c first at m = (c - 1) d // (d - n) + 1, because
    the left side is ceil(m (d - n) / d).
    """
    if budget.tokens is not None:
        return budget.tokens + surplus
    on_top, ratio = _on_top(budget, prompt), budget.ratio
    n, d, beyond = ratio.numerator, ratio.denominator, surplus - on_top
    return on_top + max(_least(budget, prompt) + beyond, (beyond - 1) * d // (d - n) + 1)


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
