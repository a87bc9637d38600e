"""The events of one step: views of the slots, plans, their checks, and the rewriting of blocks.

All requests of a step that hold equally many slots are planned together: per layer one gather of their blocks, one
plan, one write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reasonkv.compaction import compact_pair
from reasonkv.plan import Plan, PlanError
from reasonkv.protection import protected_slots
from reasonkv.runtimes.vllm.layout import Layout
from reasonkv.runtimes.vllm.slots import LayerSlots
from reasonkv.runtimes.vllm.step import Step
from reasonkv.view import SlotView

if TYPE_CHECKING:
    from reasonkv.calibration import LayerStatistics
    from reasonkv.runtimes.vllm.runtime import Runtime

PORTION_BYTES = {"cpu": 1 << 23, "accelerator": 1 << 28}
"""Keys and values that are copied at once. A step in which hundreds of requests have an event would otherwise need
memory that nobody set aside; a CPU's copies stay in its cache, and in pages that the allocator has at hand."""

Observer = Callable[[int, list[str], SlotView, Plan], None]
"""Called as `observer(layer, requests, view, plan)`: row i of the view and of the plan is request `requests[i]`."""


@dataclass
class Layer:
    """One compressed layer of the engine.

    Args:
        index: its number in the model.
        module: vLLM's attention layer, which owns the blocks (`kv_cache`) and the implementation (`impl`).
        slots: what is kept beside keys and values.
        calibration: statistics of its queries, this rank's heads.
        layout: where the platform puts keys and values, once blocks exist.

    """

    index: int
    module: Any
    slots: LayerSlots
    calibration: LayerStatistics | None = None
    layout: Layout | None = None


def carry_out_events(runtime: Runtime, layers: list[Layer], step: Step) -> None:
    """Plan and carry out the events of one layer, or of all layers at once for methods of model scope.

    Nothing is rewritten before every plan was made and found sound.

    Raises:
        PlanError: a plan that cannot be carried out, a defect of the method.

    """
    done: list[tuple[Layer, list[int], Plan, SlotView]] = []
    for rows in _portions(step, layers, step.groups(runtime.config.method.needs.queries)):
        keep = step.after[step.order[rows[0]]][1]
        assert keep is not None
        views = [make_view(runtime, layer, step, rows) for layer in layers]
        plans = runtime.config.method.plan_layers(views, keep)
        for layer, view, plan in zip(layers, views, plans, strict=True):
            B, H, N = view.positions_BHN.shape
            plan.check((B, H, N), keep, view.is_protected_BHN)
            if plan.fold is not None and not runtime.config.method.needs.folds:
                raise PlanError(f"{runtime.config.method.name} folds slots without declaring Needs(folds=True).")
            if runtime.observer is not None:
                runtime.observer(layer.index, [step.order[row] for row in rows], view, plan)
            done.append((layer, rows, plan, view))
        runtime.meter.note_plans(step, rows, plans, len(runtime.layers))
    for layer, rows, plan, view in done:
        _rewrite(layer, step, rows, plan, view)


