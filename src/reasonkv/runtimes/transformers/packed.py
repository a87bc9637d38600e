"""Kept slots in 8, 4 or 2 bits: keys per channel and values per token, as in KIVI (Liu et al., 2024, arXiv 2402.02750).

Between forwards the oldest slots of a layer are codes, and the newest 32 to 63 are in the model's dtype. A forward
unpacks one layer, attends, compacts, and packs it again; its own tokens attend to each other in the model's dtype.

A compaction breaks the groups that keys are quantised in. So steps are powers of two and every grid has a point at 0:
grids are nested, and a number that stood on one grid stands on every finer one. Values never change once they are
packed. A key changes only where its new group needs a coarser step, by half of it, however often it is moved.

Legend: B rows, H KV heads, N slots (a multiple of GROUP), G = GROUP, D width of a key or value.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from reasonkv.budget import BudgetError
from reasonkv.methods import Requirements
from reasonkv.methods.ops import upcast
from reasonkv.runtimes.transformers.forward import ForwardPlan
from reasonkv.runtimes.transformers.storage import LayerStorage

KVDtype = Literal["int8", "int4", "int2"]
"""What kept slots are stored in, unless in the model's dtype."""
GROUP = 32
"""Slots whose keys share a step in every channel, and channels of a value that share one; KIVI's group size."""
RESIDUAL = 32
"""Newest slots that always stay in the model's dtype; KIVI keeps up to its residual length of 128."""
_OFFSET_BITS = 14  # of an offset in steps, which is stored as int16
_GRID_BYTES = 3  # of a group: exponent and offset


def bits_of(dtype: str | None) -> int | None:
    """Return the bits of a stored number; None for the model's own dtype.

    Raises:
        BudgetError: no such dtype.
    """
    if dtype is None:
        return None
    if dtype not in get_args(KVDtype):
        raise BudgetError(f"dtype must be int8, int4 or int2, or None for the model's own, not {dtype!r}.")
    return int(dtype.removeprefix("int"))


def packed_slots(held: int) -> int:
    """Return how many of the slots that are held are stored as codes: whole groups beside the residual."""
    return max(0, held - RESIDUAL) // GROUP * GROUP


def tokens_to_packing(held: int) -> int:
    """Return after how many more tokens the next group of slots becomes codes."""
    return packed_slots(held) + RESIDUAL + GROUP - held


class Codes(NamedTuple):
    """Numbers of groups: (code + offset) * 2 ** exponent; codes uint8, exponents int8, offsets int16."""

    code: Tensor
    exponent: Tensor
    offset: Tensor


def encode(x: Tensor, bits: int, dim: int) -> Codes:
    """Return the codes of numbers whose groups lie along one axis.

    The step is the least power of two with which the group's range fits into the codes.
    """
    x, levels = upcast(x), 2**bits - 1
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    mantissa, exponent = torch.frexp((high - low) / levels)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)  # a range of exactly 2 ** n steps
    exponent = exponent.maximum(torch.frexp(low.abs().maximum(high.abs())).exponent - _OFFSET_BITS)
    exponent = exponent.clamp(-126, 126)
    step = power(exponent, x.dtype)
    # both ends may be rounded outwards
    exponent = torch.where((high / step).round() - (low / step).round() > levels, exponent + 1, exponent)
    step = power(exponent, x.dtype)
    offset = (low / step).round()
    code = ((x / step).round() - offset).clamp(0, levels)
    return Codes(code.to(torch.uint8), exponent.to(torch.int8), offset.to(torch.int16))


def decode(codes: Codes, dtype: torch.dtype) -> Tensor:
    """Return the numbers that codes stand for."""
    wide = torch.promote_types(dtype, torch.float32)
    return ((codes.code.to(wide) + codes.offset) * power(codes.exponent, wide)).to(dtype)


