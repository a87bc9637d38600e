"""Uniform grids, as in KIVI (Liu et al., 2024, arXiv 2402.02750): keys per channel and values per token.

A compaction breaks the groups that keys are quantised in. So steps are powers of two and every grid has a point at 0:
grids are nested, and a number that stood on one grid stands on every finer one. Values never change once they are
packed. A key changes only where its new group needs a coarser step, by half of it, however often it is moved.

Legend: as in `reasonkv.runtimes.transformers.codes`; N is a multiple of GROUP, G = GROUP.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from reasonkv.methods.ops import upcast
from reasonkv.runtimes.transformers.codes import Part, Rows, SlotCodes, in_bytes, out_of_bytes

GROUP = 32
"""Slots whose keys share a step in every channel, and channels of a value that share one; KIVI's group size."""
_OFFSET_BITS = 14  # of an offset in steps, which is stored as int16


class Grid(NamedTuple):
    """Numbers of groups: (code + offset) * 2 ** exponent; codes uint8, exponents int8, offsets int16."""

    code: Tensor
    exponent: Tensor
    offset: Tensor


def encode(x: Tensor, bits: int, dim: int) -> Grid:
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
    return Grid(code.to(torch.uint8), exponent.to(torch.int8), offset.to(torch.int16))


def decode(grid: Grid, dtype: torch.dtype) -> Tensor:
    """Return the numbers that codes stand for."""
    wide = torch.promote_types(dtype, torch.float32)
    return ((grid.code.to(wide) + grid.offset) * power(grid.exponent, wide)).to(dtype)


def power(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 2 ** exponent, -126 to 127, exactly: the bits of a float32."""
    return ((exponent.to(torch.int32) + 127) << 23).view(torch.float32).to(dtype)


class GridCodes(SlotCodes):
    """Codes on grids of groups of slots, channel by channel, or of groups of channels, slot by slot.

    Args:
        like, bits: as in `SlotCodes`.
        by_channel: groups of slots.
    """

    def __init__(self, like: Tensor, bits: int, by_channel: bool) -> None:
        self.by_channel, self.dim = by_channel, 3 if by_channel else 4
        self.group = GROUP if by_channel or like.shape[3] % GROUP == 0 else like.shape[3]
        super().__init__(like, bits)

    def parts(self) -> list[Part]:
        """Return codes of neighbouring slots in one byte, exponents and offsets."""
        slots, width = (GROUP, self.width) if self.by_channel else (1, self.width // self.group)
        codes = Part(8 // self.bits, self.width, torch.uint8)
        return [codes, Part(slots, width, torch.int8), Part(slots, width, torch.int16)]

    def encode(self, rows: Rows, x_bHND: Tensor) -> list[Tensor]:
        """Return the parts of some slots."""
        grid = encode(self._grouped(x_bHND), self.bits, self.dim)
        code_bHND = in_bytes(grid.code.reshape(x_bHND.shape), self.bits, 2)
        return [code_bHND, grid.exponent.flatten(3), grid.offset.flatten(3)]

    def decode(self, rows: Rows, parts: list[Tensor]) -> Tensor:
        """Return the slots that parts stand for."""
        code_bHND, exponent, offset = out_of_bytes(parts[0], self.bits, 2), *parts[1:]
        grid = Grid(self._grouped(code_bHND), exponent.unsqueeze(self.dim), offset.unsqueeze(self.dim))
        return decode(grid, self.dtype).reshape(code_bHND.shape)

    def _grouped(self, x_bHND: Tensor) -> Tensor:
        """Return [b, H, N / G, G, D] for groups of slots, [b, H, N, D / g, g] for groups of channels."""
        return (
            torch.unflatten(x_bHND, 2, (-1, GROUP)) if self.by_channel else torch.unflatten(x_bHND, 3, (-1, self.group))
        )
