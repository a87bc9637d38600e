"""The events of one step: views of the slots, plans, their checks, and the rewriting of blocks.

All requests of a step that hold equally many slots are planned together: per layer one plan, one gather, one write.
Keys and values leave their blocks only as far as somebody looks at them: whole ones if the method does, and otherwise
just those that stay.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reasonkv.compaction import compact_pair, gather_slots
from reasonkv.plan import Plan, PlanError
from reasonkv.protection import protected_slots
from reasonkv.runtimes.vllm.layout import Kind, Layout
from reasonkv.runtimes.vllm.slots import LayerSlots
from reasonkv.runtimes.vllm.step import RequestEvent, Step
from reasonkv.view import SlotView

if TYPE_CHECKING:
    from reasonkv.methods import Method
    from reasonkv.runtimes.vllm.runtime import Runtime
    from reasonkv.view import LayerStatistics

logger = logging.getLogger("vllm.reasonkv")

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


_FIELDS: dict[Kind, str] = {"keys": "keys_BHND", "values": "values_BHND"}


@dataclass(frozen=True)
class PagedView(SlotView):
    """A view made without keys and values (None): they are read out of their blocks when first looked at.

    Args:
        read: reads either, [B, H, N, D].

    """

    read: Callable[[Kind], Tensor] | None = None

    def __post_init__(self) -> None:
        for name in _FIELDS.values():
            if vars(self)[name] is None:
                del vars(self)[name]  # so that looking it up asks below

    def __getattr__(self, name: str) -> Tensor:
        """Only called for what is not there."""
        kind = next((kind for kind, field in _FIELDS.items() if field == name), None)
        if kind is None or self.read is None:
            raise AttributeError(name)
        found = self.read(kind)
        vars(self)[name] = found
        return found

    def was_read(self, kind: Kind) -> bool:
        """Somebody looked at them."""
        return _FIELDS[kind] in vars(self)


def carry_out_events(runtime: Runtime, step: Step) -> None:
    """Plan and carry out the events of a step whose attention is over, in all layers.

    A request that has ended since needs none. Nothing of a request is rewritten before its plans were made and found
    sound: those of a layer, or of all layers for methods of model scope.

    Raises:
        PlanError: a plan of the engine's method that cannot be carried out, a defect of the method.

    """
    needs = runtime.config.method.needs
    groups = step.groups(needs.queries, runtime.sequences)
    for layers in [runtime.layers] if needs.scope == "model" else [[layer] for layer in runtime.layers]:
        for events in _portions(layers, groups):
            _carry_out(runtime, layers, step, events)
    for event in (one for events in groups for one in events):
        event.sequence.events, event.sequence.settled = event.sequence.events + 1, event.after.physical
        runtime.meter.note_event(event.held - event.after.physical)


def _carry_out(runtime: Runtime, layers: list[Layer], step: Step, events: list[RequestEvent]) -> None:
    """The events of some requests of one group, in one or all layers."""
    views = [make_view(runtime, layer, step, events) for layer in layers]
    plans = _plans(runtime, events, views)
    if runtime.observer is not None:
        for layer, view, plan in zip(layers, views, plans, strict=True):
            runtime.observer(layer.index, [event.name for event in events], view, plan)
    runtime.meter.note_plans(plans, len(runtime.layers))
    for layer, view, plan in zip(layers, views, plans, strict=True):
        _rewrite(layer, step, events, plan, view)


def _plans(runtime: Runtime, events: list[RequestEvent], views: list[PagedView]) -> list[Plan]:
    """One plan per layer, by the requests' method, or where that fails with options of their own, by the engine's.

    A client may send any options that its method accepts. What a method makes of them must not end the engine, which
    serves others; on several ranks it still does, for there a rank that goes on alone would leave the rest waiting.
    """
    method, own = events[0].sequence.method, runtime.config.method
    try:
        return _sound_plans(method, views, events[0].after.physical)
    except Exception as error:
        if method is own or runtime.ranks is not None:
            raise
        names = ", ".join(event.name for event in events)
        logger.warning(
            "Request %s goes on with the engine's options, because %s failed with its own: %s", names, method.spec(),
            error or type(error).__name__,
        )  # fmt: skip
        for event in events:
            event.sequence.method = own
        return _sound_plans(own, views, events[0].after.physical)


def _sound_plans(method: Method, views: list[PagedView], keep: int) -> list[Plan]:
    plans = method.plan_layers(views, keep)
    for view, plan in zip(views, plans, strict=True):
        B, H, N = view.positions_BHN.shape
        plan.check((B, H, N), keep, view.is_protected_BHN)
        if plan.fold is not None and not method.needs.folds:
            raise PlanError(f"{method.name} folds slots without declaring Requirements(folds=True).")
    return plans


def _portions(layers: list[Layer], groups: list[list[RequestEvent]]) -> Iterator[list[RequestEvent]]:
    """Groups cut so that the copies of their keys and values stay small."""
    cache = layers[0].module.kv_cache
    portion = PORTION_BYTES["cpu" if cache.device.type == "cpu" else "accelerator"]
    for events in groups:
        row_bytes = events[0].held * cache[0, :, 0].numel() * cache.element_size() * len(layers)
        most = max(1, portion // row_bytes)
        yield from (events[start : start + most] for start in range(0, len(events), most))


def make_view(runtime: Runtime, layer: Layer, step: Step, events: list[RequestEvent]) -> PagedView:
    """What the method may look at for requests that hold equally many slots, after the step's attention."""
    config, slots, held = runtime.config, layer.slots, events[0].held
    length_b, place_b, settled_b, event_b, seed_b, prompt_b = torch.tensor(
        [
            [after.logical, one.place, one.settled, one.events, one.seed, before.prompt]
            for _, one, _, before, _, after, _ in events
        ],
        device=runtime.device,
    ).unbind(1)
    layout, cache, blocks_BM = layer.layout, layer.module.kv_cache, _blocks(layer, step, events, held)
    assert layout is not None
    index = slots.token_indices(place_b, held, length_b, settled_b)
    is_prompt = index < prompt_b[:, None, None]
    queries = query_index = None
    if slots.ring is not None:
        count = min(slots.ring.shape[1], events[0].after.logical)
        queries, query_index = slots.recent_queries(place_b, length_b, count)
    return PagedView(
        keys_BHND=None,  # type: ignore[arg-type]
        values_BHND=None,  # type: ignore[arg-type]
        read=lambda kind: layout.read(kind, cache, blocks_BM)[:, :, :held],
        positions_BHN=index,
        counts_BHN=slots.source_counts(place_b, held, settled_b),
        is_prompt_BHN=is_prompt,
        is_protected_BHN=protected_slots(
            index,
            is_prompt,
            [event.budget for event in events],
            [event.before for event in events],
            [event.after for event in events],
            config.method.needs.recent,
        ),
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
        rows=tuple(event.row for event in events),
        prompt_length_B=prompt_b,
        query_heads=layer.module.num_heads,
        calibration=layer.calibration,
        rotary=runtime.rotary,
        token_ids=runtime.token_ids_of(events) if config.method.needs.token_ids else None,
        row_state={name: stored[place_b] for name, stored in slots.row_state.items()},
        ranks=runtime.ranks,
    )


