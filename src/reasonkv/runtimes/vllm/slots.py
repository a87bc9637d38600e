"""What an engine stores of the slots in its blocks: block by block, as keys and values are."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from reasonkv.methods import Method
from reasonkv.slots import SlotStore


class PagedSlotStore(SlotStore):
    """A slot store whose numbers per slot stand in blocks, so that their memory is a fixed share of the cache's.

    Queries and what the method observes have a row per request, as elsewhere.
    """

    _block_table: Tensor | None = None
    waiting: Tensor | None = None
    """Queries that a method which observes several decode steps at once was not given yet: a ring as `ring`."""

    _owns_blocks = True

    @property
    def bytes(self) -> int:
        """Bytes of everything stored here."""
        of_rows = [self.ring, self.waiting, *self.row_state.values()]
        of_blocks = [self.token_index, self.counts, *self.state.values()] if self._owns_blocks else []
        return sum(one.nbytes for one in (*of_rows, *of_blocks) if one is not None)

    def prepare(self, method: Method, query_heads: int, head_dim: int, observed_dim: int | None = None) -> None:
        """Allocate what has a row per request, as `SlotStore.prepare`, and the ring of queries that wait."""
        super().prepare(method, query_heads, head_dim, observed_dim)
        if self.needs.observes and self.needs.observe_steps > 1:
            shape = (self.rows, self.needs.observe_steps, query_heads, head_dim)
            self.waiting = torch.zeros(shape, dtype=self.dtype, device=self.device)

    def slot_bytes(self) -> int:
        """Return the bytes of one slot of all heads, beside its keys and values."""
        return 4 * self.heads * (1 + self.needs.merges + len(self.needs.stored_state))

    def share(self, other: PagedSlotStore) -> None:
        """Write what compactions leave to the blocks of another store, whose layer's requests hold other blocks."""
        self.token_index, self.counts, self.state = other.token_index, other.counts, other.state
        self._owns_blocks = False

    def reserve(self, blocks: int, block_size: int) -> None:
        """Allocate what compactions write, for so many blocks."""
        shape = (blocks, self.heads, block_size)
        self.token_index = torch.zeros(shape, dtype=torch.int32, device=self.device)
        self.counts = torch.zeros_like(self.token_index) if self.needs.merges else None
        for name, declared in self.needs.stored_state.items():
            self.state[name] = torch.zeros(shape, dtype=self.dtype_of(declared), device=self.device)

    def use_blocks(self, blocks_BM: Tensor) -> None:
        """Read and write the slots of these blocks from now on, one row for every request of a compaction."""
        self._block_table = blocks_BM.long()

    def _write(self, stored: Tensor | None, row_b: Tensor, new_bHK: Tensor, dtype: torch.dtype) -> Tensor:
        assert stored is not None and self._block_table is not None
        B, H, K = new_bHK.shape
        M = -(-K // stored.shape[2])
        padded = functional.pad(new_bHK.to(dtype), (0, M * stored.shape[2] - K))
        stored[self._block_table[:, :M]] = padded.view(B, H, M, -1).transpose(1, 2)
        return stored

    def _stored_or(self, stored: Tensor | None, fresh_bHN: Tensor, row_b: Tensor, compacted_b: Tensor) -> Tensor:
        if stored is None:  # counts of a method that never merges
            return fresh_bHN
        assert self._block_table is not None
        B, H, N = fresh_bHN.shape
        old = stored[self._block_table].transpose(1, 2).reshape(B, H, -1)[:, :, :N].to(fresh_bHN.dtype)
        is_old = torch.arange(N, device=self.device) < compacted_b[:, None, None]
        return torch.where(is_old, old, fresh_bHN)
