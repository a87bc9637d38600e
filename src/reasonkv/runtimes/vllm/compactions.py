"""Compactions of one step: views of the slots, plans, their checks, and the rewriting of blocks.

All requests of a step that hold equally many slots are planned together: per layer one plan, one gather, one write.
Keys and values are read out of their blocks only as far as somebody looks at them: all slots if the method does,
otherwise only the kept ones.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reasonkv.compaction import compact_pair, gather_slots
from reasonkv.methods import Method
from reasonkv.plan import Plan
from reasonkv.rotary import Rotary
from reasonkv.runtimes.vllm.layout import Codec, Kind, Layout
from reasonkv.runtimes.vllm.metrics import Meter
from reasonkv.runtimes.vllm.slots import PagedSlotStore
from reasonkv.runtimes.vllm.step import DueCompaction, RunningRequest, StepLayout
from reasonkv.slots import CompactionGroup, make_plans, make_view
from reasonkv.view import LayerStatistics, Ranks, SlotView

logger = logging.getLogger("vllm.reasonkv")

PORTION_BYTES = {"cpu": 1 << 23, "accelerator": 1 << 28}
"""Keys and values that are copied at once. A step that compacts hundreds of requests would otherwise need memory that
nobody set aside; a CPU's copies stay in its cache, and in pages that the allocator has at hand."""

Observer = Callable[[int, list[str], SlotView, Plan], None]
"""Called as `observer(layer, requests, view, plan)`: row i of the view and of the plan is request `requests[i]`."""

_FIELDS: dict[Kind, str] = {"keys": "keys_BHND", "values": "values_BHND"}


@dataclass
class Layer:
    """One compressed layer of the engine."""

    index: int  # its number in the model
    module: Any  # vLLM's attention layer, which owns the blocks (`kv_cache`) and the implementation (`impl`)
    slots: PagedSlotStore  # what is stored beside keys and values
    calibration: LayerStatistics | None = None  # of its queries, this rank's heads
    tier: int = 0  # which of the engine's; its layers follow one budget
    group: int = 0  # which of vLLM's groups of layers; each has a block table of its own
    place: int = 0  # in its group; the layers at a place of all groups share memory, for they hold different blocks
    layout: Layout | None = None  # where the platform puts keys and values, once blocks exist
    codec: Codec | None = None  # what they stand for, if they are stored in 8 bits

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot's keys and values."""
        cache = self.module.kv_cache
        return int(cache[0, :, 0].numel()) * int(cache.element_size())

    def read(self, kind: Kind, blocks_BM: Tensor, slots_BHK: Tensor) -> Tensor:
        """Return keys or values of some slots, every head its own, as numbers: [B, H, K, D]."""
        stored = self.read_stored(kind, blocks_BM, slots_BHK)
        return stored if self.codec is None else self.codec.decode(kind, stored, self.slots.dtype)

    def read_stored(self, kind: Kind, blocks_BM: Tensor, slots_BHK: Tensor) -> Tensor:
        """Return the same as it is stored."""
        assert self.layout is not None
        return self.layout.read(kind, self.module.kv_cache, blocks_BM, slots_BHK)

    def write_front(self, kind: Kind, blocks_BM: Tensor, x_BHKD: Tensor) -> None:
        """Write what is stored of keys or values, or numbers, to the first K slots of every row."""
        assert self.layout is not None
        if self.codec is not None and x_BHKD.dtype != self.module.kv_cache.dtype:
            x_BHKD = self.codec.encode(kind, x_BHKD)
        self.layout.write_front(kind, self.module.kv_cache, blocks_BM, x_BHKD)


@dataclass(frozen=True)
class PagedView(SlotView):
    """A view made without keys and values (None): `read` reads them out of their blocks when first looked at."""

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
        vars(self)[name] = found = self.read(kind)
        return found

    def was_read(self, kind: Kind) -> bool:
        """Return whether somebody looked at them."""
        return _FIELDS[kind] in vars(self)


