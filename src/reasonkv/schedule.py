"""When an event falls and how many slots stay: pure integer functions of what was fed.

The transformers cache, the replay harness and a serving engine each compute these functions and agree without a
message, because nothing here looks at a tensor. A method decides *which* slots stay, never how many or when.

Feeding the same tokens in other pieces gives the same states if and only if every boundary `next_event` names ends
a piece; a piece that crosses boundaries has one event, at its end.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from reasonkv.budget import Budget


@dataclass(frozen=True)
class State:
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
    """Slots that stay after an event at `state.length`: min(L, p + tokens), p = the prompt's tokens if on top."""
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
    if state.length < state.prompt:
        if budget.prefill_chunk and budget.prompt == "count":
            first = max(state.length, dropped + budget.tokens) + 1
            boundary = _ceil_to(first, budget.prefill_chunk)
            if boundary < state.prompt:
                return boundary
        whole = replace(state, length=state.prompt)
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

    """
    grown = replace(state, length=state.length + fed, held=state.held + fed)
    boundary = next_event(budget, state)
    if budget is None or boundary is None or fed == 0 or grown.length < boundary:
        return grown, None
    keep = target(budget, grown)
    return replace(grown, held=keep), keep


def capacity(budget: Budget | None, prompt: int, max_length: int) -> int:
    """Slots to allocate for a row that decodes one token at a time, once a prompt cut at prefill has been cut.

    A longer piece, or a longer prompt before its cut, is staged beside this storage; see `bound` for that peak.
    """
    if budget is None:
        return max_length
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


def _ceil_to(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
