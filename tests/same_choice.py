"""Where two ways of computing a plan may keep different slots: only where rounding decides.

Products of a batch and of one sequence, of other kernels, instruction sets and thread counts differ in their last bits,
and slots of the same word may have equal scores but for these. So two plans of the same slots count as one choice if
every slot in which they differ is decided by less than `NEAR`: if moving every key, value and query by at most that
part of itself, at random, keeps it in some draws and evicts it in others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from reasonkv.methods import Method
from reasonkv.plan import Plan
from reasonkv.view import SlotView

NEAR = {torch.float64: 1e-12, torch.float32: 1e-5}
"""Part of itself by which every number may be moved, by the dtype that scores are computed in."""
_DRAWS = 40


def row_of(view: SlotView, row: int) -> SlotView:
    """A copy of one row of a view."""

    def cut(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: tensor[row : row + 1].clone() for key, tensor in value.items()}
        is_by_row = name == "rows" or name == "token_ids" or "_B" in name
        if not is_by_row or value is None:
            return value
        return value[row : row + 1].clone() if isinstance(value, Tensor) else value[row : row + 1]

    return replace(view, **{name: cut(name, value) for name, value in vars(view).items()})


def moved(view: SlotView, generator: torch.Generator) -> SlotView:
    """The view with every number moved by at most `NEAR` of itself."""

    def move(x: Tensor) -> Tensor:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return x * (1 + NEAR[x.dtype] * (2 * torch.rand(x.shape, generator=generator, dtype=x.dtype) - 1))

    moves: dict[str, Any] = {"keys_BHND": move(view.keys_BHND), "values_BHND": move(view.values_BHND)}
    if view.queries_BHqTD is not None:
        moves["queries_BHqTD"] = move(view.queries_BHqTD)
    moves["row_state"] = {name: move(x) if x.is_floating_point() else x for name, x in view.row_state.items()}
    return replace(view, **moves)


def check_same_choice(method: Method, views: Sequence[SlotView], one: Sequence[Plan], other: Sequence[Plan]) -> bool:
    """Check that two plans of every layer keep the same slots but where rounding decides; whether they do throughout."""
    kept = [[masks_of(view, plan) for view, plan in zip(views, plans, strict=True)] for plans in (one, other)]
    if all(torch.equal(mine, theirs) for mine, theirs in zip(*kept, strict=True)):
        return True
    generator, keep = torch.Generator().manual_seed(0), one[0].kept_BHK.shape[-1]
    draws = []
    for _ in range(_DRAWS):
        plans = method.plan_layers([moved(view, generator) for view in views], keep)
        draws.append([masks_of(view, plan) for view, plan in zip(views, plans, strict=True)])
    for mine, theirs, drawn in zip(*kept, zip(*draws, strict=True), strict=True):
        always, ever = torch.stack(drawn).all(0), torch.stack(drawn).any(0)
        apart = mine != theirs
        assert not bool((apart & (always | ~ever)).any()), "kept slots differ where no two scores are nearly equal"
    return False


def masks_of(view: SlotView, plan: Plan) -> Tensor:
    """The kept slots as a mask, bool [B, H, N]."""
    return torch.zeros_like(view.is_protected_BHN).scatter(2, plan.kept_BHK, True)


class Choices:
    """An observer of a cache that remembers what every row of it kept, and of what."""

    def __init__(self, rows: Sequence[int]) -> None:
        """Rows of a batch are remembered under these numbers."""
        self.rows = rows
        self.made: dict[int, dict[tuple[int, int], tuple[SlotView, Plan]]] = {row: {} for row in rows}

    def __call__(self, layer: int, at: Sequence[int], view: SlotView, plan: Plan) -> None:
        for place, row in enumerate(at):
            own = Plan(plan.kept_BHK[place : place + 1])
            self.made[self.rows[row]][int(view.length_B[place]), layer] = row_of(view, place), own


def check_same_choices(method: Method, one: Choices, other: Choices) -> int:
    """Check that rows of two caches keep the same slots until rounding decides; how many plans of them are the same.

    After that a row holds other slots, so nothing more of it is compared.
    """
    same = 0
    for row in one.made.keys() & other.made.keys():
        mine, theirs = one.made[row], other.made[row]
        assert mine.keys() == theirs.keys()
        for length in sorted({length for length, _ in mine}):
            layers = [key for key in sorted(mine) if key[0] == length]
            together = [layers] if method.needs.scope == "model" else [[key] for key in layers]
            agree = [
                check_same_choice(
                    method,
                    [theirs[key][0] for key in keys],
                    [mine[key][1] for key in keys],
                    [theirs[key][1] for key in keys],
                )
                for keys in together
            ]
            same += sum(len(keys) for keys, is_same in zip(together, agree, strict=True) if is_same)
            if not all(agree):
                break
    return same
