"""What one layer keeps beside keys and values: token indices, counts, method state and queries, per request.

Keys and values stay in vLLM's blocks. Everything here has one row per place (`Sequence.place`); of a request's slots,
those an event left (`settled`) have their numbers stored, later ones are consecutive and fresh.

Legend: b rows of one plan, R places, H KV heads, Hq query heads, N slots, K stored slots, T ring length, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from reasonkv.compaction import fold_counts, fold_state
from reasonkv.methods import Method, Observed, Requirements
from reasonkv.plan import Plan, PlanError
from reasonkv.ring import newest_queries
from reasonkv.view import SlotView


class LayerSlots:
    """One layer's bookkeeping.

    Args:
        places: requests that can run at once.
        heads, query_heads, head_dim: of this rank.
        dtype: of keys and queries.
        device: of keys and queries.
        needs: what the method asks for.
        new_row_state: fresh state of so many requests for a method that observes every query.

    """

    def __init__(
        self, places: int, heads: int, query_heads: int, head_dim: int,
        dtype: torch.dtype, device: torch.device, needs: Requirements,
        new_row_state: Callable[[int], dict[str, Tensor]] | None = None,
    ) -> None:  # fmt: skip
        self.places, self.heads, self.device, self.needs = places, heads, device, needs
        self.ring: Tensor | None = None  # [R, T, Hq, D]; token t stands at t % T
        if needs.queries:
            self.ring = torch.zeros(places, needs.queries, query_heads, head_dim, dtype=dtype, device=device)
        self.token_index: Tensor | None = None  # int32 [R, H, K]
        self.counts: Tensor | None = None  # int32 [R, H, K]
        self.state: dict[str, Tensor] = {}  # [R, H, K] each
        self.row_state = {} if new_row_state is None else new_row_state(places)  # [R, ...] each
        self._fresh = {} if new_row_state is None else new_row_state(1)

    @property
    def bytes(self) -> int:
        """Bytes of everything kept here."""
        kept = [self.ring, self.token_index, self.counts, *self.state.values(), *self.row_state.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in kept if tensor is not None)

    def start(self, place: int) -> None:
        """A new request takes a place; what is stored of its slots counts only once an event has settled it."""
        for name, stored in self.row_state.items():
            stored[place] = self._fresh[name][0]

    def observe(self, method: Method, place_b: Tensor, seen: Observed) -> None:
        """Let the method take in queries of some requests.

        Raises:
            PlanError: it changes the shape of a request's state, a defect of the method.

        """
        state = {name: stored[place_b] for name, stored in self.row_state.items()}
        method.observe(state, seen)
        for name, stored in self.row_state.items():
            if state[name].shape[1:] != stored.shape[1:]:
                raise PlanError(f"{method.name} must not change the shape of its row state {name!r} in this runtime.")
            stored[place_b] = state[name]

    def remember_queries(self, queries_nHqD: Tensor, lines: tuple[Tensor, Tensor | None]) -> None:
        """Keep the newest T rotated queries of every request (`Step.ring_lines`)."""
        assert self.ring is not None
        line, newest = lines
        if newest is not None:
            queries_nHqD = queries_nHqD.index_select(0, newest)
        self.ring.flatten(0, 1).index_copy_(0, line, queries_nHqD)

    def recent_queries(self, place_b: Tensor, length_b: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The newest `count` queries, oldest first [b, Hq, count, D], and their token indices [b, count]."""
        assert self.ring is not None
        return newest_queries(self.ring, place_b, length_b, count)

    def token_indices(self, place_b: Tensor, held: int, length_b: Tensor, settled_b: Tensor) -> Tensor:
        """Token index of every slot, int64 [b, H, held]."""
        consecutive = (length_b[:, None, None] - held) + torch.arange(held, device=self.device)
        return self._stored_or(self.token_index, consecutive.expand(-1, self.heads, -1), place_b, settled_b)

    def source_counts(self, place_b: Tensor, held: int, settled_b: Tensor) -> Tensor:
        """Source tokens of every slot, int32 [b, H, held]."""
        ones = torch.ones(1, dtype=torch.int32, device=self.device).expand(len(place_b), self.heads, held)
        return self._stored_or(self.counts, ones, place_b, settled_b)

    def slot_state(self, place_b: Tensor, index_BHN: Tensor, settled_b: Tensor) -> dict[str, Tensor]:
        """Method state of every slot by name, [b, H, N] each."""
        found = {}
        for name, declared in self.needs.stored_state.items():
            if declared.initial == "position":
                fresh = index_BHN.to(declared.dtype)
            else:
                fresh = torch.full_like(index_BHN, declared.initial, dtype=declared.dtype)
            found[name] = self._stored_or(self.state.get(name), fresh, place_b, settled_b)
        return found

    def settle(self, place_b: Tensor, plan: Plan, view: SlotView) -> None:
        """Store what the slots an event left carry."""
        kept = plan.kept_BHK
        self.token_index = self._store(self.token_index, place_b, view.positions_BHN.gather(2, kept).int())
        if self.needs.folds:
            counts = view.counts_BHN
            counts = fold_counts(counts, plan.fold, kept.shape[2]) if plan.fold else counts.gather(2, kept)
            self.counts = self._store(self.counts, place_b, counts.int())
        for name, declared in self.needs.stored_state.items():
            given = plan.new_state.get(name)
            new = fold_state(view.state[name], plan, declared.fold) if given is None else given
            self.state[name] = self._store(self.state.get(name), place_b, new.to(declared.dtype))

    def _store(self, stored: Tensor | None, place_b: Tensor, new_bHK: Tensor) -> Tensor:
        K = new_bHK.shape[2]
        if stored is None or stored.shape[2] < K:
            # under a budget K is the same at every event, so this happens once; a window's K grows with the text
            grown = new_bHK.new_zeros(
                self.places, self.heads, K if stored is None else max(K, 3 * stored.shape[2] // 2)
            )
            if stored is not None:
                grown[:, :, : stored.shape[2]] = stored
            stored = grown
        stored[place_b, :, :K] = new_bHK
        return stored

    def _stored_or(self, stored: Tensor | None, fresh_bHN: Tensor, place_b: Tensor, settled_b: Tensor) -> Tensor:
        out = fresh_bHN.clone(memory_format=torch.contiguous_format)
        if stored is not None:
            upto = min(out.shape[2], stored.shape[2])
            is_old = torch.arange(upto, device=self.device) < settled_b[:, None, None]
            out[:, :, :upto] = torch.where(is_old, stored[place_b, :, :upto].to(out.dtype), out[:, :, :upto])
        return out
