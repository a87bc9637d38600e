"""Kept slots in few bits: on grids (`int8`, `int4`, `int2`), or rotated and in a codebook (`turbo4`, `turbo2`).

Between forwards the oldest slots of a layer are codes, and the newest 32 to 63 are in the model's dtype. A forward
unpacks one layer, attends, compacts, and packs it again; its own tokens attend to each other in the model's dtype.

Legend: B rows, b some of them, H KV heads, N slots, D width of a key or value.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from reasonkv.compaction import gather_slots
from reasonkv.methods import Requirements
from reasonkv.numbers import KVDtype
from reasonkv.plan import Plan
from reasonkv.runtimes.transformers.codes import SlotCodes
from reasonkv.runtimes.transformers.forward import ForwardPlan
from reasonkv.runtimes.transformers.grids import GROUP, GridCodes
from reasonkv.runtimes.transformers.rotated import RotatedCodes
from reasonkv.runtimes.transformers.storage import LayerStorage
from reasonkv.slots import CompactionGroup
from reasonkv.view import SlotView

RESIDUAL = 32
"""Newest slots that always stay in the model's dtype; KIVI keeps up to its residual length of 128."""


def packed_slots(held: int) -> int:
    """Return how many of the slots that are held are stored as codes: whole groups beside the residual."""
    return max(0, held - RESIDUAL) // GROUP * GROUP


def tokens_to_packing(held: int) -> int:
    """Return after how many more tokens the next group of slots becomes codes."""
    return packed_slots(held) + RESIDUAL + GROUP - held


def codes_of(keys: Tensor, values: Tensor, dtype: KVDtype) -> tuple[SlotCodes, SlotCodes]:
    """Return empty codes for the keys and for the values of a layer."""
    bits = int(dtype[-1])
    if dtype.startswith("turbo"):
        return RotatedCodes(keys, bits, by_channel=True), RotatedCodes(values, bits, by_channel=False)
    return GridCodes(keys, bits, by_channel=True), GridCodes(values, bits, by_channel=False)


