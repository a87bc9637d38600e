"""What one forward does to the sequences of a batch: integers and masks, shared by the layers of a group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from reasonkv import schedule
from reasonkv.budget import Budget
from reasonkv.resolve import UnsupportedModelError
from reasonkv.slots import CompactionGroup

T = TypeVar("T")
P = ParamSpec("P")


def _once(make: Callable[Concatenate[ForwardPlan, P], T]) -> Callable[Concatenate[ForwardPlan, P], T]:
    """Make a forward's tensor when it is first asked for; all layers share it."""

    @wraps(make)
    def remembered(forward: ForwardPlan, /, *args: P.args, **kwargs: P.kwargs) -> T:
        key = (make, args, *kwargs.items())
        if key not in forward.made:
            forward.made[key] = make(forward, *args, **kwargs)
        found: T = forward.made[key]
        return found

    return remembered


@dataclass
class SequenceState:
    """One sequence of the batch: exactly what it would be alone.

    Args:
        state: its lengths.
        budget: the sequence's own; all share one, unless their events were listed one by one.
        seed: its row seed.
        compacted_slots: slots that a compaction left; their token indices are stored, later slots are consecutive.
        prompt_spans: half-open ranges of token indices that count as prompt.
        events: compactions so far.
        dropped, folded: tokens evicted and slots merged away, per KV head, averaged over layers and heads.
        attended: slots held by the tokens fed after the prompt, summed over them; all but padding are attended.
        decoded: tokens fed after the prompt.
        peak: most slots held at once.
        fallbacks: compactions at which a method used a fallback rule, by the rule's name.
        padding: slots held that nothing attends to (log mass -inf), per KV head, averaged over heads and layers.
        padding_left: what the forward under way leaves of them, summed over the layers that were compacted.
        padding_passed: such slots, summed over the tokens fed after the prompt.
    """

    state: schedule.Lengths
    budget: Budget | None = None
    seed: int = 0
    compacted_slots: int = 0
    prompt_spans: list[tuple[int, int]] = field(default_factory=list)
    events: int = 0
    dropped: int = 0
    folded: float = 0.0
    attended: int = 0
    decoded: int = 0
    peak: int = 0
    fallbacks: dict[str, set[int]] = field(default_factory=dict)
    padding: float = 0.0
    padding_left: float = 0.0
    padding_passed: float = 0.0

    def capacity(self, max_length: int | None) -> int:
        """Return the slots allocated for the sequence when it runs alone.

        Args:
            max_length: most tokens it will see; None: not known. A budget that grows with the text then needs what it
                needed so far.
        """
        if max_length is None:
            max_length = 1 << 62 if self.budget is None or self.budget.is_bounded else 0
        return schedule.capacity(self.budget, self.state.prompt, max(max_length, self.state.logical))

    def reopen(self, tokens: int) -> None:
        """Count the next tokens as prompt, too (a later turn)."""
        start, end = self.state.logical, self.state.logical + tokens
        self.prompt_spans.append((start, end))
        self.state = self.state._replace(prompt=self.state.prompt + tokens)

    def copy(self) -> SequenceState:
        """Return an independent copy (beams, repeated rows)."""
        fallbacks = {name: set(events) for name, events in self.fallbacks.items()}
        return replace(self, prompt_spans=list(self.prompt_spans), fallbacks=fallbacks)