def power(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 2 ** exponent, -126 to 127, exactly: the bits of a float32."""
    return ((exponent.to(torch.int32) + 127) << 23).view(torch.float32).to(dtype)


def _in_bytes(code_bHND: Tensor, bits: int) -> Tensor:
    """Return codes of neighbouring slots together in one byte, [b, H, N bits / 8, D]."""
    in_one = 8 // bits
    whole = code_bHND[:, :, ::in_one]
    for slot in range(1, in_one):
        whole = whole | (code_bHND[:, :, slot::in_one] << (slot * bits))
    return whole


def _out_of_bytes(code_bHND: Tensor, bits: int) -> Tensor:
    """Return the codes that `_in_bytes` put together, [b, H, N, D]."""
    if bits == 8:
        return code_bHND
    parts = [(code_bHND >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    return torch.stack(parts, 3).flatten(2, 3)


class _Buffers:
    """The codes of keys or of values of one layer for slots that are packed; grouped by slots or by channels."""

    def __init__(self, like: Tensor, bits: int, by_channel: bool) -> None:
        (self.rows, self.heads, _, self.width), self.bits, self.by_channel = like.shape, bits, by_channel
        self.group = GROUP if by_channel or self.width % GROUP == 0 else self.width
        self.dtype, self.device, self.slots = like.dtype, like.device, 0
        self.stored = Codes(*self._new(0))

    def resize(self, slots: int) -> None:
        """Make room for exactly so many slots."""
        old, self.slots = self.stored, slots
        self.stored = Codes(*self._new(slots))
        for new, before in zip(self.stored, old, strict=True):
            lines = min(new.shape[2], before.shape[2])
            new[:, :, :lines] = before[:, :, :lines]

    def write(self, rows: slice | Tensor, start: int, x_bHND: Tensor) -> None:
        """Encode slots from `start` on, a multiple of GROUP."""
        end = start + x_bHND.shape[2]
        codes = encode(self._grouped(x_bHND), self.bits, 3 if self.by_channel else 4)
        code_bHND = codes.code.reshape(x_bHND.shape)
        code_bHND = _in_bytes(code_bHND, self.bits)
        parts = (code_bHND, codes.exponent.flatten(3), codes.offset.flatten(3))
        for stored, part, step in zip(self.stored, parts, self._slots_a_line(), strict=True):
            stored[rows, :, start // step : end // step] = part

    def read(self, rows: slice | Tensor, end: int) -> Tensor:
        """Return the first slots [b, H, end, D] in the model's dtype."""
        code, exponent, offset = (
            stored[rows, :, : end // step] for stored, step in zip(self.stored, self._slots_a_line(), strict=True)
        )
        code = _out_of_bytes(code, self.bits)
        dim = 3 if self.by_channel else 4
        grid = (exponent.unsqueeze(dim), offset.unsqueeze(dim))
        return decode(Codes(self._grouped(code), *grid), self.dtype).reshape(code.shape)

    def bytes_per_slot(self) -> float:
        """Bytes of a slot of all KV heads, its part of the grids included."""
        grids = self.width / GROUP if self.by_channel else self.width / self.group
        return self.heads * (self.width * self.bits / 8 + _GRID_BYTES * grids)

    def select_rows(self, index: Tensor) -> None:
        """Reorder, repeat or drop rows."""
        self.rows = len(index)
        self.stored = Codes(*(stored.index_select(0, index) for stored in self.stored))

    def _grouped(self, x_bHND: Tensor) -> Tensor:
        """Return [b, H, N / G, G, D] for groups of slots, [b, H, N, D / g, g] for groups of channels."""
        return (
            torch.unflatten(x_bHND, 2, (-1, GROUP)) if self.by_channel else torch.unflatten(x_bHND, 3, (-1, self.group))
        )

    def _slots_a_line(self) -> tuple[int, int, int]:
        grid = GROUP if self.by_channel else 1
        return 8 // self.bits, grid, grid

    def _new(self, slots: int) -> Iterator[Tensor]:
        numbers = self.width if self.by_channel else self.width // self.group
        widths = (self.width, numbers, numbers)
        for step, width, dtype in zip(
            self._slots_a_line(), widths, (torch.uint8, torch.int8, torch.int16), strict=True
        ):
            yield torch.zeros(self.rows, self.heads, slots // step, width, dtype=dtype, device=self.device)


class PackedStorage(LayerStorage):
    """Storage of one layer whose oldest slots are codes between forwards.

    Args:
        keys, values, needs, capacity: as in `LayerStorage`.
        bits: of a stored number: 8, 4 or 2.
    """

    def __init__(self, keys: Tensor, values: Tensor, needs: Requirements, capacity: int | None, bits: int) -> None:
        super().__init__(keys, values, needs, capacity)
        self.packed = (_Buffers(keys, bits, by_channel=True), _Buffers(values, bits, by_channel=False))
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

    def pack(self, forward: ForwardPlan) -> None:
        """Store what the layer holds after a forward and its compaction, and free the unpacked slots."""
        after = [state.physical for state in forward.after]
        packed = [packed_slots(held) for held in after]
        self._make_room_for_codes(max(packed))
        # without a compaction, what is packed stays as it is
        starts = [packed_slots(held) if keep is None else 0 for held, keep in zip(self.held, forward.keep, strict=True)]
        for (start, held), at in self._alike(list(zip(starts, after, strict=True))):
            end = packed_slots(held)
            for whole, codes, tail in zip((self.keys, self.values), self.packed, self.tails, strict=True):
                if end > start:
                    codes.write(at, start, whole[at, :, start:end])
                tail[at, :, : held - end] = whole[at, :, end:held]
        self.held = after
        self.keys, self.values = self._new(0, self.keys, self.values)

    def bytes_allocated(self) -> int:
        """Bytes of codes, grids and newest slots for the whole batch, and of the unpacked slots during a forward."""
        stored = [*self.packed[0].stored, *self.packed[1].stored, *self.tails]
        return super().bytes_allocated() + sum(tensor.nbytes for tensor in stored)

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
