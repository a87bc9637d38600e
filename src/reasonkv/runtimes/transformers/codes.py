"""Codes of kept slots: what every way of storing a layer's keys or values in few bits does for `PackedStorage`.

Legend: B rows of the batch, b some of them, H KV heads, N slots, D width of a key or value.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

Rows = slice | Tensor
"""Rows of a batch: all of them, or their int64 numbers [b]."""


class Part(NamedTuple):
    """One stored tensor, [B, H, N / slots, width]."""

    slots: int
    width: int
    dtype: torch.dtype


class SlotCodes(ABC):
    """The codes of keys or of values of one layer for slots that are packed.

    Args:
        like: keys or values of the first forward, [B, H, q, D].
        bits: of a stored number.
    """

    def __init__(self, like: Tensor, bits: int) -> None:
        (self.rows, self.heads, _, self.width), self.bits = like.shape, bits
        self.dtype, self.device, self.slots = like.dtype, like.device, 0
        self.stored = self._new(0)

    @abstractmethod
    def parts(self) -> list[Part]:
        """Return what is stored, in the order of `encode`."""

    @abstractmethod
    def encode(self, rows: Rows, x_bHND: Tensor) -> list[Tensor]:
        """Return the parts of some slots, [b, H, N / slots, width] each."""

    @abstractmethod
    def decode(self, rows: Rows, parts: list[Tensor]) -> Tensor:
        """Return the slots that parts stand for, [b, H, N, D] in the model's dtype."""

    def read(self, rows: Rows, end: int) -> Tensor:
        """Return the first slots [b, H, end, D] in the model's dtype."""
        return self.decode(
            rows, [own[rows, :, : end // part.slots] for own, part in zip(self.stored, self.parts(), strict=True)]
        )

    def write(self, rows: Rows, start: int, x_bHND: Tensor) -> None:
        """Encode new slots from `start` on; a multiple of the slots of every part, as is their number."""
        self._place(rows, start, start + x_bHND.shape[2], self.encode(rows, x_bHND))

    def rewrite(self, rows: Rows, x_bHND: Tensor, source_bHN: Tensor, stays_bHN: Tensor) -> None:
        """Store the first slots as a compaction left them.

        Args:
            rows: whose.
            x_bHND: the slots now.
            source_bHN: which slots they were.
            stays_bHN: those that were packed, and that the method left as they were.
        """
        self.write(rows, 0, x_bHND)

    def resize(self, slots: int) -> None:
        """Make room for exactly so many slots."""
        old, self.slots = self.stored, slots
        self.stored = self._new(slots)
        for new, before in zip(self.stored, old, strict=True):
            lines = min(new.shape[2], before.shape[2])
            new[:, :, :lines] = before[:, :, :lines]

    def select_rows(self, index: Tensor) -> None:
        """Reorder, repeat or drop rows."""
        self.rows = len(index)
        self.stored = [stored.index_select(0, index) for stored in self.stored]

    def bytes_per_slot(self) -> float:
        """Bytes of a slot of all KV heads."""
        return self.heads * sum(part.width * part.dtype.itemsize / part.slots for part in self.parts())

    def bytes_per_row(self) -> int:
        """Bytes of a row that do not depend on its slots."""
        return 0

    def nbytes(self) -> int:
        """Bytes that are allocated."""
        return sum(stored.nbytes for stored in self.stored) + self.rows * self.bytes_per_row()

    def _place(self, rows: Rows, start: int, end: int, parts: list[Tensor]) -> None:
        for stored, part, new in zip(self.stored, self.parts(), parts, strict=True):
            stored[rows, :, start // part.slots : end // part.slots] = new

    def _new(self, slots: int) -> list[Tensor]:
        shape = (self.rows, self.heads)
        return [
            torch.zeros(*shape, slots // part.slots, part.width, dtype=part.dtype, device=self.device)
            for part in self.parts()
        ]


def in_bytes(code: Tensor, bits: int, dim: int) -> Tensor:
    """Return codes of neighbours along an axis together in one byte, uint8."""
    dim %= code.ndim
    whole, *others = torch.unflatten(code, dim, (-1, 8 // bits)).unbind(dim + 1)
    for place, other in enumerate(others, 1):
        whole = whole | (other << (place * bits))
    return whole


def out_of_bytes(whole: Tensor, bits: int, dim: int) -> Tensor:
    """Return the codes that `in_bytes` put together."""
    parts = [(whole >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    return torch.stack(parts, dim + 1).flatten(dim, dim + 1)
