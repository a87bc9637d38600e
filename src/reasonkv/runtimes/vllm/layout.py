"""Where the platform's kernels put a key or value in a block, found out by asking them.

Attention kernels pack keys and values as they like: CPU kernels interleave them per instruction set, others split them
by head or by token. Instead of knowing every packing, the engine writes a numbered ramp through the platform's own
cache operation when it starts, and where the numbers end up is the layout. Reading and writing then move elements. A
cache of 8-bit numbers has a `Codec` beside its layout: slots move as they are stored, and methods see numbers.

Legend: B rows, M blocks per row, H KV heads, S slots per block, K slots read or written, D head_dim, E elements.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from reasonkv.errors import ReasonKVError

_DIGITS = {torch.float8_e4m3fn: 16, torch.float8_e4m3fnuz: 16, torch.float8_e5m2: 8, torch.float8_e5m2fnuz: 8}
_BASE = 128  # digits, 0 to base - 1, that all wider floating-point types hold exactly

Kind = Literal["keys", "values"]
Write = Callable[[Tensor, Tensor, Tensor, Tensor], None]
"""`write(keys_nHD, values_nHD, kv_cache, slots_n)`: the platform's cache operation."""


class LayoutError(ReasonKVError, RuntimeError):
    """A cache operation that does more than move elements, so that nothing can be read back."""


