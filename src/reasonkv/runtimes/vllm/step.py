"""Requests in a worker, and what one engine step does to them.

All of it is integers on the host. They agree with the scheduler's because both sides compute `reasonkv.schedule`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from reasonkv import schedule
from reasonkv.budget import Budget
from reasonkv.methods import Method
from reasonkv.schedule import BatchSchedule


@dataclass(kw_only=True)
class RunningRequest:
    """One request of this worker."""

    lengths: BatchSchedule  # of all requests
    row: int  # of everything that is kept per request: lengths, query rings, positions, state
    method: Method  # the engine's, or with options of the request's own
    seed: int = 0  # its row seed
    compacted_slots: int = 0  # slots that the newest compaction left; later ones hold consecutive tokens
    compactions: int = 0  # carried out so far

    @property
    def state(self) -> schedule.Lengths:
        """Current logical and physical length, and the prompt's."""
        return self.lengths.state(self.row)

    @property
    def budget(self) -> Budget | None:
        """Budget of this request; None for full KV."""
        return self.lengths.budgets[self.row]

    def __str__(self) -> str:
        return (
            f"{self.state.logical} tokens, {self.state.prompt} of them its prompt's; {self.compactions} compactions; "
            f"{self.state.physical} slots held, {self.lengths.peak(self.row)} at most"
        )


class DueCompaction(NamedTuple):
    """One request's compaction after a step."""

    name: str  # the request's id
    request: RunningRequest
    index: int  # type: ignore[assignment]  # of the request in the batch; hides tuple.index
    before: schedule.Lengths  # lengths before the step
    held: int  # slots during the step's attention
    after: schedule.Lengths  # lengths after the compaction, which keeps `after.physical` slots
    budget: Budget


@dataclass(frozen=True)
class QueryGroup:
    """Requests that feed equally many tokens in a step: one call of `Method.observe`, without padding."""

    token_bn: Tensor  # int64, index of their tokens in the step's batch
    row_b: Tensor  # int64, the requests' rows
    position_bn: Tensor  # int64, token indices
    valid_bn: Tensor  # bool, True throughout


class StepLayout:
    """One engine step: the tokens of every request, where they go, and which requests have a compaction after it.

    Compactions are carried out when the next step begins (`Runtime.begin`), so it keeps the lengths before the step.

    Args:
        fed: tokens of every request that is scheduled, by request id.
        requests: the worker's requests, by id.
        order: request ids as they stand in the batch.
        block_table: [requests, blocks], of the kernel's blocks, in the batch's order.

    """

    def __init__(
        self, fed: Mapping[str, int], requests: Mapping[str, RunningRequest], order: list[str], block_table: Tensor
    ) -> None:
        self.order, self.block_table = order, block_table
        self.requests = [requests[name] for name in order]
        self.schedule = self.requests[0].lengths
        # per request, in the batch's order: tokens, row, and logical and physical length before the step
        self.fed = np.array([fed[name] for name in order], dtype=np.int64)
        self.rows = np.array([one.row for one in self.requests], dtype=np.int64)
        self.lengths, self.held = self.schedule.lengths(self.rows)
        # per token, without padding: index of its request in the batch, that request's row, token index and slot
        self.index = np.repeat(np.arange(len(order)), self.fed)
        self.tokens = len(self.index)
        rank = np.arange(self.tokens) - (np.cumsum(self.fed) - self.fed)[self.index]
        self.row, self.position, self.slot = (
            self.rows[self.index],
            self.lengths[self.index] + rank,
            self.held[self.index] + rank,
        )
        self.due: list[DueCompaction] = []  # set by `end`

    @property
    def longest(self) -> int:
        """Most slots a request holds during the step's attention."""
        return int((self.held + self.fed).max())

    def physical_slots(self, block_size: int) -> Tensor:
        """Return where every token is written, int64 [tokens]: block number x block size + slot in the block."""
        block, slot = np.divmod(self.slot, block_size)
        index_n, block_n, slot_n = torch.from_numpy(np.stack([self.index, block, slot])).to(self.block_table.device)
        physical_n: Tensor = self.block_table[index_n, block_n] * block_size + slot_n
        return physical_n

    def ring_lines(self, length: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Return where every token's query goes in the rings of `length` of all rows, seen as one; and which tokens go.

        Of a chunk longer than the ring only the newest tokens are written. The second is None where all are.
        """
        lines = self.row * length + self.position % length
        if self.fed.max() <= length:
            return torch.from_numpy(lines).to(device), None
        newest = np.flatnonzero(self.position >= (self.lengths + self.fed)[self.index] - length)
        return torch.from_numpy(lines[newest]).to(device), torch.from_numpy(newest).to(device)

    def query_groups(self, device: torch.device) -> list[QueryGroup]:
        """Group requests by how many tokens they feed; all that decode are one group, whatever their lengths."""
        starts = np.cumsum(self.fed) - self.fed
        found = []
        for fed in np.unique(self.fed):
            chosen = np.flatnonzero(self.fed == fed)
            numbers = np.stack([starts[chosen], self.rows[chosen], self.lengths[chosen]])
            start_b, row_b, length_b = torch.from_numpy(numbers).to(device)
            rank_n = torch.arange(int(fed), device=device)
            token_bn = start_b[:, None] + rank_n
            valid_bn = torch.ones_like(token_bn, dtype=torch.bool)
            found.append(QueryGroup(token_bn, row_b, length_b[:, None] + rank_n, valid_bn))
        return found

    def end(self) -> None:
        """Move the requests on, once all layers have attended: to lengths after compactions, as the scheduler has."""
        budgets = self.schedule.budgets
        for index, before, held, after in self.schedule.advance(self.rows, self.fed):
            request = self.requests[index]
            budget = budgets[request.row]
            assert budget is not None  # full KV has no compactions
            self.due.append(DueCompaction(self.order[index], request, index, before, held, after, budget))

    def compaction_groups(self, ring: int, running: Mapping[str, RunningRequest]) -> list[list[DueCompaction]]:
        """Group the compactions by method, slots held, slots kept and queries at hand, at most `ring`: one plan each.

        The compaction of a request that is not `running` any more is left out.
        """
        found: dict[tuple[int, int, int, int], list[DueCompaction]] = {}
        for one in self.due:
            if running.get(one.name) is one.request:
                # the runtime makes one method for all requests with equal options
                alike = (id(one.request.method), one.held, one.after.physical, min(ring, one.after.logical))
                found.setdefault(alike, []).append(one)
        return list(found.values())
