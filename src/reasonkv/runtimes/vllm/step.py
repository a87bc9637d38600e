"""Requests in a worker, and what one engine step does to them: integers on the host, agreed with the scheduler's by
`reasonkv.schedule` and without a message.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reasonkv import schedule
from reasonkv.methods import Method

Integers = NDArray[np.int64]


@dataclass(kw_only=True)
class Sequence(schedule.Course):
    """One request of this worker: its budget (None for one that keeps full KV), its lengths, and more.

    Args:
        place: row of everything that is kept per request (rings, token indices, state).
        method: chooses which of its slots stay: the engine's, or with options of the request's own.
        seed: its row seed.
        settled: slots whose token index is stored (those an event left); later slots are consecutive.
        events: events so far.
        peak: most slots held at once so far.

    """

    place: int
    method: Method
    seed: int = 0
    settled: int = 0
    events: int = 0
    peak: int = 0

    def __str__(self) -> str:
        return (
            f"{self.state.length} tokens, {self.state.prompt} of them its prompt's; {self.events} events; "
            f"{self.state.held} slots held, {self.peak} at most"
        )


@dataclass
class Step:
    """One engine step: what every scheduled request feeds, and which of them have an event after it.

    It outlives itself: events are carried out when the next step begins (`Runtime.begin`), so it remembers what its
    requests were before it.

    Args:
        fed: tokens of every request that is scheduled, by request id.
        sequences: these requests, by id.

    """

    fed: dict[str, int]
    sequences: dict[str, Sequence]
    order: list[str] = field(default_factory=list)
    """Request ids as they stand in the batch, set when the batch is known."""
    block_table: Tensor | None = None
    """[requests, blocks], of the kernel's blocks, in the batch's order."""
    before: dict[str, schedule.State] = field(init=False)
    """Every request's state before the step."""

    def __post_init__(self) -> None:
        self.before = {name: self.sequences[name].state for name in self.fed}

    @cached_property
    def after(self) -> dict[str, tuple[schedule.State, int | None]]:
        """Every request's state after the step, its event included, and the slots that event keeps."""
        return {name: self.sequences[name].after(n) for name, n in self.fed.items()}

    @cached_property
    def has_events(self) -> bool:
        """At least one request has an event."""
        return any(keep is not None for _, keep in self.after.values())

    @cached_property
    def tokens(self) -> int:
        """Tokens of the step, without padding."""
        return sum(self.fed.values())

    def held(self, name: str) -> int:
        """Slots of a request during the step's attention: those held before, and the new ones."""
        return self.before[name].held + self.fed[name]

    @cached_property
    def lengths(self) -> Integers:
        """Logical and physical length of every request before the step, in the batch's order, int64 [2, requests]."""
        return np.array([self.before[name][:2] for name in self.order], dtype=np.int64).reshape(-1, 2).T

    @cached_property
    def pieces(self) -> Integers:
        """Tokens of every request, in the batch's order."""
        return np.array([self.fed[name] for name in self.order], dtype=np.int64)

    @cached_property
    def row(self) -> Integers:
        """Number of every token's request in the batch's order."""
        return np.repeat(np.arange(len(self.order)), self.pieces)

    @cached_property
    def rank(self) -> Integers:
        """Number of every token within its request's piece."""
        start: Integers = np.repeat(np.cumsum(self.pieces) - self.pieces, self.pieces)
        return np.arange(self.tokens) - start

    @cached_property
    def place(self) -> Integers:
        """Place of every token's request."""
        of_request = np.array([self.sequences[name].place for name in self.order], dtype=np.int64)
        return np.repeat(of_request, self.pieces)

    @cached_property
    def position(self) -> Integers:
        """Token index of every token."""
        start: Integers = np.repeat(self.lengths[0], self.pieces)
        return start + self.rank

    def physical_slots(self, block_table: Tensor, block_size: int) -> Tensor:
        """Where every token is written, int64 [tokens]: block number x block size + slot in the block."""
        held = np.repeat(self.lengths[1], self.pieces) + self.rank
        where = torch.from_numpy(np.stack([self.row, held // block_size, held % block_size])).to(block_table.device)
        return block_table[where[0], where[1]].long() * block_size + where[2]

    def ring_places(self, length: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
        """Where every token's query goes in rings of `length`: request's place, place in the ring, and which tokens.

        Of a piece longer than the ring only the newest tokens are written, and the third tells which; None: all.
        """
        token, place, newest = self.position, self.place, None
        if max(self.fed.values()) > length:
            ends = np.repeat(self.lengths[0] + self.pieces, self.pieces)
            chosen = np.nonzero(token >= ends - length)[0]
            token, place = token[chosen], place[chosen]
            newest = torch.from_numpy(chosen).to(device)
        pair = torch.from_numpy(np.stack([place, token % length])).to(device)
        return pair[0], pair[1], newest

    def groups(self, ring: int, running: Mapping[str, Sequence]) -> list[list[int]]:
        """Batch rows with an event, gathered by method, slots held, slots kept and queries at hand: one plan each.

        Args:
            ring: queries that are remembered.
            running: the worker's requests now; an event of one that has ended since changes nothing, and is left out.

        """
        found: dict[tuple[int, int, int, int], list[int]] = {}
        for row, name in enumerate(self.order):
            state, keep = self.after[name]
            sequence = self.sequences[name]
            if keep is not None and running.get(name) is sequence:
                # the runtime makes one method for all requests with equal options
                key = (id(sequence.method), self.held(name), keep, min(ring, state.length))
                found.setdefault(key, []).append(row)
        return list(found.values())

    def commit(self) -> None:
        """Move the requests on, once every layer has attended; what an event leaves is settled when it is carried out.

        From here on lengths are those after the events, as the scheduler has them.
        """
        for name, (state, keep) in self.after.items():
            sequence = self.sequences[name]
            held = state.held if keep is None else self.held(name)
            sequence.state, sequence.peak = state, max(sequence.peak, held)