@dataclass(frozen=True)
class Codec:
    """What the bytes of an 8-bit cache stand for: numbers of a dtype, times one scale for keys and one for values.

    A number that was decoded is encoded as the same byte again.
    """

    dtype: torch.dtype
    scales: dict[Kind, float]

    def decode(self, kind: Kind, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """Return stored bytes as numbers of `dtype`."""
        return (stored.view(self.dtype).float() * self.scales[kind]).to(dtype)

    def encode(self, kind: Kind, x: Tensor) -> Tensor:
        """Return numbers as bytes, the largest in size clamped to what the dtype holds."""
        most = torch.finfo(self.dtype).max
        return (x.float() / self.scales[kind]).clamp(-most, most).to(self.dtype).view(torch.uint8)


@dataclass(frozen=True)
class Layout:
    """Where every element of a block is in memory.

    Args:
        offset_HSD: by kind, int64, elements from the start of the block.
        is_rows: by kind: every slot is a row of D elements at a multiple of D, which is copied several times faster.
        stride: by kind, elements from one dimension of every slot to its next; None where it is not the same.
    """

    offset_HSD: dict[Kind, Tensor]
    is_rows: dict[Kind, bool]
    stride: dict[Kind, int | None]

    @classmethod
    def probe(
        cls, kv_cache: Tensor, block: int, heads: int, head_dim: int, write: Write, codec: Codec | None = None,
        dtype: torch.dtype | None = None,
    ) -> Layout:  # fmt: skip
        """Find the layout by writing to a block that nobody uses yet; it is zero afterwards.

        `kv_cache` is [blocks, heads, slots, elements of a slot], in any order in memory; `write` is given numbers of
        `dtype`, the cache's unless it has a codec. Raises a LayoutError where what was written cannot be found again.
        """
        S, device, dtype = kv_cache.shape[2], kv_cache.device, dtype or kv_cache.dtype
        base = _BASE if codec is None else _DIGITS[codec.dtype]
        scales = {"keys": 1.0, "values": 1.0} if codec is None else codec.scales
        numbers = torch.arange(heads * S * head_dim, device=device)
        slots_S = torch.arange(S, device=device) + block * S
        offset_E = torch.zeros(1, dtype=torch.int64, device=device)
        for size, stride in zip(kv_cache.shape[1:], kv_cache.stride()[1:], strict=True):
            offset_E = (offset_E[:, None] + torch.arange(size, device=device) * stride).flatten()
        found: dict[Kind, Tensor] = {}
        kinds: tuple[Kind, Kind] = ("keys", "values")
        for kind in kinds:
            number_E, weight = torch.zeros_like(offset_E), 1
            while weight <= len(numbers):
                digits = (numbers // weight % base).to(dtype).view(heads, S, head_dim).transpose(0, 1).contiguous()
                given = {one: (digits if one == kind else torch.full_like(digits, -1.0)) * scales[one] for one in kinds}
                write(given["keys"], given["values"], kv_cache, slots_S)
                found_E = kv_cache[block].flatten()
                found_E = found_E.float() if codec is None else found_E.view(codec.dtype).float()
                number_E += found_E.round().long() * weight
                weight *= base
            mine = number_E >= 0  # elements of the other kind are negative throughout
            found[kind] = torch.full_like(numbers, -1)
            if int(mine.sum()) == len(numbers) and int(number_E.max()) < len(numbers):
                found[kind][number_E[mine]] = offset_E[mine]
            if bool((found[kind] < 0).any()):
                raise LayoutError(
                    "The attention backend's cache operation changes what it stores, so reasonkv cannot read keys "
                    "and values back; choose another --attention-backend or a cache without quantisation."
                )
        kv_cache[block].zero_()
        offset_HSD = {kind: offset.view(heads, S, head_dim) for kind, offset in found.items()}
        strides = {kind: _stride(offset) for kind, offset in offset_HSD.items()}
        is_rows = {
            kind: strides[kind] == 1
            and not kv_cache.stride(0) % head_dim
            and not bool((offset[:, :, 0] % head_dim).any())
            for kind, offset in offset_HSD.items()
        }
        return cls(offset_HSD, is_rows, strides)

    def read(self, kind: Kind, kv_cache: Tensor, blocks_BM: Tensor, slots_BHK: Tensor) -> Tensor:
        """Return keys or values of some slots, every head its own: [B, H, K, D]; slot s is in block s // S."""
        memory, lines = self._lines(kind, kv_cache, blocks_BM, slots_BHK)
        # a CPU copies rows fastest by index_select, and what is strided by an index
        found = memory.index_select(0, lines) if memory.is_contiguous() else memory[lines]
        return found.view(*slots_BHK.shape, -1)

    def write_front(self, kind: Kind, kv_cache: Tensor, blocks_BM: Tensor, x_BHKD: Tensor) -> None:
        """Write keys or values to the first K slots of every row."""
        slots_BHK = torch.arange(x_BHKD.shape[2], device=x_BHKD.device).expand(x_BHKD.shape[:3])
        memory, lines = self._lines(kind, kv_cache, blocks_BM, slots_BHK)
        memory.index_copy_(0, lines, x_BHKD.reshape(-1, *memory.shape[1:]))

    def _lines(self, kind: Kind, kv_cache: Tensor, blocks_BM: Tensor, slots_BHK: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cache's memory as vectors of D or as single elements, and which of them some slots are."""
        H, S, D = (offset_HSD := self.offset_HSD[kind]).shape
        last = sum((size - 1) * stride for size, stride in zip(kv_cache.shape, kv_cache.stride(), strict=True))
        block_BHK = blocks_BM.long().gather(1, (slots_BHK // S).flatten(1)).view(slots_BHK.shape) * kv_cache.stride(0)
        slot_BHK = torch.arange(H, device=slots_BHK.device)[:, None] * S + slots_BHK % S
        if self.is_rows[kind]:
            memory = kv_cache.as_strided(((last + 1) // D, D), (D, 1))
            first_BHK = offset_HSD[:, :, 0].flatten()[slot_BHK]
            return memory, ((block_BHK + first_BHK) // D).flatten()
        if (stride := self.stride[kind]) is not None:
            memory = kv_cache.as_strided((last + 1 - (D - 1) * stride, D), (1, stride))
            return memory, (block_BHK + offset_HSD[:, :, 0].flatten()[slot_BHK]).flatten()
        offsets_nD = offset_HSD.view(-1, D).index_select(0, slot_BHK.flatten())
        return kv_cache.as_strided((last + 1,), (1,)), offsets_nD.add_(block_BHK.reshape(-1, 1)).flatten()


def _stride(offset_HSD: Tensor) -> int | None:
    """Return the elements between two neighbouring dimensions of a slot, or None where they differ."""
    D = offset_HSD.shape[2]
    stride = int(offset_HSD[0, 0, 1] - offset_HSD[0, 0, 0]) if D > 1 else 1
    vector_HSD = offset_HSD[:, :, :1] + stride * torch.arange(D, device=offset_HSD.device)
    return stride if stride > 0 and torch.equal(offset_HSD, vector_HSD) else None