def _rewrite(layer: Layer, step: Step, events: list[RequestEvent], plan: Plan, view: PagedView) -> None:
    """Write what stays to the front of the requests' blocks, and note what it is."""
    kept_BHK, cache, layout = plan.kept_BHK, layer.module.kv_cache, layer.layout
    assert layout is not None
    every_row = list(range(len(events)))
    if plan.fold is not None:
        keys, values = view.keys_BHND.contiguous(), view.values_BHND.contiguous()
        keys_BHKD, values_BHKD = compact_pair(keys, values, every_row, plan, view.positions_BHN)
    else:
        held_BM = _blocks(layer, step, events, view.positions_BHN.shape[2])
        keys_BHKD, values_BHKD = (
            gather_slots(getattr(view, field).contiguous(), every_row, kept_BHK)
            if view.was_read(kind)
            else layout.read_slots(kind, cache, held_BM, kept_BHK)
            for kind, field in _FIELDS.items()
        )
    blocks_BM = _blocks(layer, step, events, kept_BHK.shape[2])
    if not layout.write_front(cache, blocks_BM, keys_BHKD, values_BHKD):
        _write_by_platform(layer, blocks_BM, keys_BHKD, values_BHKD)
    place_b = torch.tensor([event.sequence.place for event in events], device=kept_BHK.device)
    layer.slots.settle(place_b, plan, view)


def _write_by_platform(layer: Layer, blocks_BM: Tensor, keys_BHKD: Tensor, values_BHKD: Tensor) -> None:
    """The same by the platform's cache operation, which takes tokens one after the other."""
    (B, H, K, _), block_size = keys_BHKD.shape, layer.module.kv_cache.shape[2]
    slot_K = torch.arange(K, device=keys_BHKD.device)
    slots_n = (blocks_BM.long()[:, slot_K // block_size] * block_size + slot_K % block_size).flatten()
    keys_nHD, values_nHD = (x.transpose(1, 2).reshape(B * K, H, -1) for x in (keys_BHKD, values_BHKD))
    layer.module.impl.write(layer.module, keys_nHD, values_nHD, layer.module.kv_cache, slots_n)


def _blocks(layer: Layer, step: Step, events: list[RequestEvent], slots: int) -> Tensor:
    """Numbers of the kernel's blocks that hold the first `slots` slots of some requests, [b, M]."""
    block_size = layer.module.kv_cache.shape[2]
    row_b = torch.tensor([event.row for event in events], device=step.block_table.device)
    return step.block_table[row_b, : -(-slots // block_size)]
