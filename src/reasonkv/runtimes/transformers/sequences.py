"""Layers by budget: those whose budgets are equal in every row share one account of what is held, and one forward.

Methods with one budget have one group, and nothing below costs them anything per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from reasonkv import schedule
from reasonkv.budget import Budget, BudgetError
from reasonkv.methods import Method, layer_budgets
from reasonkv.resolve import UnsupportedModelError, row_budgets
from reasonkv.runtimes.transformers.forward import ForwardPlan, SequenceState
from reasonkv.view import TraceAttention


@dataclass
class LayerGroup:
    """Layers that hold equally many slots of every row at all times.

    Args:
        layers: how many.
        rows: what each of them holds of every row.
        forward: the forward under way, or None.
    """

    layers: int
    rows: list[SequenceState]
    forward: ForwardPlan | None = None

    def capacity(self, max_length: int | None) -> int | None:
        """Return the slots to allocate for the longest row; None: the storage grows with the text."""
        if max_length is None and not all(row.budget is not None and row.budget.is_bounded for row in self.rows):
            return None
        if any(row.budget is None for row in self.rows):
            return None
        return max(row.capacity(max_length) for row in self.rows)

    def reopen(self, fed: Sequence[int], recent: int) -> None:
        """Count a later turn's tokens as prompt, too.

        Raises:
            BudgetError: the prompt no longer fits.
        """
        for row, count in zip(self.rows, fed, strict=True):
            row.reopen(count)
            if row.budget is not None:
                row.budget.check_protected(recent=recent, prompt_length=row.state.prompt)


def check_layers(method: Method, budget: Budget | None, layers: int, is_one_mask: bool) -> None:
    """Check before the first forward what can be known of every layer's budget.

    Args:
        method, budget: of the cache.
        layers: compressed layers.
        is_one_mask: the model makes one mask of its own for all layers, so they must hold equally many slots.

    Raises:
        BudgetError: a share that cannot hold what is protected, or layers that must be alike and are not.
    """
    if len(set(layer_budgets(method, budget, layers))) > 1 and is_one_mask:
        raise BudgetError(
            "The layers of this model attend under one mask, so they cannot have budgets or turns of their own; choose "
            "a method that divides nothing among layers, such as snapkv, and leave out layer_shares and stagger."
        )


def make_groups(
    method: Method,
    budget: Budget | None,
    layers: int,
    prompts: Sequence[int],
    seeds: Sequence[int] | None = None,
    window_events: Sequence[tuple[int, int]] | None = None,
) -> tuple[list[LayerGroup], list[int]]:
    """Return the groups of an empty batch, and the number of every compressed layer's group.

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
    budgets = row_budgets(budget, window_events, len(prompts))
    own = [layer_budgets(method, one, layers, prompt) for one, prompt in zip(budgets, prompts, strict=True)]
    groups: dict[tuple[Budget | None, ...], LayerGroup] = {}
    for column in zip(*own, strict=True):  # one layer's budget in every row
        if column not in groups:
            groups[column] = LayerGroup(0, [_start(*one) for one in zip(prompts, column, seeds, strict=True)])
        groups[column].layers += 1
    numbers = {column: number for number, column in enumerate(groups)}
    return list(groups.values()), [numbers[column] for column in zip(*own, strict=True)]


def check_first_forward(
    prompts: Sequence[int], fed: Sequence[int], is_declared: bool, reference: TraceAttention | None
) -> None:
    """Check the first forward against what is known of its rows: their prompts, and their future.

    Raises:
        UnsupportedModelError: the reference is of other rows.
        BudgetError: more is fed than the prompt that was declared.
    """
    if reference is not None and len(reference.lengths) != len(fed):
        raise UnsupportedModelError(
            f"The reference was collected from {len(reference.lengths)} rows but the forward has {len(fed)}; "
            "collect it from the rows that are fed."
        )
    for prompt, first in zip(prompts, fed, strict=True):
        if is_declared and prompt < first and first > 1:
            raise BudgetError(
                f"prompt_lengths says {prompt} tokens, but the first forward feeds {first}; "
                "feed the prompt in chunks that end with it, or correct prompt_lengths."
            )


def later_prompt(
    groups: Sequence[LayerGroup], fed: Sequence[int], is_declared: bool, reopens: bool, recent: int
) -> None:
    """Check a second chunk of several tokens: a promised part of the prompt, or a later turn, which may be prompt, too.

    Raises:
        BudgetError: nobody said where the prompt ends, or it no longer fits.
    """
    still_prompt = all(row.decoded == 0 for row in groups[0].rows)
    if still_prompt and not is_declared:
        raise BudgetError(
            "This prompt is fed in several pieces, so the cache cannot tell where it ends; "
            "pass prompt_lengths=[tokens of each row's prompt] to CompressedCache."
        )
    if reopens and not still_prompt:
        for group in groups:
            group.reopen(fed, recent)


def tokens_to_next_event(groups: Sequence[LayerGroup], packing: Callable[[int], int] | None = None) -> list[int | None]:
    """Return, per row, how many more tokens until the next compaction of any layer; None: there will be none.

    Args:
        groups: the layers by budget.
        packing: after how many tokens slots are packed, given those held; decoding may not cross that either.
    """
    found: list[int | None] = []
    for rows in zip(*(group.rows for group in groups), strict=True):
        events = [schedule.next_event(row.budget, row.state) for row in rows]
        distances = [event - rows[0].state.logical for event in events if event is not None]
        if packing is not None and rows[0].state.logical >= rows[0].state.prompt:
            distances += [packing(row.state.physical) for row in rows]
        found.append(min(distances, default=None))
    return found


def _start(prompt: int, budget: Budget | None, seed: int) -> SequenceState:
    return SequenceState(schedule.Lengths(prompt=prompt), budget, seed, prompt_spans=[(0, prompt)])
