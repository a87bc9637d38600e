"""Keys and values of one compressed layer, beside what `SlotStore` keeps of its slots.

Row b's slots are 0..P_b-1 of its line; new tokens are written at P_b. What lies behind is zero or stale and is masked
by attention. Zeros matter: an uninitialised NaN would survive a mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reasonkv.compaction import compact_pair
from reasonkv.methods import Method, Observed, Requirements
from reasonkv.plan import Plan
from reasonkv.runtimes.transformers.forward import ForwardPlan
from reasonkv.slots import CompactionGroup, SlotStore
from reasonkv.view import SlotView

GROWTH = 256
"""Slots that are allocated at least; a cache doubles until its capacity, one without bound grows by half."""


class LayerStorage(SlotStore):
    """Storage of one layer for a whole batch; keys and values are allocated by the first forward.

    Args:
        keys, values: of that forward, [B, H, q, D]; they say how wide slots are.
        needs: what the method asks for.
        capacity: slots that are allocated from the first compaction on, or None for a cache without bound.
    """

    def __init__(self, keys: Tensor, values: Tensor, needs: Requirements, capacity: int | None) -> None:
        super().__init__(keys.shape[0], keys.shape[1], keys.dtype, keys.device, needs, capacity or 0)
        self.is_bounded = capacity is not None
        self.keys, self.values = self._new(0, keys, values)  # [B, H, A, D]; A > capacity while staging
        self.home: tuple[Tensor, Tensor] | None = None  # the permanent pair, put aside while staging
        self._waiting: list[Observed] = []  # decode steps that the method has not been given yet
        self._waiting_bytes = 0  # of a row, where as many wait as may; what waits now depends on the rest of the batch

    @property
    def allocated(self) -> int:
        """Slots per KV head that the live buffers can hold."""
        return self.keys.shape[2]

    def append(self, keys_BHqD: Tensor, values_BHqD: Tensor, plan: ForwardPlan) -> tuple[Tensor, Tensor]:
        """Write one forward's tokens and return views of everything to attend to, [B, H, width, D]."""
        self._make_room(plan.width)
        self.write(self.keys, keys_BHqD, plan)
        self.write(self.values, values_BHqD, plan)
        return self.keys[:, :, : plan.width], self.values[:, :, : plan.width]

    def write(self, buffer_BHAD: Tensor, new_BHqD: Tensor, plan: ForwardPlan) -> None:
        """Write one forward's tokens into a buffer of this layer, or into some of its dimensions."""
        if plan.is_uniform:
            buffer_BHAD[:, :, plan.rows[0].state.physical : plan.width].copy_(new_BHqD)
        elif plan.is_one_token and buffer_BHAD.is_contiguous():
            line = plan.destinations(self.heads, self.allocated, self.device)
            buffer_BHAD.view(-1, buffer_BHAD.shape[3]).index_copy_(0, line, new_BHqD.reshape(-1, buffer_BHAD.shape[3]))
        else:
            row, column, slot, _ = plan.scatter(self.device)
            buffer_BHAD[row, :, slot] = new_BHqD[row, :, column]

    def widen_values(self, more: int) -> None:
        """Add dimensions behind those of the values, zero for all slots: for what else a model caches of a token."""
        self.values = torch.nn.functional.pad(self.values, (0, more))

    def remember(self, queries_BHqqD: Tensor, plan: ForwardPlan) -> None:
        """Keep the newest rotated queries of every row in the ring."""
        if self.ring is None:
            return
        row, column, line = plan.ring_lines(self.ring.shape[1], self.device)
        one = plan.is_one_token  # an ordinary decode step: all rows in order
        self.remember_queries(queries_BHqqD[:, :, 0] if one else queries_BHqqD[row, :, column], line)

    def take_in(self, method: Method, seen: Observed, plan: ForwardPlan) -> None:
        """Let the method observe a forward now, or several decode steps together, at the latest before a compaction."""
        if not plan.is_one_token:
            self._observe_waiting(method)
            self.observe(method, None, seen)
            return
        self._waiting.append(seen)
        if self.needs.observe_steps > 1:
            self._waiting_bytes = self.needs.observe_steps * seen.queries_BHqqD[0].nbytes
        if len(self._waiting) == self.needs.observe_steps or any(keep is not None for keep in plan.keep):
            self._observe_waiting(method)

    def slots(self, rows: list[int], held: int) -> tuple[Tensor, Tensor]:
        """Return keys and values [b, H, held, D] of some rows; views when the rows are the whole batch."""
        keys, values = self.keys[:, :, :held], self.values[:, :, :held]
        if rows == list(range(self.rows)):
            return keys, values
        index = torch.tensor(rows, device=self.device)
        return keys.index_select(0, index), values.index_select(0, index)

    def to_capacity(self) -> bool:
        """Allocate the whole capacity, so that decode steps do not; return whether the storage now has that size."""
        if self.is_bounded and self.allocated < self.capacity:
            self._move_to(self.capacity)
        return self.is_bounded and self.allocated == self.capacity

    def log_mass(self, width: int) -> Tensor | None:
        """Return what the logits of every slot are raised by, [B, H, width]; None before the first compaction."""
        stored = self.state.get("log_mass")
        if stored is None or stored.shape[2] >= width:
            return None if stored is None else stored[:, :, :width]
        return torch.nn.functional.pad(stored, (0, width - stored.shape[2]))  # new tokens, in staging

    def compact(self, plans: list[tuple[CompactionGroup, Plan, SlotView]], forward: ForwardPlan) -> None:
        """Rewrite the storage after one forward, and leave the staging buffer once everything fits."""
        moved = [
            (group, compact_pair(self.keys, self.values, list(group.rows), plan, view.positions_BHN), plan, view)
            for group, plan, view in plans
        ]
        self._settle(forward)
        for group, pair, plan, view in moved:
            row_b, keep = group.numbers(self.device)[0], group.keep
            for buffer, new in zip((self.keys, self.values), pair, strict=True):
                buffer[:, :, :keep].index_copy_(0, row_b, new)
            self.write_compacted(row_b, plan, view)

    def pack(self, forward: ForwardPlan) -> None:
        """Store what the layer holds after a forward; here it is stored as it is."""

    def bytes_allocated(self) -> int:
        """Bytes of keys and values allocated now for the whole batch, a staging buffer included."""
        return sum(tensor.nbytes for tensor in (self.keys, self.values, *(self.home or ())))

    def bytes_of(self, slots: int) -> int:
        """Bytes of so many slots of a row, all KV heads: key, value, token index, count and method state."""
        state = 4 * (int(self.is_bounded or self.token_index is not None) + int(self.needs.merges))
        state += sum(self.dtype_of(declared).itemsize for declared in self.needs.stored_state.values())
        return slots * (self.bytes_per_token() + self.heads * state)

    def bytes_per_token(self) -> int:
        """Bytes of a token's keys and values in the model's dtype."""
        return self.heads * (self.keys.shape[3] + self.values.shape[3]) * self.keys.element_size()

    def bytes_per_stored_token(self) -> float:
        """Bytes of a token's keys and values as they are stored here."""
        return self.bytes_per_token()

    def bytes_per_row(self) -> int:
        """Bytes of a row that do not depend on its slots: its part of the ring of queries, and what is observed."""
        kept = [*self.row_state.values(), *([] if self.ring is None else [self.ring])]
        return sum(tensor[0].nbytes for tensor in kept) + self._waiting_bytes

    def select_rows(self, index: Tensor) -> None:
        """Reorder, repeat or drop rows everywhere (beams)."""
        super().select_rows(index)
        at = index.to(self.device)
        self._waiting = [one.of_rows(at) for one in self._waiting]
        self.keys, self.values = self.keys.index_select(0, at), self.values.index_select(0, at)
        if self.home is not None:
            self.home = (self.home[0].index_select(0, at), self.home[1].index_select(0, at))

    def _observe_waiting(self, method: Method) -> None:
        if self._waiting:
            self.observe(method, None, Observed.joined(self._waiting))
            self._waiting = []

    def _make_room(self, width: int) -> None:
        if width <= self.allocated:
            return
        if not self.is_bounded:
            slots = width + max(GROWTH, width // 2)
        elif width <= self.capacity:
            slots = min(self.capacity, max(GROWTH, 2 * width))
        else:  # staging: attended and compacted by this forward, or by a later one
            slots = width
            if self.allocated == self.capacity:
                self.home = (self.keys, self.values)
        self._move_to(slots)

    def _move_to(self, slots: int) -> None:
        old = (self.keys, self.values)
        self.keys, self.values = self._new(slots, *old)
        for new, previous in zip((self.keys, self.values), old, strict=True):
            new[:, :, : previous.shape[2]].copy_(previous)

    def _new(self, slots: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        shape = (self.rows, self.heads, slots)
        return keys.new_zeros(*shape, keys.shape[3]), values.new_zeros(*shape, values.shape[3])

    def _settle(self, forward: ForwardPlan) -> None:
        """Go to buffers of the full capacity once every row fits; rows that were not compacted are copied over."""
        longest = max(state.physical for state in forward.after)
        if not self.is_bounded or self.allocated == self.capacity or longest > self.capacity:
            return
        old = (self.keys, self.values)
        self.keys, self.values = self.home or self._new(self.capacity, *old)
        self.home = None
        for row, keep in enumerate(forward.keep):
            if keep is None:
                held = forward.held[row]
                for new, previous in zip((self.keys, self.values), old, strict=True):
                    new[row, :, :held].copy_(previous[row, :, :held])
