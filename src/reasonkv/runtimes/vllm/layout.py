"""Where the platform's kernels put a key or value in a block, found out by asking them.

Attention kernels pack keys and values as they like: CPU kernels interleave them per instruction set, others split them
by head or by token. Instead of knowing every packing, the engine writes a numbered ramp through the platform's own
cache operation when it starts, and where the numbers end up is the layout. Reading and writing then move elements in
packed space, in one pass where the layout is linear; where it is not, writing goes through the platform's operation.

Legend: B rows, M blocks per row, H KV heads, S slots per block, D head_dim, E elements of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from reasonkv.errors import ReasonKVError

_BASE = 128  # digits that every floating-point type holds exactly

Kind = Literal["keys", "values"]
Write = Callable[[Tensor, Tensor, Tensor, Tensor], None]
"""`write(keys_nHD, values_nHD, kv_cache, slots_n)`: the platform's cache operation."""


class LayoutError(ReasonKVError, RuntimeError):
    """A cache operation that does more than move elements, so that nothing can be read back."""


@dataclass(frozen=True)
class Strides:
    """An index that is linear in head, slot and dimension, where slot s counts as (s // inner, s % inner)."""

    offset: int
    head: int
    outer: int
    inner_step: int
    dim: int
    inner: int

    def gather(self, cache_NE: Tensor, blocks_BM: Tensor, shape_HSD: tuple[int, int, int]) -> Tensor:
        """[B, H, M * S, D] of some of N blocks, in one pass."""
        H, S, D = shape_HSD
        if self._has_rows(cache_NE, D):
            slot_BHn = torch.arange(S, device=cache_NE.device).repeat(len(blocks_BM), H, blocks_BM.shape[1])
            return self.gather_slots(cache_NE, blocks_BM.repeat_interleave(S, 1)[:, None], slot_BHn, shape_HSD)
        head_H1 = torch.arange(H, device=cache_NE.device)[:, None]
        return self._view(cache_NE, shape_HSD)[blocks_BM[:, None], head_H1].reshape(len(blocks_BM), H, -1, D)

    def gather_slots(
        self, cache_NE: Tensor, block_BHK: Tensor, slot_BHK: Tensor, shape_HSD: tuple[int, int, int]
    ) -> Tensor:
        """[B, H, K, D]: slot `slot_BHK` of block `block_BHK`, every head its own, in one pass."""
        H, _, D = shape_HSD
        head_H1 = torch.arange(H, device=cache_NE.device)[:, None]
        if not self._has_rows(cache_NE, D):
            return self._view(cache_NE, shape_HSD)[block_BHK, head_H1, slot_BHK // self.inner, slot_BHK % self.inner]
        row_BHK = block_BHK * (cache_NE.shape[1] // D) + self.offset // D + head_H1 * (self.head // D)
        row_BHK = row_BHK + slot_BHK // self.inner * (self.outer // D) + slot_BHK % self.inner * (self.inner_step // D)
        return cache_NE.view(-1, D).index_select(0, row_BHK.flatten()).view(*slot_BHK.shape, D)

    def _has_rows(self, cache_NE: Tensor, D: int) -> bool:
        """Every slot is a row of D elements of the whole memory: on CPU rows are copied several times faster."""
        steps = (cache_NE.shape[1], self.offset, self.head, self.outer, self.inner_step)
        return self.dim == 1 and cache_NE.is_contiguous() and all(step % D == 0 for step in steps)

    def put_slots(self, cache_NE: Tensor, block_BK: Tensor, slot_K: Tensor, x_BHKD: Tensor, slots: int) -> None:
        """Write what `gather_slots` reads, in place; all heads of a row to the same slots."""
        _, H, _, D = x_BHKD.shape
        head_H1 = torch.arange(H, device=cache_NE.device)[:, None]
        where = (block_BK[:, None], head_H1, slot_K // self.inner, slot_K % self.inner)
        self._view(cache_NE, (H, slots, D))[where] = x_BHKD

    def _view(self, cache_NE: Tensor, shape_HSD: tuple[int, int, int]) -> Tensor:
        """[N, H, S // inner, inner, D] without a copy."""
        H, S, D = shape_HSD
        return cache_NE.as_strided(
            (len(cache_NE), H, S // self.inner, self.inner, D),
            (cache_NE.stride(0), self.head, self.outer, self.inner_step, self.dim),
            cache_NE.storage_offset() + self.offset,
        )


@dataclass(frozen=True)
class Layout:
    """Where every element of a block is, of both kinds.

    Args:
        index_HSD: int64, element of the block, counted as they lie in memory.
        strides: the same as strides, or None where it is not linear.
        write: the platform's cache operation.

    """

    index_HSD: dict[Kind, Tensor]
    strides: dict[Kind, Strides | None]
    write: Write

    @classmethod
    def probe(cls, kv_cache: Tensor, block: int, heads: int, head_dim: int, write: Write) -> Layout:
        """Find the layout by writing to a block that nobody uses yet; it is zero afterwards.

        Args:
            kv_cache: the layer's cache, blocks first, [blocks, heads, slots, elements of a slot].
            block: number of the block.
            heads: KV heads of this rank.
            head_dim: of keys and values.
            write: the platform's cache operation.

        Raises:
            LayoutError: what was written cannot be found again.

        """
        S, device = kv_cache.shape[2], kv_cache.device
        numbers = torch.arange(heads * S * head_dim, device=device)
        slots_S = torch.arange(S, device=device) + block * S
        elements = kv_cache[block].numel()
        found: dict[Kind, Tensor] = {}
        kinds: tuple[Kind, Kind] = ("keys", "values")
        for kind in kinds:
            number_E = torch.zeros(elements, dtype=torch.int64, device=device)
            weight = 1
            while weight <= len(numbers):
                digits = (numbers // weight % _BASE).to(kv_cache.dtype).view(heads, S, head_dim).transpose(0, 1)
                other = torch.full_like(digits, -1.0)
                pair = (digits, other) if kind == "keys" else (other, digits)
                write(pair[0].contiguous(), pair[1].contiguous(), kv_cache, slots_S)
                number_E += _by_memory(kv_cache)[block].reshape(-1).float().round().long() * weight
                weight *= _BASE
            # elements of the other kind are negative throughout
            mine = (number_E >= 0).nonzero()[:, 0]
            index = torch.full_like(numbers, -1)
            if len(mine) == len(numbers) and int(number_E[mine].max()) < len(numbers):
                index[number_E[mine]] = mine
            if bool((index < 0).any()):
                raise LayoutError(
                    "The attention backend's cache operation changes what it stores, so reasonkv cannot read keys "
                    "and values back; choose another --attention-backend or a cache without quantisation."
                )
            found[kind] = index.view(heads, S, head_dim)
        kv_cache[block].zero_()
        return cls(found, {kind: _strides(index_HSD) for kind, index_HSD in found.items()}, write)

    def read(self, kind: Kind, kv_cache: Tensor, blocks_BM: Tensor) -> Tensor:
        """Return keys or values of whole blocks, in the order of slots: [B, H, M * S, D], a contiguous copy."""
        index_HSD, strides = self.index_HSD[kind], self.strides[kind]
        cache, number_BM = _by_memory(kv_cache), blocks_BM.long()
        if not cache[0].is_contiguous():  # blocks with gaps in memory
            cache = cache[number_BM.flatten()]
            number_BM = torch.arange(len(cache), device=cache.device).view(blocks_BM.shape)
        cache_NE = cache.flatten(1)
        (B, M), (H, S, D) = blocks_BM.shape, index_HSD.shape
        if strides is not None:
            return strides.gather(cache_NE, number_BM, (H, S, D))
        found = cache_NE[number_BM].index_select(2, index_HSD.flatten()).view(B, M, H, S, D)
        return found.transpose(1, 2).reshape(B, H, M * S, D)

    def read_slots(self, kind: Kind, kv_cache: Tensor, blocks_BM: Tensor, slots_BHK: Tensor) -> Tensor:
        """Return keys or values of some slots, every head its own: [B, H, K, D].

        Args:
            kind: which.
            kv_cache: the layer's cache.
            blocks_BM: blocks of every row, in the order of slots.
            slots_BHK: int64; slot s is in block s // S of its row.

        """
        (H, S, D), strides = self.index_HSD[kind].shape, self.strides[kind]
        cache = _by_memory(kv_cache)
        if strides is None or not cache[0].is_contiguous():
            return self.read(kind, kv_cache, blocks_BM).take_along_dim(slots_BHK[..., None], 2)
        block_BHK = blocks_BM.long().gather(1, (slots_BHK // S).flatten(1)).view(slots_BHK.shape)
        return strides.gather_slots(cache.flatten(1), block_BHK, slots_BHK % S, (H, S, D))

    def write_front(self, kv_cache: Tensor, blocks_BM: Tensor, keys_BHKD: Tensor, values_BHKD: Tensor) -> None:
        """Write keys and values to the first K slots of every row."""
        cache, (B, H, K, D), S = _by_memory(kv_cache), keys_BHKD.shape, kv_cache.shape[2]
        slot_K = torch.arange(K, device=kv_cache.device)
        block_BK = blocks_BM.long()[:, slot_K // S]
        of_keys, of_values = self.strides["keys"], self.strides["values"]
        if of_keys is not None and of_values is not None and cache[0].is_contiguous():
            of_keys.put_slots(cache.flatten(1), block_BK, slot_K % S, keys_BHKD, S)
            of_values.put_slots(cache.flatten(1), block_BK, slot_K % S, values_BHKD, S)
            return
        keys_nHD, values_nHD = (x.transpose(1, 2).reshape(B * K, H, D) for x in (keys_BHKD, values_BHKD))
        self.write(keys_nHD, values_nHD, kv_cache, (block_BK * S + slot_K % S).flatten())


def _by_memory(kv_cache: Tensor) -> Tensor:
    """Return the cache with the dimensions of a block in the order they have in memory; a view."""
    within = kv_cache.stride()[1:]
    return kv_cache.permute(0, *sorted(range(1, kv_cache.dim()), key=lambda dim: -within[dim - 1]))


def _strides(index_HSD: Tensor) -> Strides | None:
    """Return the index as strides, or None where it is not linear."""
    H, S, D = index_HSD.shape
    first = index_HSD[0, 0, 0]

    def step(h: int, s: int, d: int) -> int:
        if h >= H or s >= S or d >= D:
            return 0
        return int(index_HSD[h, s, d] - first)

    head, dim = step(1, 0, 0), step(0, 0, 1)
    slot_S = index_HSD[0, :, 0] - first
    device = index_HSD.device
    for inner in (n for n in range(S, 0, -1) if S % n == 0):
        found = Strides(int(first), head, step(0, inner, 0), step(0, 1, 0) if inner > 1 else 0, dim, inner)
        s = torch.arange(S, device=device)
        if not torch.equal(slot_S, s // inner * found.outer + s % inner * found.inner_step):
            continue
        heads, dims = torch.arange(H, device=device) * head, torch.arange(D, device=device) * dim
        linear = first + heads[:, None, None] + slot_S[:, None] + dims
        return found if torch.equal(linear, index_HSD) else None
    return None
