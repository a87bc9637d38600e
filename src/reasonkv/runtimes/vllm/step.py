"""Requests in a worker, and what one engine step does to them.

All of it is integers on the host. They agree with the scheduler's because both sides compute `reasonkv.schedule`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from reasonkv import schedule
from reasonkv.budget import Budget
from reasonkv.methods import Method
from reasonkv.schedule import BatchSchedule, Integers


@dataclass(kw_only=True)
class RunningRequest:
    """One request of this worker.

    Args:
        lengths: lengths and budgets of all requests (budget None: full KV).
        row: its row of everything that is kept per request (lengths, query rings, positions, state).
        method: chooses the slots that stay: the engine's, or with options of the request's own.
        seed: its row seed.
        compacted_slots: slots that the newest compaction left; later ones hold consecutive tokens.
        compactions: carried out so far.

    """

    lengths: BatchSchedule
    row: int
    method: Method
    seed: int = 0
    compacted_slots: int = 0
    compactions: int = 0

    @property
    def state(self) -> schedule.State:
        """Current logical and physical length, and the prompt's."""
        return self.lengths.state(self.row)

    @property
    def budget(self) -> Budget | None:
        """Budget of this request; None for full KV."""
        return self.lengths.budgets[self.row]

    def __str__(self) -> str:
        return (
            f"{self.state.length} tokens, {self.state.prompt} of them its prompt's; {self.compactions} compactions; "
            f"{self.state.held} slots held, {self.lengths.peak(self.row)} at most"
        )


class DueCompaction(NamedTuple):
    """One request's compaction after a step.

    Args:
        name: the request's id.
        request: the request.
        index: of the request in the batch.
        before: lengths before the step.
        held: slots held during the step's attention.
        after: lengths after the compaction, which keeps `after.held` slots.
        budget: what the request followed.

    """

    name: str
    request: RunningRequest
    index: int
    before: schedule.State
    held: int
    after: schedule.State
    budget: Budget


@dataclass(frozen=True)
class QueryGroup:
    """Requests that feed equally many tokens in a step: one call of `Method.observe`, without padding.

    Args:
        token_bn: int64, index of their tokens in the step's batch.
        row_b: int64, the requests' rows.
        position_bn: int64, token indices.
        valid_bn: bool, True throughout.

    """

    token_bn: Tensor
    row_b: Tensor
    position_bn: Tensor
    valid_bn: Tensor


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
        self.fed = np.array([fed[name] for name in order], dtype=np.int64)
        """Tokens of every request, in the batch's order, as everything below."""
        self.rows = np.array([one.row for one in self.requests], dtype=np.int64)
        self.schedule = self.requests[0].lengths
        self.lengths, self.held = self.schedule.lengths(self.rows)
        """Logical and physical length of every request before the step."""
        self.tokens = sum(fed.values())
        """Tokens of the step, without padding."""
        self.only_decodes = self.tokens == len(order)
        """Every request feeds one token, so what is counted per request is counted per token."""
        self.due: list[DueCompaction] = []
        """Set by `end`."""

    @cached_property
    def longest(self) -> int:
        """Most slots a request holds during the step's attention."""
        return int((self.held + self.fed).max())

    def per_token(self, numbers_B: Integers) -> Integers:
        """Repeat every request's number for each of its tokens."""
        return numbers_B if self.only_decodes else np.repeat(numbers_B, self.fed)

    @cached_property
    def rank(self) -> Integers:
        """Number of every token within its request's chunk."""
        if self.only_decodes:
            return np.zeros_like(self.fed)
        return np.arange(self.tokens) - self.per_token(np.cumsum(self.fed) - self.fed)

    @cached_property
    def row(self) -> Integers:
        """Row of every token's request."""
        return self.per_token(self.rows)

    @cached_property
    def position(self) -> Integers:
        """Token index of every token."""
        return self.per_token(self.lengths) + self.rank

    def physical_slots(self, block_size: int) -> Tensor:
        """Return where every token is written, int64 [tokens]: block number x block size + slot in the block."""
        table = self.block_table[: len(self.order)]
        held_n = self.held if self.only_decodes else self.per_token(self.held) + self.rank
        slot_n = torch.from_numpy(held_n).to(table.device)
        block_n = slot_n // block_size
        if self.only_decodes:
            number_n = table.gather(1, block_n[:, None])[:, 0]
        else:
            index_n = torch.from_numpy(self.per_token(np.arange(len(self.order)))).to(table.device)
            number_n = table[index_n, block_n]
        return (number_n - block_n) * block_size + slot_n

    def ring_lines(self, length: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Return where every token's query goes in the rings of `length` of all rows, seen as one; and which tokens go.

        Of a chunk longer than the ring only the newest tokens are written. The second is None where all are.
        """
        token, row, newest = self.position, self.row, None
        if self.fed.max() > length:
            ends = self.per_token(self.lengths + self.fed)
            chosen = np.nonzero(token >= ends - length)[0]
            token, row = token[chosen], row[chosen]
            newest = torch.from_numpy(chosen).to(device)
        return torch.from_numpy(row * length + token % length).to(device), newest

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
        """Move the requests on, once every layer has attended.

        From here on lengths are those after the compactions, as the scheduler has them.
        """
        budgets = self.schedule.budgets
        for index, before, held, after in self.schedule.advance(self.rows, self.fed):
            request = self.requests[index]
            budget = budgets[request.row]
            assert budget is not None  # full KV has no compactions
            self.due.append(DueCompaction(self.order[index], request, index, before, held, after, budget))

    def compaction_groups(self, ring: int, running: Mapping[str, RunningRequest]) -> list[list[DueCompaction]]:
        """Group the step's compactions by method, slots held, slots kept and queries at hand: one plan each.

        Args:
            ring: queries that are remembered.
            running: the worker's requests now; the compaction of one that has ended since is left out.

        """
        found: dict[tuple[int, int, int, int], list[DueCompaction]] = {}
        for one in self.due:
            if running.get(one.name) is one.request:
                # the runtime makes one method for all requests with equal options
                alike = (id(one.request.method), one.held, one.after.held, min(ring, one.after.length))
                found.setdefault(alike, []).append(one)
        return list(found.values())
