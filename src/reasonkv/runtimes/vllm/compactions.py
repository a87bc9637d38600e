"""Compactions of one step: views of the slots, plans, their checks, and the rewriting of blocks.

All requests of a step that hold equally many slots are planned together: per layer one plan, one gather, one write.
Keys and values are read out of their blocks only as far as somebody looks at them: all slots if the method does,
otherwise only the kept ones.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reasonkv.compaction import compact_pair, gather_slots
from reasonkv.methods import Method
from reasonkv.plan import Plan, PlanError
from reasonkv.protection import protected_slots
from reasonkv.rotary import Rotary
from reasonkv.runtimes.vllm.layout import Kind, Layout
from reasonkv.runtimes.vllm.metrics import Meter
from reasonkv.runtimes.vllm.slots import LayerSlots
from reasonkv.runtimes.vllm.step import DueCompaction, RunningRequest, StepLayout
from reasonkv.view import LayerStatistics, Ranks, SlotView

logger = logging.getLogger("vllm.reasonkv")

PORTION_BYTES = {"cpu": 1 << 23, "accelerator": 1 << 28}
"""Keys and values that are copied at once. A step that compacts hundreds of requests would otherwise need memory that
nobody set aside; a CPU's copies stay in its cache, and in pages that the allocator has at hand."""

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

    def blocks(self, step: StepLayout, due: list[DueCompaction], slots: int) -> Tensor:
        """Return the numbers of the kernel's blocks that hold the first `slots` slots of some requests, [b, M]."""
        index_b = torch.tensor([one.index for one in due], device=step.block_table.device)
        return step.block_table[index_b, : -(-slots // self.module.kv_cache.shape[2])]


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
                del vars(self)[name]  # so that a look-up goes to `__getattr__`

    def __getattr__(self, name: str) -> Tensor:
        """Read keys or values; only called for what is not there."""
        kind = next((kind for kind, field in _FIELDS.items() if field == name), None)
        if kind is None or self.read is None:
            raise AttributeError(name)
        found = self.read(kind)
        vars(self)[name] = found
        return found

    def was_read(self, kind: Kind) -> bool:
        """Return whether somebody looked at them."""
        return _FIELDS[kind] in vars(self)


@dataclass
class Compactor:
    """Plans and carries out the compactions of an engine's steps.

    Args:
        method: the engine's.
        seed: the run's.
        layers: all compressed layers.
        meter: counts.
        first_head: global index of this rank's first KV head.
        rotary: the model's rotary embedding, if the method needs it.
        ranks: the tensor-parallel ranks with the layers' other heads, or None.
        token_ids: int32 [rows, length], tokens of every request, if the method needs them.
        observer: sees every plan.

    """

    method: Method
    seed: int
    layers: list[Layer]
    meter: Meter
    first_head: int = 0
    rotary: Rotary | None = None
    ranks: Ranks | None = None
    token_ids: Tensor | None = None
    observer: Observer | None = None

    def run(self, step: StepLayout, running: Mapping[str, RunningRequest]) -> None:
        """Plan and carry out the compactions of a step whose attention is over, in all layers.

        Nothing of a request is rewritten before its plans were made and checked: those of a layer, or of all layers
        for methods of model scope. A request that is not `running` any more is left out.

        Raises:
            PlanError: a plan of the engine's method that cannot be carried out, a defect of the method.

        """
        groups = step.compaction_groups(self.method.needs.queries, running)
        for layers in [self.layers] if self.method.needs.scope == "model" else [[layer] for layer in self.layers]:
            for due in _portions(layers, groups):
                self._compact(layers, step, due)
        for one in (one for due in groups for one in due):
            one.request.compactions += 1
            one.request.compacted_slots = one.after.held
            self.meter.compactions += 1
            self.meter.dropped += one.held - one.after.held

    def _compact(self, layers: list[Layer], step: StepLayout, due: list[DueCompaction]) -> None:
        """Compact some requests of one group, in one or all layers."""
        views = [self.view(layer, step, due) for layer in layers]
        plans = self._plans(due, views)
        if self.observer is not None:
            for layer, view, plan in zip(layers, views, plans, strict=True):
                self.observer(layer.index, [one.name for one in due], view, plan)
        self.meter.note_plans(plans, len(self.layers))
        for layer, view, plan in zip(layers, views, plans, strict=True):
            _rewrite(layer, step, due, plan, view)

    def _plans(self, due: list[DueCompaction], views: list[PagedView]) -> list[Plan]:
        """Return one plan per layer, by the requests' method, or where its own options make it fail, by the engine's.

        A client may send any options that its method accepts. A failure by them must not end the engine, which serves
        others. With several ranks it still does: a rank that goes on alone would leave the rest waiting.
        """
        method, keep = due[0].request.method, due[0].after.held
        try:
            return _checked_plans(method, views, keep)
        except Exception as error:
            if method is self.method or self.ranks is not None:
                raise
            names = ", ".join(one.name for one in due)
            logger.warning(
                "Request %s goes on with the engine's options, because %s failed with its own: %s", names,
                method.spec(), error or type(error).__name__,
            )  # fmt: skip
            for one in due:
                one.request.method = self.method
            return _checked_plans(self.method, views, keep)

    def view(self, layer: Layer, step: StepLayout, due: list[DueCompaction]) -> PagedView:
        """Return what a method may look at for requests that hold equally many slots, after the step's attention."""
        slots, held, method = layer.slots, due[0].held, self.method
        length_b, row_b, settled_b, event_b, seed_b, prompt_b = torch.tensor(
            [
                [one.after.length, one.request.row, one.request.compacted_slots, one.request.compactions,
                 one.request.seed, one.before.prompt]
                for one in due
            ],
            device=layer.module.kv_cache.device,
        ).unbind(1)  # fmt: skip
        layout, cache, blocks_BM = layer.layout, layer.module.kv_cache, layer.blocks(step, due, held)
        assert layout is not None
        every_slot = torch.arange(held, device=cache.device).expand(len(due), slots.heads, held)
        index = slots.token_indices(row_b, held, length_b, settled_b)
        is_prompt = index < prompt_b[:, None, None]
        queries = query_index = None
        if slots.ring is not None:
            count = min(slots.ring.shape[1], due[0].after.length)
            queries, query_index = slots.recent_queries(row_b, length_b, count)
        tokens = None
        if self.token_ids is not None:
            tokens = tuple(self.token_ids[one.request.row, : one.after.length].long() for one in due)
        return PagedView(
            keys_BHND=None,  # type: ignore[arg-type]
            values_BHND=None,  # type: ignore[arg-type]
            read=lambda kind: layout.read(kind, cache, blocks_BM, every_slot),
            positions_BHN=index,
            counts_BHN=slots.source_counts(row_b, held, settled_b),
            is_prompt_BHN=is_prompt,
            is_protected_BHN=protected_slots(
                index,
                is_prompt,
                [one.budget for one in due],
                [one.before for one in due],
                [one.after for one in due],
                method.needs.recent,
            ),
            queries_BHqTD=queries,
            query_positions_BT=query_index,
            scaling=layer.module.impl.scale,
            state=slots.slot_state(row_b, index, settled_b),
            length_B=length_b,
            event_B=event_b,
            row_seed_B=seed_b,
            seed=self.seed,
            layer=layer.index,
            first_head=self.first_head,
            rows=tuple(one.index for one in due),
            prompt_length_B=prompt_b,
            query_heads=layer.module.num_heads,
            calibration=layer.calibration,
            rotary=self.rotary,
            token_ids=tokens,
            row_state={name: stored[row_b] for name, stored in slots.row_state.items()},
            ranks=self.ranks,
        )


def _checked_plans(method: Method, views: list[PagedView], keep: int) -> list[Plan]:
    plans = method.plan_layers(views, keep)
    for view, plan in zip(views, plans, strict=True):
        B, H, N = view.positions_BHN.shape
        plan.check((B, H, N), keep, view.is_protected_BHN)
        if plan.fold is not None and not method.needs.folds:
            raise PlanError(f"{method.name} folds slots without declaring Requirements(folds=True).")
    return plans


def _portions(layers: list[Layer], groups: list[list[DueCompaction]]) -> Iterator[list[DueCompaction]]:
    """Cut groups so that the copies of their keys and values stay small."""
    cache = layers[0].module.kv_cache
    portion = PORTION_BYTES["cpu" if cache.device.type == "cpu" else "accelerator"]
    for due in groups:
        row_bytes = due[0].held * cache[0, :, 0].numel() * cache.element_size() * len(layers)
        most = max(1, portion // row_bytes)
        yield from (due[start : start + most] for start in range(0, len(due), most))


def _rewrite(layer: Layer, step: StepLayout, due: list[DueCompaction], plan: Plan, view: PagedView) -> None:
    """Write what stays to the front of the requests' blocks, and note what it is."""
    kept_BHK, cache, layout, every_row = plan.kept_BHK, layer.module.kv_cache, layer.layout, list(range(len(due)))
    assert layout is not None
    if plan.fold is not None:
        keys, values = view.keys_BHND.contiguous(), view.values_BHND.contiguous()
        new = dict(zip(_FIELDS, compact_pair(keys, values, every_row, plan, view.positions_BHN), strict=True))
    else:
        blocks_BM = layer.blocks(step, due, view.positions_BHN.shape[2])
        new = {
            kind: gather_slots(getattr(view, field).contiguous(), every_row, kept_BHK)
            if view.was_read(kind)
            else layout.read(kind, cache, blocks_BM, kept_BHK)
            for kind, field in _FIELDS.items()
        }
    for kind, x_BHKD in new.items():
        layout.write_front(kind, cache, layer.blocks(step, due, kept_BHK.shape[2]), x_BHKD)
    row_b = torch.tensor([one.request.row for one in due], device=kept_BHK.device)
    layer.slots.settle(row_b, plan, view)
