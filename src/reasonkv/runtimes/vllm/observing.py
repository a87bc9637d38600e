"""What a step's queries and tokens leave behind: rings of the newest queries, and what a method observes of all.

A method that allows it (`Requirements.observe_steps`) is given the queries of several decode steps at once. Until then
they wait in a ring of their own; before a request's compaction it is given what waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reasonkv.batch_schedule import BatchSchedule
from reasonkv.methods import Method, Observed
from reasonkv.rotary import Rotary
from reasonkv.runtimes.vllm.compactions import Layer
from reasonkv.runtimes.vllm.step import QueryGroup, StepPlaces, to_device
from reasonkv.slots import newest_queries

_TOKENS_AT_ONCE = 512  # of all requests together: methods make copies in float64


class Waiting(NamedTuple):
    """Newest tokens of some rows, those valid that the method was not given."""

    row_b: Tensor  # int64
    length_b: Tensor  # int64, tokens so far
    valid_bt: Tensor  # bool, of the newest `Requirements.observe_steps` tokens


class Observing:
    """Takes in the queries of an engine's steps, layer by layer.

    Args:
        method: the engine's.
        lengths: of all requests.
        rows: of the slot stores, without the spare one behind them.
        rotary: of the layers, if the method observes.
    """

    def __init__(self, method: Method, lengths: BatchSchedule, rows: int, rotary: Rotary | None) -> None:
        self.method, self.lengths, self.rows, self.rotary = method, lengths, rows, rotary
        self.steps = method.needs.observe_steps
        self.waiting = np.zeros(rows, dtype=np.int64)  # newest tokens of each row that the method was not given
        self._places: StepPlaces | None = None
        self._overflow: list[Waiting] | None = None  # all that waits, if the step needs its place
        self._lines: dict[int, Tensor] = {}  # by length of a ring, where the step's queries go
        self._now: list[QueryGroup] | None = None  # of the step, what is observed at once

    def begin(self, places: StepPlaces) -> None:
        """Begin a step."""
        self._places, self._lines, self._now, self._overflow = places, {}, None, None
        if self.waiting.any():
            fed = np.zeros_like(self.waiting)
            is_own = places.step.rows < self.rows
            fed[places.step.rows[is_own]] = places.step.fed[is_own]
            if ((self.waiting > 0) & (self.waiting + fed > self.steps)).any():
                self._overflow = self._waiting(np.flatnonzero(self.waiting), places.row_B.device)

    def take_in(self, layer: Layer, query: Tensor) -> None:
        """Remember a layer's rotated queries [tokens, Hq, D], padding behind them."""
        places, slots = self._places, layer.slots
        assert places is not None
        if slots.ring is not None:
            slots.remember_queries(query[: places.step.tokens], self._ring_lines(places, slots.ring.shape[1]))
        if not self.method.needs.observes:
            return
        if self._overflow is not None:
            self._give(layer, self._overflow)
        if slots.waiting is not None:
            lines = self._ring_lines(places, self.steps)
            slots.waiting.flatten(0, 1).index_copy_(0, lines, query[: places.step.tokens])
        if self._now is None:
            least = 0 if slots.waiting is None else self.steps
            self._now = [one for one in places.query_groups() if one.token_bn.shape[1] > least]
        for one in self._now:
            self._observe(layer, one.row_b, query[one.token_bn].transpose(1, 2), one.position_bn, one.valid_bn)

    def end(self) -> None:
        """Count what waits, once all layers have attended."""
        places, self._places = self._places, None
        if places is None or not self.method.needs.observes or self.steps == 1:
            return
        if self._overflow is not None:
            self.waiting[:] = 0
        waits = (places.step.rows < self.rows) & (places.step.fed <= self.steps)
        self.waiting[places.step.rows[waits]] += places.step.fed[waits]

    def before_compaction(self, layers: Sequence[Layer], rows: Sequence[int]) -> None:
        """Give the method what waits of some rows."""
        chosen = np.array([row for row in rows if self.waiting[row]], dtype=np.int64)
        if not len(chosen):
            return
        waiting = self._waiting(chosen, layers[0].slots.device)
        for layer in layers:
            self._give(layer, waiting)
        self.waiting[chosen] = 0

    def start(self, row: int) -> None:
        """Forget what waited of the request that had a row before."""
        if row < self.rows:
            self.waiting[row] = 0

    def _ring_lines(self, places: StepPlaces, length: int) -> Tensor:
        if length not in self._lines:
            self._lines[length] = places.ring_lines(length, self.rows)
        return self._lines[length]

    def _waiting(self, rows: NDArray[np.int64], device: torch.device) -> list[Waiting]:
        """Return what waits of some rows."""
        found = []
        for part in np.array_split(rows, -(-len(rows) * self.steps // _TOKENS_AT_ONCE)):
            numbers = np.stack([part, self.lengths.lengths(part)[0], self.waiting[part]])
            row_b, length_b, waiting_b = to_device(numbers, device)
            from_end_t = torch.arange(self.steps, 0, -1, device=device)
            found.append(Waiting(row_b, length_b, from_end_t <= waiting_b[:, None]))
        return found

    def _give(self, layer: Layer, waiting: list[Waiting]) -> None:
        assert layer.slots.waiting is not None
        for one in waiting:
            queries_bHqtD, position_bt = newest_queries(layer.slots.waiting, one.row_b, one.length_b, self.steps)
            self._observe(layer, one.row_b, queries_bHqtD, position_bt, one.valid_bt)

    def _observe(
        self, layer: Layer, row_b: Tensor, queries_bHqtD: Tensor, position_bt: Tensor, valid_bt: Tensor
    ) -> None:
        with torch.autocast(row_b.device.type, enabled=False):
            seen = Observed(queries_bHqtD, position_bt, valid_bt, layer.index, self.rotary)
            layer.slots.observe(self.method, row_b, seen)
