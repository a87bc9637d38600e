"""Requests in a worker, and what one engine step does to them: integers on the host, agreed with the scheduler's by
`reasonkv.schedule` and without a message.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from reasonkv import schedule
from reasonkv.budget import Budget


@dataclass
class Sequence:
    """One request of this worker.

    Args:
        place: row of everything that is kept per request (rings, token indices, state).
        state: logical length, physical length and prompt tokens.
        budget: None for a request that keeps full KV.
        seed: its row seed.
        settled: slots whose token index is stored (those an event left); later slots are consecutive.
        events: events so far.
        peak: most slots held at once so far.

    """

    place: int
    state: schedule.State
    budget: Budget | None
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

    Args:
        fed: tokens of every request that is scheduled, by request id.
        sequences: the requests, by id.

    """

    fed: dict[str, int]
    sequences: dict[str, Sequence]
    order: list[str] = field(default_factory=list)
    """Request ids as they stand in the batch, set when the batch is known."""
    block_table: Tensor | None = None
    """[requests, blocks], of the kernel's blocks, in the batch's order."""

    @cached_property
    def after(self) -> dict[str, tuple[schedule.State, int | None]]:
        """Every request's state after the step, its event included, and the slots that event keeps."""
        of = self.sequences
        return {name: schedule.step(of[name].budget, of[name].state, n) for name, n in self.fed.items()}

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
        return self.sequences[name].state.held + self.fed[name]

    def per_token(self, of: SequenceOf[int]) -> np.ndarray:
        """A number per request, in the batch's order, repeated for each of its tokens."""
        return np.repeat(np.asarray(of, dtype=np.int64), [self.fed[name] for name in self.order])

    @cached_property
    def rank(self) -> np.ndarray:
        """Number of every token within its request's piece."""
        fed = [self.fed[name] for name in self.order]
        return np.arange(self.tokens) - np.repeat(np.cumsum(fed) - fed, fed)

    def physical_slots(self, block_table: Tensor, block_size: int) -> Tensor:
        """Where every token is written, int64 [tokens]: block number x block size + slot in the block."""
        held = self.rank + self.per_token([self.sequences[name].state.held for name in self.order])
        row = self.per_token(range(len(self.order)))
        where = torch.from_numpy(np.stack([row, held // block_size, held % block_size])).to(block_table.device)
        return block_table[where[0], where[1]].long() * block_size + where[2]

    def ring_places(self, length: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
        """Where every token's query goes in rings of `length`: request's place, place in the ring, and which tokens.

        Of a piece longer than the ring only the newest tokens are written, and the third tells which; None: all.
        """
        before = [self.sequences[name].state.length for name in self.order]
        token = self.rank + self.per_token(before)
        place = self.per_token([self.sequences[name].place for name in self.order])
        newest = None
        if max(self.fed.values()) > length:
            ends = self.per_token([start + self.fed[name] for start, name in zip(before, self.order, strict=True)])
            chosen = np.nonzero(token >= ends - length)[0]
            token, place = token[chosen], place[chosen]
            newest = torch.from_numpy(chosen).to(device)
        pair = torch.from_numpy(np.stack([place, token % length])).to(device)
        return pair[0], pair[1], newest

    def groups(self, ring: int) -> list[list[int]]:
        """Batch rows with an event, gathered by slots held, slots kept and queries at hand: one plan each."""
        found: dict[tuple[int, int, int], list[int]] = {}
        for row, name in enumerate(self.order):
            state, keep = self.after[name]
            if keep is not None:
                found.setdefault((self.held(name), keep, min(ring, state.length)), []).append(row)
        return list(found.values())

    def commit(self) -> None:
        """Move the requests on, once every layer has attended and compacted."""
        for name, (state, keep) in self.after.items():
            sequence = self.sequences[name]
            held = state.held if keep is None else self.held(name)
            sequence.state, sequence.peak = state, max(sequence.peak, held)
            if keep is not None:
                sequence.events += 1
                sequence.settled = keep
