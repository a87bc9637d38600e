"""One layer's slots: keys, values, token indices, counts, method state and recent queries, allocated once.

Row b's slots are 0..P_b-1 of its line; new tokens are written at P_b; everything behind is zero or stale and is masked
by whoever attends. Zeros matter: an uninitialised NaN would survive a mask.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from reasonkv.compaction import compact_pair, fold_counts, fold_state
from reasonkv.methods import SlotState
from reasonkv.plan import Plan
from reasonkv.ring import newest_queries
from reasonkv.runtimes.transformers.rows import Piece
from reasonkv.view import SlotView

GROWTH = 256  # slots; an unbounded cache grows by at least this much, and by half of what it holds


class LayerStorage:
    """Storage of one layer for a whole batch.

    Args:
        capacity: slots allocated once and for all, or None for a cache without bound, which grows.
        queries: length T of the ring of recent queries (0: none).
        counts: whether slots carry the number of source tokens they stand for.
        state: what else slots carry, by name.

    """

    def __init__(
        self,
        capacity: int | None,
        *,
        queries: int = 0,
        counts: bool = False,
        state: Mapping[str, SlotState] | None = None,
    ) -> None:
        self.capacity = capacity
        self.ring_length = queries
        self.stores_counts = counts
        self.declared = dict(state or {})
        self.keys: Tensor | None = None  # [B, H, A, D]; A = capacity, or more while staging
        self.values: Tensor | None = None
        self.home: tuple[Tensor, Tensor] | None = None  # the permanent pair, put aside while staging
        self.token_index: Tensor | None = None  # int32 [B, H, K]; meaningful for a row's settled slots
        self.counts: Tensor | None = None  # int32 [B, H, K]
        self.state: dict[str, Tensor] = {}  # [B, H, K] each; beyond a row's settled slots stands `initial`, or nothing
        self.ring: Tensor | None = None  # [B, T, Hq, D]; token t stands at t % T
        self.row_state: dict[str, Tensor] = {}  # what the method observes, [B, ...] each

    @property
    def allocated(self) -> int:
        """Slots per KV head that the live buffers can hold."""
        return 0 if self.keys is None else self.keys.shape[2]

    def append(self, keys_BHqD: Tensor, values_BHqD: Tensor, piece: Piece) -> tuple[Tensor, Tensor]:
        """Write one forward's tokens and return views of everything to attend to, [B, H, width, D]."""
        self._make_room(piece.width, keys_BHqD, values_BHqD)
        assert self.keys is not None and self.values is not None
        if piece.is_uniform:
            start, end = piece.rows[0].state.held, piece.width
            self.keys[:, :, start:end].copy_(keys_BHqD)
            self.values[:, :, start:end].copy_(values_BHqD)
        elif piece.is_one_token:
            line = piece.destinations(self.keys.shape[1], self.allocated, self.keys.device)
            for buffer, new in ((self.keys, keys_BHqD), (self.values, values_BHqD)):
                buffer.view(-1, buffer.shape[3]).index_copy_(0, line, new.reshape(-1, buffer.shape[3]))
        else:
            row, column, slot, _ = piece.scatter(self.keys.device)
            self.keys[row, :, slot] = keys_BHqD[row, :, column]
            self.values[row, :, slot] = values_BHqD[row, :, column]
        return self.keys[:, :, : piece.width], self.values[:, :, : piece.width]

    def remember_queries(self, queries_BHqqD: Tensor, piece: Piece) -> None:
        """Keep the newest T rotated queries of every row."""
        T = self.ring_length
        if T == 0:
            return
        B, Hq, _, D = queries_BHqqD.shape
        if self.ring is None:
            self.ring = queries_BHqqD.new_zeros(B, T, Hq, D)
        if piece.columns == 1 and piece.same_length:
            self.ring[:, piece.rows[0].state.length % T] = queries_BHqqD[:, :, 0]
            return
        if piece.is_one_token:
            line = piece.destinations(1, T, self.ring.device, ring=True)
            self.ring.view(-1, Hq * D).index_copy_(0, line, queries_BHqqD.reshape(-1, Hq * D))
            return
        row, column, _, token = piece.scatter(queries_BHqqD.device)
        if piece.columns > T:  # several tokens of this piece share a place in the ring: only the newest may write
            ends = torch.tensor([state.length for state in piece.after], device=token.device)
            newest = token >= (ends - T)[row]
            row, column, token = row[newest], column[newest], token[newest]
        self.ring[row, token % T] = queries_BHqqD[row, :, column]

    def recent_queries(self, rows: list[int], lengths: list[int]) -> tuple[Tensor, Tensor]:
        """The newest queries of rows that have equally many, oldest first.

        Args:
            rows: batch rows.
            lengths: tokens each of them has seen, this forward included.

        Returns:
            Queries [b, Hq, n, D] and their token indices [b, n], n = min(T, length).

        """
        assert self.ring is not None
        row_b, length_b = torch.tensor([rows, lengths], device=self.ring.device)
        return newest_queries(self.ring, row_b, length_b, min(self.ring_length, *lengths))

    def slots(self, rows: list[int], held: int) -> tuple[Tensor, Tensor]:
        """Keys and values [b, H, held, D] of some rows; views when the rows are the whole batch."""
        assert self.keys is not None and self.values is not None
        keys, values = self.keys[:, :, :held], self.values[:, :, :held]
        if rows == list(range(keys.shape[0])):
            return keys, values
        index = torch.tensor(rows, device=keys.device)
        return keys.index_select(0, index), values.index_select(0, index)

    def token_indices(self, rows: list[int], held: int, lengths: list[int], settled: list[int]) -> Tensor:
        """Token index of every slot of some rows, int64 [b, H, held].

        Slots that an event left carry theirs; later ones are consecutive up to the row's newest token, so decoding
        never writes an index.
        """
        assert self.keys is not None
        H, device = self.keys.shape[1], self.keys.device
        slot = torch.arange(held, device=device)
        consecutive = (torch.tensor(lengths, device=device)[:, None, None] - held) + slot
        consecutive = consecutive.expand(len(rows), H, held)
        if self.token_index is None:
            return consecutive
        return self._settled_or(self.token_index, consecutive, rows, held, settled)

    def source_counts(self, rows: list[int], held: int, settled: list[int]) -> Tensor:
        """Source tokens of every slot, int32 [b, H, held]."""
        assert self.keys is not None
        ones = torch.ones(1, dtype=torch.int32, device=self.keys.device).expand(len(rows), self.keys.shape[1], held)
        return ones if self.counts is None else self._settled_or(self.counts, ones, rows, held, settled)

    def slot_state(self, rows: list[int], index_BHN: Tensor, settled: list[int]) -> dict[str, Tensor]:
        """Method state of every slot of some rows by name, [b, H, N] each.

        Args:
            rows: batch rows.
            index_BHN: their slots' token indices.
            settled: slots of each row that an event left.

        """
        found = {}
        for name, declared in self.declared.items():
            dtype = self._dtype_of(declared)
            if declared.initial == "position":
                fresh = index_BHN.to(dtype)
            else:
                fresh = torch.full_like(index_BHN, declared.initial, dtype=dtype)
            stored = self.state.get(name)
            held = index_BHN.shape[2]
            found[name] = fresh if stored is None else self._settled_or(stored, fresh, rows, held, settled)
        return found

    def log_mass(self, width: int) -> Tensor | None:
        """What the logits of every slot are raised by, [B, H, width]; None before the first event."""
        stored = self.state.get("log_mass")
        if stored is None or stored.shape[2] >= width:
            return None if stored is None else stored[:, :, :width]
        return torch.nn.functional.pad(stored, (0, width - stored.shape[2]))  # new tokens, in staging

    def carry_out(self, plans: list[tuple[list[int], Plan, SlotView]], piece: Piece) -> None:
        """Rewrite the storage after one forward's events, and leave the staging buffer once everything fits.

        Args:
            plans: for every group of rows: the rows, their plan, and the view it was made from.
            piece: the forward.

        """
        if self.keys is None or self.values is None:
            return
        moved = [
            (rows, compact_pair(self.keys, self.values, rows, plan, view.positions_BHN), plan, view)
            for rows, plan, view in plans
        ]
        still_there = [row for row, keep in enumerate(piece.keep) if keep is None]
        self._leave_staging(still_there, piece)
        for rows, (keys, values), plan, view in moved:
            self._write(rows, keys, values)
            self._settle(rows, plan, view)

    def bytes_allocated(self) -> int:
        """Bytes of keys and values allocated now for the whole batch, a staging buffer included."""
        live = (self.keys, self.values, *(self.home or ()))
        return sum(t.numel() * t.element_size() for t in live if t is not None)

    def bytes_per_slot(self) -> int:
        """Bytes of one slot of all KV heads: key, value, token index, count and method state."""
        if self.keys is None or self.values is None:
            return 0
        H, element = self.keys.shape[1], self.keys.element_size()
        bounded = self.capacity is not None or self.token_index is not None
        state = 4 * (int(bounded) + int(self.stores_counts))
        state += sum(self._dtype_of(declared).itemsize for declared in self.declared.values())
        return H * ((self.keys.shape[3] + self.values.shape[3]) * element + state)

    def bytes_per_row(self) -> int:
        """Bytes of a row that do not depend on its slots: its part of the ring of queries, and what is observed."""
        kept = [*self.row_state.values(), *([] if self.ring is None else [self.ring])]
        return sum(tensor[0].numel() * tensor.element_size() for tensor in kept)

    def select_rows(self, index: Tensor) -> None:
        """Reorder, repeat or drop rows everywhere (beams)."""
        for name in ("keys", "values", "token_index", "counts", "ring"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, tensor.index_select(0, index.to(tensor.device)))
        for named in (self.state, self.row_state):
            named.update({name: tensor.index_select(0, index.to(tensor.device)) for name, tensor in named.items()})
        if self.home is not None:
            self.home = tuple(t.index_select(0, index.to(t.device)) for t in self.home)  # type: ignore[assignment]

    def reset(self) -> None:
        """Forget everything, the allocation included."""
        self.keys = self.values = self.home = self.token_index = self.counts = self.ring = None
        self.state, self.row_state = {}, {}

    # -- internals ----------------------------------------------------------------------------------------------

    def _make_room(self, width: int, keys: Tensor, values: Tensor) -> None:
        if width <= self.allocated:
            return
        if self.keys is None and self.capacity is not None and width <= self.capacity:
            self.keys, self.values = self._new(self.capacity, keys, values)
        elif self.capacity is None:
            self._grow(width + max(GROWTH, width // 2), keys, values)
        else:  # staging: attended and cut by this forward, or by a later one
            if self.keys is not None and self.values is not None and self.home is None:
                self.home = (self.keys, self.values)
            self._grow(width, keys, values)

    def _grow(self, slots: int, keys: Tensor, values: Tensor) -> None:
        old = (self.keys, self.values)
        self.keys, self.values = self._new(slots, keys, values)
        for new, previous in ((self.keys, old[0]), (self.values, old[1])):
            if previous is not None:
                new[:, :, : previous.shape[2]].copy_(previous)

    def _new(self, slots: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        B, H = keys.shape[:2]
        return keys.new_zeros(B, H, slots, keys.shape[3]), values.new_zeros(B, H, slots, values.shape[3])

    def _leave_staging(self, unmoved: list[int], piece: Piece) -> None:
        """Go back to the permanent buffers if every row fits; rows without an event are copied over."""
        assert self.keys is not None and self.values is not None
        if self.capacity is None or self.allocated <= self.capacity:
            return
        if max(state.held for state in piece.after) > self.capacity:
            return
        staged = (self.keys, self.values)
        self.keys, self.values = self.home if self.home is not None else self._new(self.capacity, *staged)
        self.home = None
        for row in unmoved:
            held = piece.held[row]
            for new, old in zip((self.keys, self.values), staged, strict=True):
                new[row, :, :held].copy_(old[row, :, :held])

    def _write(self, rows: list[int], keys: Tensor, values: Tensor) -> None:
        assert self.keys is not None and self.values is not None
        kept = keys.shape[2]
        if rows == list(range(self.keys.shape[0])):
            self.keys[:, :, :kept].copy_(keys)
            self.values[:, :, :kept].copy_(values)
            return
        index = torch.tensor(rows, device=keys.device)
        self.keys[:, :, :kept].index_copy_(0, index, keys)
        self.values[:, :, :kept].index_copy_(0, index, values)

    def _settle(self, rows: list[int], plan: Plan, view: SlotView) -> None:
        """Store what the slots an event left carry: token indices, counts and method state."""
        keep, index_BHN, counts_BHN = plan.kept_BHK.shape[-1], view.positions_BHN, view.counts_BHN
        row = torch.tensor(rows, device=index_BHN.device)
        self.token_index = self._sized(self.token_index, keep, torch.int32)
        self.token_index[:, :, :keep].index_copy_(0, row, index_BHN.gather(2, plan.kept_BHK).int())
        if self.stores_counts:
            new = fold_counts(counts_BHN, plan.fold, keep) if plan.fold else counts_BHN.gather(2, plan.kept_BHK)
            self.counts = self._sized(self.counts, keep, torch.int32)
            self.counts[:, :, :keep].index_copy_(0, row, new.int())
        for name, declared in self.declared.items():
            given = plan.new_state.get(name)
            new = fold_state(view.state[name], plan, declared.fold) if given is None else given
            stored = self.state[name] = self._sized(self.state.get(name), keep, self._dtype_of(declared))
            stored[row, :, keep:] = 0  # read as it stands by whoever attends (log mass); elsewhere masked by `settled`
            stored[:, :, :keep].index_copy_(0, row, new.to(stored.dtype))

    def _dtype_of(self, declared: SlotState) -> torch.dtype:
        """As declared; float32 becomes float64 beside float64 keys, so that nothing rounds there."""
        assert self.keys is not None
        wide = self.keys.dtype == torch.float64 and declared.dtype == torch.float32
        return torch.float64 if wide else declared.dtype

    def _sized(self, tensor: Tensor | None, keep: int, dtype: torch.dtype) -> Tensor:
        assert self.keys is not None
        if tensor is not None and tensor.shape[2] >= keep:
            return tensor
        slots = max(keep, self.capacity or 0)
        new = torch.zeros(*self.keys.shape[:2], slots, dtype=dtype, device=self.keys.device)
        if tensor is not None:
            new[:, :, : tensor.shape[2]] = tensor
        return new

    def _settled_or(
        self, stored_BHK: Tensor, fresh_BHN: Tensor, rows: list[int], held: int, settled: list[int]
    ) -> Tensor:
        device = stored_BHK.device
        upto = min(held, stored_BHK.shape[2])
        old = stored_BHK[:, :, :upto].index_select(0, torch.tensor(rows, device=device)).to(fresh_BHN.dtype)
        is_old = torch.arange(upto, device=device) < torch.tensor(settled, device=device)[:, None, None]
        out = fresh_BHN.clone(memory_format=torch.contiguous_format)
        out[:, :, :upto] = torch.where(is_old, old, out[:, :, :upto])
        return out
