"""Host-side bookkeeping: what every row of a batch holds, and what one forward does to it. Integers and masks only."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from reasonkv import schedule
from reasonkv.budget import Budget, Window


@dataclass
class Row:
    """One row of the batch: exactly what it would be alone.

    Args:
        state: logical length, physical length and prompt tokens.
        budget: the row's; all rows share one, unless their events were listed one by one.
        seed: the row's seed.
        settled: slots whose token index is stored explicitly (those an event left); later slots are consecutive.
        prompt_spans: half-open ranges of token indices that count as prompt.
        events: events so far.
        dropped, folded: source tokens dropped and slots folded away, per KV head, averaged over layers and heads.
        attended: slots held by the tokens fed after the prompt, summed over them; all but padding are attended.
        decoded: tokens fed after the prompt.
        peak: most slots held at once.
        guards: events at which a method fell back on a rule of its own, by name.
        padding: slots held that nothing attends to (log mass -inf), per KV head, averaged over heads and layers.
        padding_left: what the forward under way leaves of them, summed over the layers that had their event.
        padding_passed: such slots, summed over the tokens fed after the prompt.

    """

    state: schedule.State
    budget: Budget | None = None
    seed: int = 0
    settled: int = 0
    prompt_spans: list[tuple[int, int]] = field(default_factory=list)
    events: int = 0
    dropped: int = 0
    folded: float = 0.0
    attended: int = 0
    decoded: int = 0
    peak: int = 0
    guards: dict[str, set[int]] = field(default_factory=dict)
    padding: float = 0.0
    padding_left: float = 0.0
    padding_passed: float = 0.0

    def capacity(self, max_length: int | None) -> int:
        """Slots allocated for the row when it runs alone.

        Args:
            max_length: most tokens it will see. None: not known; of a `Window`, the slots needed so far then come back.
        """
        if max_length is None:
            max_length = 0 if isinstance(self.budget, Window) else 1 << 62
        return schedule.capacity(self.budget, self.state.prompt, max(max_length, self.state.length))

    def reopen(self, tokens: int) -> None:
        """Count the next tokens as prompt, too (a later turn)."""
        start, end = self.state.length, self.state.length + tokens
        self.prompt_spans.append((start, end))
        self.state = self.state._replace(prompt=self.state.prompt + tokens)

    def copy(self) -> Row:
        """An independent row (beams, repeated rows)."""
        guards = {name: set(events) for name, events in self.guards.items()}
        return replace(self, prompt_spans=list(self.prompt_spans), guards=guards)


@dataclass
class Piece:
    """One forward: the tokens of every row, where they are written, what they may see, and which rows have an event.

    Args:
        rows: the rows before the forward.
        columns: width q of the forward.
        fed: valid tokens per row (padding is not fed).
        valid_Bq: bool, True at tokens; None when nothing is padding.
        after: every row's state after the forward, its event included.
        keep: slots a row's event keeps, or None.
        layers: compressed layers it is fed to.

    """

    rows: list[Row]
    columns: int
    fed: list[int]
    valid_Bq: Tensor | None
    after: list[schedule.State]
    keep: list[int | None]
    layers: int = 1
    _per_device: dict[object, Tensor | tuple[Tensor, ...]] = field(default_factory=dict)

    @classmethod
    def plan(
        cls,
        rows: list[Row],
        columns: int,
        valid_Bq: Tensor | None = None,
        fed: list[int] | None = None,
        layers: int = 1,
    ) -> Piece:
        """Work out one forward of `columns` columns, of which each row feeds `fed` (all, unless some are padding)."""
        fed = [columns] * len(rows) if fed is None else fed
        if all(count == columns for count in fed):
            valid_Bq = None
        steps = [schedule.step(row.budget, row.state, count) for row, count in zip(rows, fed, strict=True)]
        return cls(rows, columns, fed, valid_Bq, [state for state, _ in steps], [keep for _, keep in steps], layers)

    @cached_property
    def held(self) -> list[int]:
        """Slots per row during attention: those held before plus the new ones."""
        return [row.state.held + count for row, count in zip(self.rows, self.fed, strict=True)]

    @cached_property
    def width(self) -> int:
        """Slots the longest row attends to."""
        return max(self.held)

    @cached_property
    def is_uniform(self) -> bool:
        """All rows hold equally many slots and nothing is padding: plain slices, no mask for one token."""
        return self.valid_Bq is None and len({row.state.held for row in self.rows}) == 1

    @cached_property
    def same_length(self) -> bool:
        """All rows have seen equally many tokens and nothing is padding."""
        return self.valid_Bq is None and len({row.state.length for row in self.rows}) == 1

    def scatter(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Where every new token goes: its row, its column in the forward, its slot, its token index (int64 [n])."""
        if ("scatter", device) not in self._per_device:
            held = torch.tensor([row.state.held for row in self.rows], device=device)
            length = torch.tensor([row.state.length for row in self.rows], device=device)
            valid = self._valid(device)
            row, column = valid.nonzero(as_tuple=True)
            rank = (valid.cumsum(-1) - 1)[row, column]
            self._per_device["scatter", device] = (row, column, held[row] + rank, length[row] + rank)
        found = self._per_device["scatter", device]
        assert isinstance(found, tuple)
        return found[0], found[1], found[2], found[3]

    @property
    def is_one_token(self) -> bool:
        """Every row feeds exactly one token: an ordinary decode step."""
        return self.columns == 1 and self.valid_Bq is None

    def destinations(self, heads: int, places: int, device: torch.device, *, ring: bool = False) -> Tensor:
        """Where the one new token of every row goes in a contiguous [B, heads, places, D], seen as lines of D.

        Worked out once per decode step and shared by all layers.

        Args:
            heads: heads of the buffer.
            places: slots (or ring places) per head.
            device: of the buffer.
            ring: by token index modulo `places` instead of by slot.

        Returns:
            int64 [B * heads].
        """
        key = ("destinations", heads, places, ring, device)
        if key not in self._per_device:
            states = [row.state for row in self.rows]
            place = [state.length % places for state in states] if ring else [state.held for state in states]
            line = torch.arange(len(states) * heads, device=device).view(-1, heads) * places
            self._per_device[key] = (line + torch.tensor(place, device=device)[:, None]).flatten()
        found = self._per_device[key]
        assert isinstance(found, Tensor)
        return found

    def visible_Bq(self, device: torch.device) -> Tensor:
        """How many of its row's slots every query may see; a padding query sees one, so that its softmax is finite."""
        if ("visible", device) not in self._per_device:
            held = torch.tensor([row.state.held for row in self.rows], device=device)[:, None]
            seen = held + 1 if self.is_one_token else held + self._valid(device).cumsum(-1)
            self._per_device["visible", device] = seen.clamp(min=1)
        found = self._per_device["visible", device]
        assert isinstance(found, Tensor)
        return found

    def token_indices(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Token index of every column, int64 [B, q], and which columns hold a token rather than padding."""
        if ("indices", device) not in self._per_device:
            length = torch.tensor([row.state.length for row in self.rows], device=device)[:, None]
            valid = self._valid(device)
            self._per_device["indices", device] = ((length + valid.cumsum(-1) - 1).clamp(min=0), valid)
        found = self._per_device["indices", device]
        assert isinstance(found, tuple)
        return found[0], found[1]

    @cached_property
    def is_prompt(self) -> bool:
        """Every token of the forward belongs to its row's prompt."""
        spans = [(row, row.state.length, row.state.length + fed) for row, fed in zip(self.rows, self.fed, strict=True)]
        return all(
            start == end or any(first <= start and end <= last for first, last in row.prompt_spans)
            for row, start, end in spans
        )

    def in_prompt_Bq(self, device: torch.device) -> Tensor:
        """Which columns hold a token of their row's prompt, bool [B, q]; of padding, whatever stands there."""
        if ("prompt", device) not in self._per_device:
            index_Bq, _ = self.token_indices(device)
            marked = torch.zeros_like(index_Bq, dtype=torch.bool)
            for number, row in enumerate(self.rows):
                for start, end in row.prompt_spans:
                    marked[number] |= (index_Bq[number] >= start) & (index_Bq[number] < end)
            self._per_device["prompt", device] = marked
        found = self._per_device["prompt", device]
        assert isinstance(found, Tensor)
        return found

    def additive_mask(self, device: torch.device, dtype: torch.dtype, repeats: int = 1) -> Tensor:
        """0 where a query may attend and -inf elsewhere: [B, 1, repeats * q, width], query index fastest.

        Built once per forward and shared by all layers.
        """
        key = ("mask", device, dtype, repeats)
        if key not in self._per_device:
            slots = torch.arange(self.width, device=device)
            hidden = slots >= self.visible_Bq(device).repeat(1, repeats)[:, None, :, None]
            mask = torch.zeros(hidden.shape, dtype=dtype, device=device)
            self._per_device[key] = mask.masked_fill_(hidden, float("-inf"))
        found = self._per_device[key]
        assert isinstance(found, Tensor)
        return found

    def groups(self, queries: int) -> list[list[int]]:
        """Rows with an event, gathered by slots held, slots kept and queries at hand: one plan each."""
        found: dict[tuple[int, int, int], list[int]] = {}
        for index, keep in enumerate(self.keep):
            if keep is not None:
                key = (self.held[index], keep, min(queries, self.after[index].length))
                found.setdefault(key, []).append(index)
        return list(found.values())

    def commit(self) -> None:
        """Move the rows on, once every layer has attended and compacted."""
        for index, row in enumerate(self.rows):
            fed, keep, before = self.fed[index], self.keep[index], row.state
            first = max(before.prompt - before.length, 0)  # rank of the first token after the prompt
            if fed > first:
                row.decoded += fed - first
                row.attended += sum(range(before.held + first + 1, before.held + fed + 1))
                row.padding_passed += row.padding * (fed - first)
            row.peak = max(row.peak, self.held[index])
            if keep is not None:
                row.dropped += self.held[index] - keep
                row.events += 1
                row.settled = keep
                row.padding, row.padding_left = row.padding_left / self.layers, 0.0
            row.state = self.after[index]

    def _valid(self, device: torch.device) -> Tensor:
        if self.valid_Bq is None:
            return torch.ones(len(self.rows), self.columns, dtype=torch.bool, device=device)
        return self.valid_Bq.to(device)