@dataclass
class ForwardPlan:
    """One forward: where every token is written, what it may see, and which sequences are compacted after it.

    Args:
        rows: the sequences before the forward.
        columns: width q of the forward.
        fed: valid tokens per row (padding is not fed).
        valid_Bq: bool, True at tokens; None when nothing is padding.
        after: every row's lengths after the forward, its compaction included.
        keep: slots a row's compaction keeps, or None.
        layers: compressed layers it is fed to.
        made: tensors of the forward that its layers share.
    """

    rows: list[SequenceState]
    columns: int
    fed: list[int]
    valid_Bq: Tensor | None
    after: list[schedule.Lengths]
    keep: list[int | None]
    layers: int = 1
    made: dict[object, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        rows: list[SequenceState],
        columns: int,
        valid_Bq: Tensor | None = None,
        fed: list[int] | None = None,
        layers: int = 1,
    ) -> ForwardPlan:
        """Plan a forward of `columns` columns, of which each row feeds `fed` (all, unless some are padding)."""
        fed = [columns] * len(rows) if fed is None else fed
        if all(count == columns for count in fed):
            valid_Bq = None
        steps = [schedule.step(row.budget, row.state, count) for row, count in zip(rows, fed, strict=True)]
        return cls(rows, columns, fed, valid_Bq, [state for state, _ in steps], [keep for _, keep in steps], layers)

    @cached_property
    def held(self) -> list[int]:
        """Slots per row during attention: those held before plus the new ones."""
        return [row.state.physical + count for row, count in zip(self.rows, self.fed, strict=True)]

    @cached_property
    def width(self) -> int:
        """Slots the longest row attends to."""
        return max(self.held)

    @cached_property
    def is_uniform(self) -> bool:
        """All rows hold equally many slots and nothing is padding: plain slices, no mask for one token."""
        return self.valid_Bq is None and len({row.state.physical for row in self.rows}) == 1

    @property
    def is_one_token(self) -> bool:
        """Every row feeds exactly one token: an ordinary decode step."""
        return self.columns == 1 and self.valid_Bq is None

    @cached_property
    def is_prompt(self) -> bool:
        """Every token of the forward belongs to its row's prompt."""
        spans = [(row, row.state.logical, row.state.logical + n) for row, n in zip(self.rows, self.fed, strict=True)]
        return all(
            start == end or any(first <= start and end <= last for first, last in row.prompt_spans)
            for row, start, end in spans
        )

    @_once
    def scatter(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return where every new token goes: its row, its column, its slot, its token index (int64 [n])."""
        held_B, length_B = self._lengths(device)
        valid = self._valid(device)
        row, column = valid.nonzero(as_tuple=True)
        rank = (valid.cumsum(-1) - 1)[row, column]
        return row, column, held_B[row] + rank, length_B[row] + rank

    @_once
    def destinations(self, heads: int, slots: int, device: torch.device) -> Tensor:
        """Return the line of every row's one new token in a contiguous [B, heads, slots, D], int64 [B * heads]."""
        line = torch.arange(len(self.rows) * heads, device=device).view(-1, heads) * slots
        return (line + self._lengths(device)[0][:, None]).flatten()

    @_once
    def ring_lines(self, length: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Return row, column and ring line of every token whose query is kept (int64 [n])."""
        if self.is_one_token:
            row = torch.arange(len(self.rows), device=device)
            return row, row, row * length + self._lengths(device)[1] % length
        row, column, _, token = self.scatter(device)
        if self.columns > length:  # several tokens share a place in the ring: only the newest may write
            ends = torch.tensor([state.logical for state in self.after], device=device)
            newest = token >= (ends - length)[row]
            row, column, token = row[newest], column[newest], token[newest]
        return row, column, row * length + token % length

    @_once
    def visible_Bq(self, device: torch.device) -> Tensor:
        """Return how many of its row's slots every query may see; padding sees one, so that its softmax is finite."""
        held = self._lengths(device)[0][:, None]
        seen = held + 1 if self.is_one_token else held + self._valid(device).cumsum(-1)
        return seen.clamp(min=1)

    @_once
    def token_indices(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the token index of every column, int64 [B, q], and which columns hold a token, not padding."""
        valid = self._valid(device)
        return (self._lengths(device)[1][:, None] + valid.cumsum(-1) - 1).clamp(min=0), valid

    @_once
    def in_prompt_Bq(self, device: torch.device) -> Tensor:
        """Return which columns hold a token of their row's prompt, bool [B, q]; anything at padding."""
        index_Bq, _ = self.token_indices(device)
        marked = torch.zeros_like(index_Bq, dtype=torch.bool)
        for number, row in enumerate(self.rows):
            for start, end in row.prompt_spans:
                marked[number] |= (index_Bq[number] >= start) & (index_Bq[number] < end)
        return marked

    @_once
    def additive_mask(self, device: torch.device, dtype: torch.dtype, repeats: int = 1) -> Tensor:
        """Return 0 where a query may attend and -inf elsewhere: [B, 1, repeats * q, width], query index fastest."""
        slots = torch.arange(self.width, device=device)
        hidden = slots >= self.visible_Bq(device).repeat(1, repeats)[:, None, :, None]
        return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))

    def groups(self, queries: int) -> list[CompactionGroup]:
        """Return the rows that are compacted, by slots held, slots kept and queries at hand: one plan each."""
        found: dict[tuple[int, int, int], list[int]] = {}
        for row, keep in enumerate(self.keep):
            if keep is not None:
                key = (self.held[row], keep, min(queries, self.after[row].logical))
                found.setdefault(key, []).append(row)
        return [self._group(rows, held, keep) for (held, keep, _), rows in found.items()]

    def commit(self) -> None:
        """Move the sequences on, once every layer has attended and compacted."""
        for index, row in enumerate(self.rows):
            fed, keep, before = self.fed[index], self.keep[index], row.state
            first = max(before.prompt - before.logical, 0)  # rank of the first token after the prompt
            if fed > first:
                row.decoded += fed - first
                row.attended += sum(range(before.physical + first + 1, before.physical + fed + 1))
                row.padding_passed += row.padding * (fed - first)
            row.peak = max(row.peak, self.held[index])
            if keep is not None:
                row.dropped += self.held[index] - keep
                row.events += 1
                row.compacted_slots = keep
                row.padding, row.padding_left = row.padding_left / self.layers, 0.0
            row.state = self.after[index]

    def _group(self, rows: list[int], held: int, keep: int) -> CompactionGroup:
        own = [self.rows[row] for row in rows]
        return CompactionGroup(
            rows=rows,
            batch_rows=rows,
            held=held,
            keep=keep,
            budgets=[one.budget for one in own if one.budget is not None],  # without a budget nothing is compacted
            before=[one.state for one in own],
            after=[self.after[row] for row in rows],
            compacted_slots=[one.compacted_slots for one in own],
            events=[one.events for one in own],
            seeds=[one.seed for one in own],
            prompt_spans=[one.prompt_spans for one in own],
        )

    @_once
    def _lengths(self, device: torch.device) -> Tensor:
        """Physical and logical length of every row before the forward, int64 [2, B]."""
        numbers = [[row.state.physical for row in self.rows], [row.state.logical for row in self.rows]]
        return torch.tensor(numbers, device=device)

    def _valid(self, device: torch.device) -> Tensor:
        if self.valid_Bq is None:
            return torch.ones(len(self.rows), self.columns, dtype=torch.bool, device=device)
        return self.valid_Bq.to(device)


def fed_tokens(batch: int, columns: int, attention_mask: Tensor | None) -> tuple[Tensor | None, list[int]]:
    """Return which columns of a forward hold tokens (bool [B, q], None: all), and how many tokens each row feeds.

    Raises:
        UnsupportedModelError: the mask does not cover the forward, or there is nothing to feed.
    """
    if columns == 0:
        raise UnsupportedModelError(
            "There is nothing to feed: this cache has seen at least as many tokens as the text has; "
            "call cache.reset() before another text, or continue the one it has seen."
        )
    if attention_mask is None:
        return None, [columns] * batch
    if attention_mask.shape[-1] < columns:
        raise UnsupportedModelError(
            f"The attention mask covers {attention_mask.shape[-1]} columns but the forward feeds {columns}; "
            "it must cover every column fed so far."
        )
    valid = attention_mask[:, -columns:].bool()
    return valid, [int(n) for n in valid.sum(-1).tolist()]


def check_padding(attention_mask: Tensor, columns: int, has_tokens: Sequence[bool]) -> None:
    """Check that no row is padded between its tokens, where a recurrent layer's state would take the padding in.

    Only the forward's own columns and the one before them are read: earlier ones were, by earlier forwards.

    Args:
        attention_mask: 2-D mask over every column fed so far.
        columns: width of the forward.
        has_tokens: by row, whether earlier forwards fed one; empty at the first forward.

    Raises:
        UnsupportedModelError: a row has tokens, padding, and tokens again.
    """
    valid = attention_mask[:, -columns - 1 :].bool()
    starts = (valid[:, 1:] & ~valid[:, :-1]).sum(-1)  # of a row with tokens, each one follows padding
    starts += torch.tensor(has_tokens, device=valid.device) if has_tokens else valid[:, 0]
    if bool((starts > 1).any()):
        raise UnsupportedModelError(
            "A row is padded between its tokens, which the state of this model's recurrent layers would take in; pad "
            "on the left of the prompt only, or feed one row at a time."
        )