@dataclass
class Compactor:
    """Plans and carries out the compactions of an engine's steps."""

    method: Method  # the engine's
    seed: int
    layers: list[Layer]
    meter: Meter
    first_head: int = 0  # global index of this rank's first KV head
    rotary: Rotary | None = None  # if the method needs it
    ranks: Ranks | None = None  # those with the layers' other heads
    token_ids: Tensor | None = None  # int32 [rows, length], tokens of every request, if the method needs them
    observer: Observer | None = None  # sees every plan

    def run(
        self, step: StepLayout, tier: list[Layer], block_tables: Mapping[int, Tensor],
        running: Mapping[str, RunningRequest],
    ) -> None:  # fmt: skip
        """Plan and carry out the compactions of a step whose attention is over, in the layers of a tier.

        `block_tables` are the step's, by `Layer.group`: [requests or more, blocks], in the batch's order.

        Nothing of a request is rewritten before its plans were made and checked: those of a layer, or of all layers
        for methods of model scope. A request that is not `running` any more is left out. Raises a PlanError for a plan
        of the engine's method that cannot be carried out.
        """
        needs = self.method.needs
        together = [tier] if needs.scope == "model" else [[layer] for layer in tier]
        device = self.layers[0].module.kv_cache.device
        portion = PORTION_BYTES["cpu" if device.type == "cpu" else "accelerator"] // len(together[0])
        parts = []
        for due in step.compaction_groups(needs.queries, running):
            most = max(1, portion // (due[0].held * self.layers[0].slot_bytes))
            parts += [due[start : start + most] for start in range(0, len(due), most)]
        groups = [_group(part) for part in parts]
        for layers in together:
            for due, group in zip(parts, groups, strict=True):
                self._compact(layers, block_tables, due, group)
        share = len(tier) / len(self.layers)
        for one in (one for due in parts for one in due):
            one.request.compactions += 1
            one.request.compacted_slots = one.after.physical
            self.meter.compactions += share
            self.meter.dropped += (one.held - one.after.physical) * share

    def _compact(
        self,
        layers: Sequence[Layer],
        block_tables: Mapping[int, Tensor],
        due: list[DueCompaction],
        group: CompactionGroup,
    ) -> None:
        """Compact one group of requests, in one or all layers."""
        index_b = torch.tensor(group.batch_rows, device=layers[0].module.kv_cache.device)
        block_size = layers[0].module.kv_cache.shape[2]
        blocks = {one: table[index_b, : -(-group.held // block_size)] for one, table in block_tables.items()}
        for layer in layers:
            layer.slots.use_blocks(blocks[layer.group])
        views = [self.view(layer, due, group, blocks[layer.group]) for layer in layers]
        plans = self._plans(due, views)
        if self.observer is not None:
            for layer, view, plan in zip(layers, views, plans, strict=True):
                self.observer(layer.index, [one.name for one in due], view, plan)
        self.meter.note_plans(plans, len(self.layers))
        for layer, view, plan in zip(layers, views, plans, strict=True):
            _rewrite(layer, blocks[layer.group], plan, view)
            layer.slots.write_compacted(group.numbers(layer.slots.device)[0], plan, view)

    def _plans(self, due: list[DueCompaction], views: list[PagedView]) -> list[Plan]:
        """Return one plan per layer, by the requests' method, or where its own options make it fail, by the engine's.

        A client may send any options that its method accepts. A failure by them must not end the engine, which serves
        others. With several ranks it still does: a rank that goes on alone would leave the rest waiting.
        """
        method, keep = due[0].request.method, due[0].after.physical
        try:
            return make_plans(method, views, keep)
        except Exception as error:
            if method is self.method or self.ranks is not None:
                raise
            names = ", ".join(one.name for one in due)
            logger.warning(
                "Request %s goes on with the engine's options, because %s failed with its own: %s", names,
                method.spec(), error or type(error).__name__,
            )  # fmt: skip
            for one in due:
                one.request.asked.method = self.method
            return make_plans(self.method, views, keep)

    def view(self, layer: Layer, due: list[DueCompaction], group: CompactionGroup, blocks_BM: Tensor) -> PagedView:
        """Return what a method may look at in one layer, after the step's attention."""
        tokens = None
        if self.token_ids is not None:
            tokens = tuple(self.token_ids[one.request.row, : one.after.logical].long() for one in due)
        every_slot = torch.arange(group.held, device=blocks_BM.device).expand(len(due), layer.slots.heads, -1)
        return make_view(
            PagedView, layer.slots, group, keys_BHND=None, values_BHND=None,
            read=lambda kind: layer.read(kind, blocks_BM, every_slot),
            scaling=layer.module.impl.scale, seed=self.seed, layer=layer.index, first_head=self.first_head,
            query_heads=layer.module.num_heads, calibration=layer.calibration, rotary=self.rotary, token_ids=tokens,
            ranks=self.ranks,
        )  # fmt: skip


def _group(due: list[DueCompaction]) -> CompactionGroup:
    requests = [one.request for one in due]
    return CompactionGroup(
        rows=[one.row for one in requests], batch_rows=[one.batch_row for one in due], held=due[0].held,
        keep=due[0].after.physical, budgets=[one.budget for one in due], before=[one.before for one in due],
        after=[one.after for one in due], compacted_slots=[one.compacted_slots for one in requests],
        events=[one.compactions for one in requests], seeds=[one.seed for one in requests],
        prompt_spans=[[(0, one.before.prompt)] for one in due],
    )  # fmt: skip


def _rewrite(layer: Layer, blocks_BM: Tensor, plan: Plan, view: PagedView) -> None:
    """Write what stays to the front of the requests' blocks."""
    every_row = list(range(len(blocks_BM)))
    if plan.merge is not None:
        keys, values = view.keys_BHND.contiguous(), view.values_BHND.contiguous()
        new = dict(zip(_FIELDS, compact_pair(keys, values, every_row, plan, view.positions_BHN), strict=True))
    else:
        new = {
            kind: gather_slots(getattr(view, field).contiguous(), every_row, plan.kept_BHK)
            if view.was_read(kind) and layer.codec is None
            else layer.read_stored(kind, blocks_BM, plan.kept_BHK)
            for kind, field in _FIELDS.items()
        }
    for kind, x_BHKD in new.items():
        layer.write_front(kind, blocks_BM, x_BHKD)
