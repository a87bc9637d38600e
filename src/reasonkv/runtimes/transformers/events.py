"""The events of one forward: views, plans, their checks, and the rewriting of storage."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from reasonkv.plan import Plan
from reasonkv.runtimes.transformers.rows import Piece
from reasonkv.runtimes.transformers.support import UnsupportedModelError
from reasonkv.view import SlotView

if TYPE_CHECKING:
    from reasonkv.runtimes.transformers.cache import CompressedCache
    from reasonkv.runtimes.transformers.layer import CompressedLayer


def carry_out_events(cache: CompressedCache, layers: list[CompressedLayer], piece: Piece) -> None:
    """Plan and carry out the events of one layer, or of all layers at once for methods of model scope.

    Nothing is rewritten before every plan was made and found sound.

    Raises:
        PlanError, UnsupportedModelError: a plan that cannot be carried out, a defect of the method.

    """
    done: list[list[tuple[list[int], Plan, SlotView]]] = [[] for _ in layers]
    ring = max(layer.storage.ring_length for layer in layers if layer.storage is not None)
    for rows in piece.groups(ring):
        keep = piece.keep[rows[0]]
        assert keep is not None
        views = [layer.view(rows, piece) for layer in layers]
        with torch.autocast(views[0].keys_BHND.device.type, enabled=False):  # scores are float32 whoever calls
            plans = cache.method.plan_layers(views, keep)
        for found, view, plan in zip(done, views, plans, strict=True):
            plan.check(tuple(view.positions_BHN.shape), keep, view.is_protected_BHN)  # type: ignore[arg-type]
            _check_declared(cache, plan)
            found.append((rows, plan, view))
        _note(piece, rows, plans)
    if cache.observer is not None:  # once every plan is known to be sound, and while the slots are still there
        for layer, found in zip(layers, done, strict=True):
            for rows, plan, view in found:
                cache.observer(layer.index, rows, view, plan)
    for layer, found in zip(layers, done, strict=True):
        assert layer.storage is not None
        layer.storage.carry_out(found, piece)


def _note(piece: Piece, rows: list[int], plans: list[Plan]) -> None:
    """Count folded slots and padding (as means over heads and layers) and the guards of one or all layers."""
    for plan in plans:
        for row in rows:
            for guard in plan.guards:
                piece.rows[row].guards.setdefault(guard, set()).add(piece.rows[row].events)
        if plan.fold is not None:
            kept = plan.kept_BHK.shape[-1]
            per_row = ((plan.fold.into_BHN >= 0).sum(-1) - kept).float().mean(-1) / piece.layers
            for row, folded in zip(rows, per_row.tolist(), strict=True):
                piece.rows[row].folded += folded
        if plan.log_mass_BHK is not None:
            padding_B = plan.log_mass_BHK.isneginf().sum(-1).double().mean(-1)
            for row, padding in zip(rows, padding_B.tolist(), strict=True):
                piece.rows[row].padding_left += padding


def _check_declared(cache: CompressedCache, plan: Plan) -> None:
    name, needs = cache.method.name, cache.method.needs
    if plan.fold is not None and not needs.folds:
        raise UnsupportedModelError(f"{name} folds slots without declaring Requirements(folds=True).")
    unknown = set(plan.new_state) - set(needs.stored_state)
    if unknown:
        raise UnsupportedModelError(
            f"{name} rewrites {', '.join(sorted(unknown))} without declaring it in its Requirements."
        )
