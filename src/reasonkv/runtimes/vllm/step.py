"""Requests in a worker, and what one engine step does to them: integers on the host, agreed with the scheduler's by
`reasonkv.schedule` and without a message.
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
class Sequence:
    """One request of this worker.

    Args:
        courses: all requests' lengths and budgets (None for one that keeps full KV).
        place: its row of everything that is kept per request (lengths, rings, token indices, state).
        method: chooses which of its slots stay: the engine's, or with options of the request's own.
        seed: its row seed.
        settled: slots whose token index is stored (those an event left); later slots are consecutive.
        events: events so far that were carried out.

    """

    courses: BatchSchedule
    place: int
    method: Method
    seed: int = 0
    settled: int = 0
    events: int = 0

    @property
    def state(self) -> schedule.Lengths:
        """Its lengths now."""
        return self.courses.state(self.place)

    @property
    def budget(self) -> Budget | None:
        """What it follows."""
        return self.courses.budgets[self.place]

    def __str__(self) -> str:
        return (
            f"{self.state.logical} tokens, {self.state.prompt} of them its prompt's; {self.events} events; "
            f"{self.state.physical} slots held, {self.courses.peak(self.place)} at most"
        )


class RequestEvent(NamedTuple):
    """One request's event after a step.

    Args:
        name: the request's id.
        sequence: the request.
        row: of the batch.
        before: its state before the step.
        held: slots it held during the step's attention.
        after: its state after the event, which keeps `after.physical` slots.
        budget: what it followed.

    """

    name: str
    sequence: Sequence
    row: int
    before: schedule.Lengths
    held: int
    after: schedule.Lengths
    budget: Budget


class Step:
    """One engine step: what every scheduled request feeds, and which of them have an event after it.

    It outlives itself: events are carried out when the next step begins (`Runtime.begin`), so it remembers what its
    requests were before it.

    Args:
        fed: tokens of every request that is scheduled, by request id.
        sequences: the worker's requests, by id.
        order: request ids as they stand in the batch.
        block_table: [requests, blocks], of the kernel's blocks, in the batch's order.

    """

    def __init__(
        self, fed: Mapping[str, int], sequences: Mapping[str, Sequence], order: list[str], block_table: Tensor
    ) -> None:
        self.order, self.block_table = order, block_table
        self.sequences = [sequences[name] for name in order]
        self.pieces = np.array([fed[name] for name in order], dtype=np.int64)
        """Tokens of every request, in the batch's order, as everything below."""
        self.places = np.array([one.place for one in self.sequences], dtype=np.int64)
        self.courses = self.sequences[0].courses
        self.lengths, self.held = self.courses.lengths(self.places)
        """Logical and physical length of every request before the step."""
        self.tokens = sum(fed.values())
        """Tokens of the step, without padding."""
        self.only_decodes = self.tokens == len(order)
        """Every request feeds one token, so that numbers of requests are numbers of tokens."""
        self.events: list[RequestEvent] = []
        """Set once the step is over."""

    @cached_property
    def longest(self) -> int:
        """Most slots a request holds during the step's attention."""
        return int((self.held + self.pieces).max())

    def per_token(self, numbers_B: Integers) -> Integers:
        """Every token's, from every request's."""
        return numbers_B if self.only_decodes else np.repeat(numbers_B, self.pieces)

    @cached_property
    def rank(self) -> Integers:
        """Number of every token within its request's piece."""
        if self.only_decodes:
            return np.zeros_like(self.pieces)
        return np.arange(self.tokens) - self.per_token(np.cumsum(self.pieces) - self.pieces)

    @cached_property
    def place(self) -> Integers:
        """Place of every token's request."""
        return self.per_token(self.places)

    @cached_property
    def position(self) -> Integers:
        """Token index of every token."""
        return self.per_token(self.lengths) + self.rank

    def physical_slots(self, block_size: int) -> Tensor:
        """Where every token is written, int64 [tokens]: block number x block size + slot in the block."""
        table = self.block_table[: len(self.order)]
        held_n = self.held if self.only_decodes else self.per_token(self.held) + self.rank
        slot_n = torch.from_numpy(held_n).to(table.device)
        block_n = slot_n // block_size
        if self.only_decodes:
            number_n = table.gather(1, block_n[:, None])[:, 0]
        else:
            row_n = torch.from_numpy(self.per_token(np.arange(len(self.order)))).to(table.device)
            number_n = table[row_n, block_n]
        return (number_n - block_n) * block_size + slot_n

    def ring_lines(self, length: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Where every token's query goes in the rings of `length` of all places, one after the other; and which tokens.

        Of a piece longer than the ring only the newest tokens are written, and the second tells which; None: all.
        """
        token, place, newest = self.position, self.place, None
        if self.pieces.max() > length:
            ends = self.per_token(self.lengths + self.pieces)
            chosen = np.nonzero(token >= ends - length)[0]
            token, place = token[chosen], place[chosen]
            newest = torch.from_numpy(chosen).to(device)
        return torch.from_numpy(place * length + token % length).to(device), newest

    def end(self) -> None:
        """Move the requests on, once every layer has attended; what an event leaves is settled when it is carried out.

        From here on lengths are those after the events, as the scheduler has them.
        """
        budgets = self.courses.budgets
        for event in self.courses.advance(self.places, self.pieces):
            name, sequence = self.order[event.row], self.sequences[event.row]
            budget = budgets[sequence.place]
            assert budget is not None  # without a bound there is no event
            self.events.append(RequestEvent(name, sequence, *event, budget))

    def groups(self, ring: int, running: Mapping[str, Sequence]) -> list[list[RequestEvent]]:
        """Its events, gathered by method, slots held, slots kept and queries at hand: one plan each.

        Args:
            ring: queries that are remembered.
            running: the worker's requests now; an event of one that has ended since changes nothing, and is left out.

        """
        found: dict[tuple[int, int, int, int], list[RequestEvent]] = {}
        for event in self.events:
            if running.get(event.name) is event.sequence:
                # the runtime makes one method for all requests with equal options
                alike = (id(event.sequence.method), event.held, event.after.physical, min(ring, event.after.logical))
                found.setdefault(alike, []).append(event)
        return list(found.values())
