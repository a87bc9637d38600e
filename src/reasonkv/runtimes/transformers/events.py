"""The compactions of one forward: views, plans, their checks, and the rewriting of storage."""

from __future__ import annotations

import time
from collections.abc import Sequence

from reasonkv.methods import Method
from reasonkv.plan import Plan
from reasonkv.runtimes.transformers.forward import ForwardPlan, SequenceState
from reasonkv.runtimes.transformers.layer import CompressedLayer
from reasonkv.runtimes.transformers.session import Observer
from reasonkv.slots import CompactionGroup, make_plans
from reasonkv.view import SlotView


def settle_layers(
    method: Method, observer: Observer | None, layers: Sequence[CompressedLayer], forward: ForwardPlan
) -> float:
    """Compact layers that attended, where a compaction is due, and store them as they stay between forwards.

    Returns:
        Host seconds of the compaction.

    Raises:
        PlanError: a plan that cannot be carried out, a defect of the method.
    """
    start = time.perf_counter()
    if layers and any(keep is not None for keep in forward.keep):
        compact_layers(method, observer, layers, forward)
    seconds = time.perf_counter() - start
    for layer in layers:
        assert layer.storage is not None
        layer.storage.pack(forward)
    return seconds


def compact_layers(
    method: Method, observer: Observer | None, layers: Sequence[CompressedLayer], forward: ForwardPlan
) -> None:
    """Compact one layer, or all layers at once for methods of model scope, and where layers carry out another's plans.

    Nothing is rewritten before every plan was made and found sound.

    Raises:
        PlanError: a plan that cannot be carried out, a defect of the method.
    """
    done: dict[int, list[tuple[CompactionGroup, Plan, SlotView]]] = {layer.leader: [] for layer in layers}
    for group in forward.groups(method.needs.queries):
        views = [layer.view(group) for layer in layers if layer.leader == layer.index]
        plans = make_plans(method, views, group.keep)
        for found, view, plan in zip(done.values(), views, plans, strict=True):
            found.append((group, plan, view))
        followed = [done[layer.leader][-1][1] for layer in layers]
        _note([forward.rows[row] for row in group.rows], followed, forward.layers)
    if observer is not None:  # once every plan is known to be sound, and while the slots are still there
        for index, found in done.items():
            for group, plan, view in found:
                observer(index, list(group.rows), view, plan)
    for layer in layers:
        assert layer.storage is not None
        layer.storage.compact(done[layer.leader], forward)


def _note(rows: list[SequenceState], plans: list[Plan], layers: int) -> None:
    """Count folded slots and padding (as means over heads and layers) and the fallbacks of one or all layers."""
    for plan in plans:
        for row in rows:
            for name in plan.fallbacks:
                row.fallbacks.setdefault(name, set()).add(row.events)
        merged_B = plan.merged_B()
        if merged_B is not None:
            for row, merged in zip(rows, (merged_B / layers).tolist(), strict=True):
                row.folded += merged
        if plan.log_mass_BHK is not None:
            padding_B = plan.log_mass_BHK.isneginf().sum(-1).double().mean(-1)
            for row, padding in zip(rows, padding_B.tolist(), strict=True):
                row.padding_left += padding