class PackedStorage(LayerStorage):
    """Storage of one layer whose oldest slots are codes between forwards.

    Args:
        keys, values, needs, capacity: as in `LayerStorage`.
        dtype: what the packed slots are stored in.
    """

    def __init__(self, keys: Tensor, values: Tensor, needs: Requirements, capacity: int | None, dtype: KVDtype) -> None:
        super().__init__(keys, values, needs, capacity)
        self.packed = codes_of(keys, values, dtype)
        self.tails = self._new(RESIDUAL + GROUP - 1, keys, values)
        self.held = [0] * self.rows  # slots of every row, packed ones included

    def append(self, keys_BHqD: Tensor, values_BHqD: Tensor, plan: ForwardPlan) -> tuple[Tensor, Tensor]:
        """Unpack the layer, write one forward's tokens, and return everything to attend to, [B, H, width, D]."""
        self.keys, self.values = self._new(plan.width, self.keys, self.values)
        for (held,), at in self._alike([(held,) for held in self.held]):
            end = packed_slots(held)
            for whole, codes, tail in zip((self.keys, self.values), self.packed, self.tails, strict=True):
                whole[at, :, :end] = codes.read(at, end)
                whole[at, :, end:held] = tail[at, :, : held - end]
        return super().append(keys_BHqD, values_BHqD, plan)

    def compact(self, plans: list[tuple[CompactionGroup, Plan, SlotView]], forward: ForwardPlan) -> None:
        """Rewrite the storage after one forward, and the codes of the rows that are compacted."""
        before = [self._kept(group, plan) if plan.merge is not None else None for group, plan, _ in plans]
        super().compact(plans, forward)
        # never less than now: slots are read from where they were
        self._make_room_for_codes(max(self.packed[0].slots, *(packed_slots(one.physical) for one in forward.after)))
        for (group, plan, _), pair in zip(plans, before, strict=True):
            row_b, end = group.numbers(self.device)[0], packed_slots(group.keep)
            if end == 0:
                continue
            source_bHN = plan.kept_BHK[:, :, :end]
            packed_b = torch.tensor([packed_slots(self.held[row]) for row in group.rows], device=self.device)
            is_packed_bHN = source_bHN < packed_b[:, None, None]
            for number, (codes, now) in enumerate(zip(self.packed, (self.keys, self.values), strict=True)):
                x_bHND, stays_bHN = now[row_b, :, :end], is_packed_bHN
                if pair is not None:  # merging changes some of what stays
                    stays_bHN = is_packed_bHN & (x_bHND == pair[number][:, :, :end]).all(3)
                codes.rewrite(row_b, x_bHND, source_bHN, stays_bHN)

    def pack(self, forward: ForwardPlan) -> None:
        """Store what the layer holds after a forward and its compaction, and free the unpacked slots."""
        after = [state.physical for state in forward.after]
        packed = [packed_slots(held) for held in after]
        self._make_room_for_codes(max(packed))
        # a compaction has packed what it left
        starts = [
            packed_slots(held if keep is None else now)
            for held, keep, now in zip(self.held, forward.keep, after, strict=True)
        ]
        for (start, held), at in self._alike(list(zip(starts, after, strict=True))):
            end = packed_slots(held)
            for whole, codes, tail in zip((self.keys, self.values), self.packed, self.tails, strict=True):
                if end > start:
                    codes.write(at, start, whole[at, :, start:end])
                tail[at, :, : held - end] = whole[at, :, end:held]
        self.held = after
        self.keys, self.values = self._new(0, self.keys, self.values)

    def bytes_allocated(self) -> int:
        """Bytes of codes and newest slots for the whole batch, and of the unpacked slots during a forward."""
        stored = sum(codes.nbytes() for codes in self.packed) + sum(tensor.nbytes for tensor in self.tails)
        return super().bytes_allocated() + stored

    def bytes_per_row(self) -> int:
        """Bytes of a row that do not depend on its slots: means and sizes of channels, too."""
        return super().bytes_per_row() + sum(codes.bytes_per_row() for codes in self.packed)

    def bytes_per_stored_token(self) -> float:
        """Bytes of a packed key and value."""
        return sum(codes.bytes_per_slot() for codes in self.packed)

    def bytes_of(self, slots: int) -> int:
        """Bytes of so many slots of a row, of which the newest are not packed."""
        packed = packed_slots(slots)
        plain = super().bytes_of(slots) - packed * self.bytes_per_token()
        return plain + round(packed * self.bytes_per_stored_token())

    def select_rows(self, index: Tensor) -> None:
        """Reorder, repeat or drop rows everywhere (beams)."""
        super().select_rows(index)
        at = index.to(self.device)
        for codes in self.packed:
            codes.select_rows(at)
        self.tails = (self.tails[0].index_select(0, at), self.tails[1].index_select(0, at))
        self.held = [self.held[row] for row in index.tolist()]

    def _kept(self, group: CompactionGroup, plan: Plan) -> list[Tensor]:
        """Return keys and values of the slots that a plan keeps, as they are before it."""
        return [gather_slots(one, list(group.rows), plan.kept_BHK) for one in (self.keys, self.values)]

    def _alike(self, numbers: Sequence[tuple[int, ...]]) -> Iterator[tuple[tuple[int, ...], slice | Tensor]]:
        """Yield every different entry with the rows that have it; all rows are a slice."""
        for own in dict.fromkeys(numbers):
            rows = [row for row, other in enumerate(numbers) if other == own]
            yield own, slice(None) if len(rows) == self.rows else torch.tensor(rows, device=self.device)

    def _make_room_for_codes(self, slots: int) -> None:
        """Allocate the capacity at once where it is known; a long prompt may need more until it is compacted."""
        allocated, whole = self.packed[0].slots, -(-self.capacity // GROUP) * GROUP
        if self.is_bounded:
            wanted = whole if slots <= whole else max(slots, allocated)
        else:
            wanted = allocated if slots <= allocated else (slots + slots // 2) // GROUP * GROUP
        if wanted != allocated:
            for codes in self.packed:
                codes.resize(wanted)

    def _make_room(self, width: int) -> None:
        """Nothing to do: `append` has made room."""

    def _settle(self, forward: ForwardPlan) -> None:
        """Nothing to do: unpacked slots are freed after every forward."""
