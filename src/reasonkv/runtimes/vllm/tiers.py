"""Layers that follow one budget, in one worker: how long their requests are, and what a step does to them.

All layers of an engine are one tier, unless `layer_shares` divide the budget among them. A tier has lengths and
compactions of its own. Rows of the slot stores, queries and tokens are the same for all tiers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from vllm.v1.attention.backend import CommonAttentionMetadata

from reasonkv import schedule
from reasonkv.batch_schedule import BatchSchedule
from reasonkv.budget import Budget, ExplicitEventsWindow
from reasonkv.runtimes.vllm.compactions import Layer
from reasonkv.runtimes.vllm.step import Asked, RunningRequest, StepLayout, StepPlaces, padded, to_device


@dataclass
class Tier:
    """One of an engine's tiers in one worker."""

    budget: Budget  # of every request, in these layers
    layers: list[Layer]
    lengths: BatchSchedule = field(default_factory=lambda: BatchSchedule(0))  # by row
    requests: dict[str, RunningRequest] = field(default_factory=dict)  # by id
    step: StepLayout | None = None  # the one under way, once its batch is known
    pending: StepLayout | None = None  # the one before, if it has compactions that are not carried out yet
    places: dict[int, StepPlaces] = field(default_factory=dict)  # of the newest step, by group of layers
    _sent: tuple[NDArray[np.int64], Tensor] | None = None  # rows and dropped slots, on host and device

    def start(self, name: str, row: int, lengths: schedule.Lengths, asked: Asked, budget: Budget | None) -> None:
        """Start a request in a row; a budget of None keeps its full KV."""
        self.lengths.start(row, budget, lengths)
        self.requests[name] = RunningRequest(lengths=self.lengths, row=row, asked=asked)

    def describe(self, name: str, *, is_only: bool) -> str:
        """Return what a request holds, in words for the log; unless the tier `is_only`, in which layers."""
        layers = "" if is_only else f"layers {', '.join(str(one.index) for one in self.layers)}: "
        return f"{layers}{self.requests[name]}"

    def compact_after(self, name: str, fed: int) -> None:
        """Note that a request is compacted at the end of the step because of the step's number."""
        one, window = self.requests[name], self.requests[name].budget
        assert isinstance(window, ExplicitEventsWindow)
        self.lengths.set_budget(one.row, schedule.listed(window, one.state.logical + fed))

    def begin_step(
        self, fed: Mapping[str, int], order: list[str], common: CommonAttentionMetadata, group: int, rows: int
    ) -> StepPlaces:
        """Find out what the step does to every request.

        Args:
            fed: tokens of every request of the step, by id.
            order: their ids as they stand in the batch.
            common: vLLM's metadata of the step for `group`.
            group: one of this tier's groups of layers.
            rows: of the slot stores; requests beyond them keep full KV.
        """
        step = self.step = StepLayout(fed, self.requests, order)
        numbers = np.stack([np.minimum(step.rows, rows), step.lengths - step.held])
        if self._sent is None or not np.array_equal(self._sent[0], numbers):
            self._sent = numbers, to_device(numbers, common.seq_lens.device)
        row_B, dropped_B = self._sent[1]
        places = StepPlaces(step, row_B, dropped_B, common.query_start_loc, common.seq_lens, common.block_table_tensor)
        self.places = {group: places}
        return places

    def metadata(self, common: CommonAttentionMetadata, block_size: int, group: int) -> CommonAttentionMetadata:
        """Return a step's metadata for a group of layers, with physical lengths and slots."""
        assert self._sent is not None
        places = self.places[group] = next(iter(self.places.values())).for_layers(common.block_table_tensor)
        numbers, (_, dropped_B) = self._sent
        lengths_B, upper_B = common.seq_lens, common.seq_lens_cpu_upper_bound
        if upper_B is not None:
            upper_B = upper_B - padded(torch.from_numpy(numbers[1]), common.num_reqs, 0).to(upper_B.dtype)
        return common.replace(
            seq_lens=lengths_B - padded(dropped_B, common.num_reqs, 0).to(lengths_B.dtype),
            seq_lens_cpu_upper_bound=upper_B,
            max_seq_len=places.step.longest,
            slot_mapping=padded(places.physical_slots(block_size), len(common.slot_mapping), -1),
        )

    def end_step(self) -> StepLayout | None:
        """Move the requests on, once all layers have attended; return the step, None if there was none."""
        step, self.step = self.step, None
        if step is not None:
            step.end()
            self.pending = step if step.due else None
        return step

    def take_pending(self) -> StepLayout | None:
        """Return the last step if it left compactions, the only time."""
        step, self.pending = self.pending, None
        return step