def _portions(step: Step, layers: list[Layer], groups: list[list[int]]) -> Iterator[list[int]]:
    """Groups cut so that the copies of their keys and values stay small."""
    cache = layers[0].module.kv_cache
    portion = PORTION_BYTES["cpu" if cache.device.type == "cpu" else "accelerator"]
    for rows in groups:
        row_bytes = step.held(step.order[rows[0]]) * cache[0, :, 0].numel() * cache.element_size() * len(layers)
        most = max(1, portion // row_bytes)
        yield from (rows[start : start + most] for start in range(0, len(rows), most))


def make_view(runtime: Runtime, layer: Layer, step: Step, rows: list[int]) -> SlotView:
    """What the method may look at for requests that hold equally many slots, after the step's attention."""
    config, slots = runtime.config, layer.slots
    names = [step.order[row] for row in rows]
    sequences = [step.sequences[name] for name in names]
    held = step.held(names[0])
    length_b, place_b, settled_b, event_b, seed_b, prompt_b = torch.tensor(
        [
            [step.after[name][0].length, one.place, one.settled, one.events, one.seed, one.state.prompt]
            for name, one in zip(names, sequences, strict=True)
        ],
        device=runtime.device,
    ).unbind(1)
    assert layer.layout is not None
    keys_BHND, values_BHND = layer.layout.read(layer.module.kv_cache, _blocks(layer, step, rows, held))
    index = slots.token_indices(place_b, held, length_b, settled_b)
    is_prompt = index < prompt_b[:, None, None]
    queries = query_index = None
    if slots.ring is not None:
        count = min(slots.ring.shape[2], step.after[names[0]][0].length)
        queries, query_index = slots.recent_queries(place_b, length_b, count)
    return SlotView(
        keys_BHND=keys_BHND[:, :, :held],
        values_BHND=values_BHND[:, :, :held],
        positions_BHN=index,
        counts_BHN=slots.source_counts(place_b, held, settled_b),
        is_prompt_BHN=is_prompt,
        is_protected_BHN=_protected(runtime, index, is_prompt, step, names),
        queries_BHqTD=queries,
        query_positions_BT=query_index,
        scaling=layer.module.impl.scale,
        state=slots.slot_state(place_b, index, settled_b),
        length_B=length_b,
        event_B=event_b,
        row_seed_B=seed_b,
        seed=config.seed,
        layer=layer.index,
        first_head=runtime.first_head,
        rows=tuple(rows),
        prompt_length_B=prompt_b,
        query_heads=layer.module.num_heads,
        calibration=layer.calibration,
        rotary=runtime.rotary,
        token_ids=runtime.token_ids_of(names) if config.method.needs.token_ids else None,
        row_state={name: stored[place_b] for name, stored in slots.row_state.items()},
        ranks=runtime.ranks,
    )


def _protected(runtime: Runtime, index_BHN: Tensor, is_prompt_BHN: Tensor, step: Step, names: list[str]) -> Tensor:
    budgets = [one for one in (step.sequences[name].budget for name in names) if one is not None]  # an event has one
    before, after = [step.sequences[name].state for name in names], [step.after[name][0] for name in names]
    return protected_slots(index_BHN, is_prompt_BHN, budgets, before, after, runtime.config.method.needs.recent)


def _rewrite(layer: Layer, step: Step, rows: list[int], plan: Plan, view: SlotView) -> None:
    """Write what stays to the front of the requests' blocks, and note what it is."""
    keys, values = view.keys_BHND.contiguous(), view.values_BHND.contiguous()
    keys_BHKD, values_BHKD = compact_pair(keys, values, list(range(len(rows))), plan, view.positions_BHN)
    (B, H, K, D), block_size = keys_BHKD.shape, layer.module.kv_cache.shape[2]
    slot_K = torch.arange(K, device=keys.device)
    blocks_BM = _blocks(layer, step, rows, K).long()
    slots_n = (blocks_BM[:, slot_K // block_size] * block_size + slot_K % block_size).flatten()
    layer.module.impl.write(
        layer.module,
        keys_BHKD.transpose(1, 2).reshape(B * K, H, D),
        values_BHKD.transpose(1, 2).reshape(B * K, H, -1),
        layer.module.kv_cache,
        slots_n,
    )
    place_b = torch.tensor([step.sequences[step.order[row]].place for row in rows], device=keys.device)
    layer.slots.settle(place_b, plan, view)


def _blocks(layer: Layer, step: Step, rows: list[int], slots: int) -> Tensor:
    """Numbers of the kernel's blocks that hold the first `slots` slots of some requests, [b, M]."""
    assert step.block_table is not None
    block_size = layer.module.kv_cache.shape[2]
    row_b = torch.tensor(rows, device=step.block_table.device)
    return step.block_table[row_b, : -(-slots // block_size)]
