"""Requests in a worker, and what one engine step does to them.

Lengths are integers on the host. They agree with the scheduler's because both sides compute `reasonkv.schedule`. Where
each token goes is computed on the device, from what vLLM sent there anyway: a step without a compaction copies nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from reasonkv import schedule
from reasonkv.batch_schedule import BatchSchedule
from reasonkv.budget import Budget
from reasonkv.methods import Method


@dataclass
class Asked:
    """How one request is compressed, in all tiers of layers."""

    method: Method  # the engine's, or with options of the request's own
    seed: int = 0  # its row seed


@dataclass(kw_only=True)
class RunningRequest:
    """One request of this worker, in one tier of layers."""

    lengths: BatchSchedule  # of all requests in the tier
    row: int  # of everything that is kept per request: lengths, query rings, positions, state
    asked: Asked
    compacted_slots: int = 0  # slots that the newest compaction left; later ones hold consecutive tokens
    compactions: int = 0  # carried out so far

    @property
    def method(self) -> Method:
        """The engine's, or with options of the request's own."""
        return self.asked.method

    @property
    def seed(self) -> int:
        """Its row seed."""
        return self.asked.seed

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
    batch_row: int  # of the request
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


@dataclass(frozen=True)
class StepNote:
    """What our scheduler tells every worker about a step. Both sides compute lengths; this shows that they agree.

    A step without a note is a warm-up, or comes from the stock scheduler.
    """

    slots: Mapping[int, Mapping[str, int]]  # by group of layers: of every request that the step feeds, after the step
    periodic: Sequence[str]  # requests that are compacted because of the step's number


class StepLayout:
    """One engine step on the host: the tokens of every request, and which requests have a compaction after it.

    Compactions are carried out when the next step begins (`Runtime.begin`), so it keeps the lengths before the step.

    Args:
        fed: tokens of every request that is scheduled, by request id.
        requests: the worker's requests, by id.
        order: request ids as they stand in the batch.
    """

    def __init__(self, fed: Mapping[str, int], requests: Mapping[str, RunningRequest], order: list[str]) -> None:
        self.order = order
        self.requests = [requests[name] for name in order]
        self.schedule = self.requests[0].lengths
        # per request, in the batch's order: tokens, row, and logical and physical length before the step
        self.fed = np.array([fed[name] for name in order], dtype=np.int64)
        self.rows = np.array([one.row for one in self.requests], dtype=np.int64)
        self.lengths, self.held = self.schedule.lengths(self.rows)
        self.tokens = int(self.fed.sum())
        self.due: list[DueCompaction] = []  # set by `end`

    @property
    def longest(self) -> int:
        """Most slots a request holds during the step's attention."""
        return int((self.held + self.fed).max())

    @property
    def slots_after(self) -> int:
        """Slots of all requests together after the step, its compactions included."""
        dropped = sum(one.held - one.after.physical for one in self.due)
        return int(self.held.sum()) + self.tokens - dropped

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


class StepPlaces:
    """The same step on the device: where every token goes. Padding behind requests and tokens is left out.

    Args:
        step: on the host.
        row_B: int64, the requests' rows in the slot stores.
        dropped_B: int64, how many slots of each were dropped so far.
        query_start_loc: vLLM's, [requests + 1 or more], where each request's tokens begin in the batch.
        seq_lens: vLLM's, [requests or more], logical lengths after the step.
        block_table: [requests or more, blocks], of the kernel's blocks.
    """

    def for_layers(self, block_table: Tensor) -> StepPlaces:
        """Return the same for layers that have blocks of their own."""
        other = copy(self)
        other.block_table = block_table
        return other

    def __init__(
        self, step: StepLayout, row_B: Tensor, dropped_B: Tensor, query_start_loc: Tensor, seq_lens: Tensor,
        block_table: Tensor,
    ) -> None:  # fmt: skip
        B, device = len(step.order), row_B.device
        self.step, self.row_B, self.block_table = step, row_B, block_table
        self.length_B, start_B = seq_lens[:B].long(), query_start_loc[: B + 1].long()
        self.start_B = start_B[:-1]
        token_n = torch.arange(step.tokens, device=device)
        # of requests that feed one token each, token and request are the same number
        self.index_n = token_n
        if step.tokens > B:
            self.index_n = torch.repeat_interleave(start_B.diff(), output_size=step.tokens)
        self.row_n = row_B[self.index_n]
        self.position_n = token_n + (self.length_B - start_B[1:])[self.index_n]
        self.slot_n = self.position_n - dropped_B[self.index_n]

    def physical_slots(self, block_size: int) -> Tensor:
        """Return where every token is written, int64 [tokens]: block number x block size + slot in the block."""
        block_n = self.block_table[self.index_n, self.slot_n // block_size].long()
        return block_n * block_size + self.slot_n % block_size

    def ring_lines(self, length: int, spare_row: int) -> Tensor:
        """Return where every token's query goes in the rings of `length` of all rows, seen as one: int64 [tokens].

        Of a chunk longer than the ring, older tokens go to a row that nobody reads.
        """
        row_n = self.row_n
        if self.step.fed.max() > length:
            is_newest_n = self.position_n >= self.length_B[self.index_n] - length
            row_n = torch.where(is_newest_n, row_n, spare_row)
        return row_n * length + self.position_n % length

    def query_groups(self) -> list[QueryGroup]:
        """Group requests by how many tokens they feed; all that decode are one group, whatever their lengths."""
        fed_B = self.step.fed
        sizes, counts = np.unique(fed_B, return_counts=True)
        chosen = torch.arange(len(fed_B), device=self.row_B.device)
        if len(sizes) > 1:
            chosen = to_device(np.argsort(fed_B, kind="stable"), self.row_B.device)
        found = []
        for fed, chosen_b in zip(sizes.tolist(), torch.split(chosen, counts.tolist()), strict=True):
            token_bn = self.start_B[chosen_b, None] + torch.arange(fed, device=chosen.device)
            valid_bn = torch.ones_like(token_bn, dtype=torch.bool)
            found.append(QueryGroup(token_bn, self.row_B[chosen_b], self.position_n[token_bn], valid_bn))
        return found


def to_device(numbers: NDArray[np.int64], device: torch.device) -> Tensor:
    """Copy numbers to the device without waiting for it."""
    found = torch.from_numpy(numbers)
    return found.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else found.to(device)


def padded(numbers_n: Tensor, size: int, value: int) -> Tensor:
    """Append a value up to `size`: what is beyond a step's requests and tokens is padding."""
    return functional.pad(numbers_n, (0, size - len(numbers_n)), value=value) if len(numbers_n) < size else numbers_n
