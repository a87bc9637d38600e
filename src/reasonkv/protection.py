"""Which slots no method may drop at an event: one rule for every runtime."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reasonkv import schedule
from reasonkv.budget import Budget, Window


def protected_slots(
    index_BHN: Tensor,
    is_prompt_BHN: Tensor,
    budgets: Sequence[Budget],
    before: Sequence[schedule.Lengths],
    after: Sequence[schedule.Lengths],
    recent: int,
) -> Tensor:
    """Sinks, the newest slots, and the prompt if the budget says so; of a `Window`, all but tokens whose turn it is.

    Args:
        index_BHN: int64, token index of every slot, ascending in N.
        is_prompt_BHN: bool, the slot holds a token of its row's prompt.
        budgets: every row's; they differ in nothing but a `ExplicitEventsWindow`'s events.
        before: every row's state before the forward whose event this is.
        after: the same after the forward, its event included.
        recent: newest slots the method itself always keeps; the larger of it and the budget's counts, once.

    Returns:
        bool [B, H, N]. Of a row whose prompt does not fit into a budget that keeps it, the prompt is not protected;
        runtimes that can refuse such a row do so before.
    """
    budget, device = budgets[0], index_BHN.device
    if isinstance(budget, Window):
        windows = [one for one in budgets if isinstance(one, Window)]
        spans = [schedule.open_tokens(*row) for row in zip(windows, before, after, strict=True)]
        start_B, end_B = torch.tensor(spans, device=device).unbind(1)
        return (index_BHN < start_B[:, None, None]) | (index_BHN >= end_B[:, None, None])
    sinks, recent = budget.protected(recent)
    protected_BHN = index_BHN < sinks
    if recent:
        protected_BHN[:, :, -recent:] = True
    if budget.prompt == "count":
        return protected_BHN
    if budget.prompt == "keep":
        of = zip(before, budgets, strict=True)
        fits = [one.tokens is None or state.prompt + recent < one.tokens for state, one in of]
        is_prompt_BHN = is_prompt_BHN & torch.tensor(fits, device=device)[:, None, None]
    return protected_BHN | is_prompt_BHN
