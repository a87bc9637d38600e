"""What a compressed cache holds, evicted and allocated, per sequence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

from reasonkv.runtimes.transformers.sequences import LayerGroup
from reasonkv.runtimes.transformers.session import Session
from reasonkv.runtimes.transformers.storage import LayerStorage


@dataclass(frozen=True)
class RowStats:
    """One sequence of a batch; slots are per KV head, averaged over compressed layers.

    Args:
        length: tokens seen (logical length).
        prompt: how many of them are prompt.
        physical_mean: slots held, mean over the tokens fed after the prompt (0 before the first); all are attended,
            unless the method selects or pads.
        physical_peak: most slots held at once, the prompt's forward included; each layer's own most, where they differ.
        physical_terminal: slots held now.
        events: compactions; of the layer with most of them, where layers have budgets of their own.
        tokens_dropped: tokens evicted or merged away by them, per KV head, rounded.
        tokens_folded: those of them that live on in another slot.
        bytes_held: bytes this sequence's storage takes when it runs alone and is fully grown: slots up to the
            capacity, token indices, counts, queries.
        bytes_peak: bytes if all layers held the row's peak at once, as they would without staging; at least bytes_held.
        bytes_full: bytes of keys and values a cache without bound would hold for the same tokens.
        fallbacks: at how many compactions a method used a fallback rule, by the rule's name.
        slots_read_mean: slots attended per token fed after the prompt, where a method selects, or holds padding that
            nothing attends to; None: all that are held.
        bytes_read_mean: the bytes of their keys and values in all layers, and of the page summaries read to choose.
        bytes_in_use: bytes of the slots held now, and of what does not depend on them.
    """

    length: int
    prompt: int
    physical_mean: float
    physical_peak: float
    physical_terminal: float
    events: int
    tokens_dropped: int
    tokens_folded: float
    bytes_held: int
    bytes_peak: int
    bytes_full: int
    fallbacks: dict[str, int] = field(default_factory=dict)
    slots_read_mean: float | None = None
    bytes_read_mean: float | None = None
    bytes_in_use: int = 0


@dataclass(frozen=True)
class CacheStats:
    """Stats of all sequences of a batch.

    Args:
        rows: one entry per sequence.
        compressed_layers, other_layers: layers under the method; sliding layers that stay stock and are not counted.
        compaction_seconds: host time of compactions (on an accelerator, without waiting for it).
        bytes_allocated: bytes of keys and values allocated now for the whole batch, ragged tails included.
        bytes_allocated_peak: the most that was allocated at once; a long prompt is staged one layer at a time.
        bytes_beside: bytes allocated beside them: token indices, counts, method state, queries and page summaries.
    """

    rows: list[RowStats]
    compressed_layers: int
    other_layers: int
    compaction_seconds: float
    bytes_allocated: int
    bytes_allocated_peak: int
    bytes_beside: int = 0

    @classmethod
    def of(
        cls, rows: list[RowStats], storages: Sequence[LayerStorage], layers: int, others: int, seconds: float, peak: int
    ) -> CacheStats:
        """Return the stats of sequences and of the storage of the compressed layers."""
        live, beside = sum(one.bytes_allocated() for one in storages), sum(one.bytes for one in storages)
        return cls(rows, layers, others, seconds, live, max(peak, live), beside)

    @property
    def bytes_in_use(self) -> int:
        """Bytes of everything the sequences hold now."""
        return sum(row.bytes_in_use for row in self.rows)

    def facts(self) -> dict[str, str]:
        """Return what people want to know, in words by name; empty before the first token."""
        if not self.rows:
            return {}
        return {
            "tokens seen": _each(row.length for row in self.rows),
            "tokens kept": _each(round(row.physical_terminal) for row in self.rows),
            "compactions": _each(row.events for row in self.rows),
            "in use": _bytes(self.bytes_in_use),
            "allocated": _bytes(self.bytes_allocated + self.bytes_beside),
            "full KV": _bytes(sum(row.bytes_full for row in self.rows)),
        }

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.facts().items()) or "empty"

    def _repr_html_(self) -> str:
        """Return a table for notebooks."""
        rows = self.facts() or {"tokens seen": "0"}
        cells = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows.items())
        return f"<table>{cells}</table>"


def collect_stats(
    session: Session, groups: Sequence[LayerGroup], storages: Sequence[tuple[int, LayerStorage]], is_bounded: bool
) -> list[RowStats]:
    """Return what every sequence holds and evicted so far, and the bytes of it.

    Args:
        session: of the cache.
        groups: its layers by budget.
        storages: every compressed layer's that has seen a token, with the number of its group.
        is_bounded: the cache has a budget.
    """
    if not groups:
        return []
    return [_row_stats(session, groups, row, storages, is_bounded) for row in range(len(groups[0].rows))]


def _row_stats(
    session: Session,
    groups: Sequence[LayerGroup],
    number: int,
    storages: Sequence[tuple[int, LayerStorage]],
    is_bounded: bool,
) -> RowStats:
    plain = sum(storage.bytes_per_token() for _, storage in storages)
    stored = sum(storage.bytes_per_stored_token() for _, storage in storages)
    fixed = sum(storage.bytes_per_row() for _, storage in storages)
    own, shares = [group.rows[number] for group in groups], [group.layers for group in groups]
    first, reader = own[0], session.reader

    def mean(values: Iterable[float]) -> float:
        total = sum(share * value for share, value in zip(shares, values, strict=True))
        layers = sum(shares)
        return total // layers if total % layers == 0 else total / layers  # a whole number where all layers are alike

    def size(slots: list[int]) -> int:
        return sum(storage.bytes_of(slots[group]) for group, storage in storages) + fixed

    held = [row.state.physical for row in own]
    allocated = [row.capacity(session.max_length) for row in own] if is_bounded else held
    fixed += 4 * first.state.logical if session.needs.token_ids else 0
    fixed += 0 if reader is None else reader.bytes_held(held[0])
    fallbacks = {(name, event) for row in own for name, events in row.fallbacks.items() for event in events}
    slots_read, summaries_read = (None, 0.0) if reader is None else reader.read(number)
    attended, decoded = mean([row.attended for row in own]), first.decoded
    passed = mean(row.padding_passed for row in own)
    if passed or any(row.padding for row in own):
        slots_read = (attended - passed) / decoded if decoded else 0.0
    return RowStats(
        length=first.state.logical,
        prompt=min(first.state.prompt, first.state.logical),
        physical_mean=attended / decoded if decoded else 0.0,
        physical_peak=mean([row.peak for row in own]),
        physical_terminal=mean(held),
        events=max(row.events for row in own),
        tokens_dropped=round(mean([row.dropped for row in own])),
        tokens_folded=mean(row.folded for row in own),
        bytes_held=size(allocated),
        bytes_peak=size([max(row.peak, slots) for row, slots in zip(own, allocated, strict=True)]),
        bytes_full=first.state.logical * plain,
        fallbacks=dict(sorted(Counter(name for name, _ in fallbacks).items())),
        slots_read_mean=slots_read,
        bytes_read_mean=None if slots_read is None else slots_read * stored + summaries_read,
        bytes_in_use=size(held),
    )


def _each(values: Iterable[int]) -> str:
    """Every sequence's number; of many sequences, the range."""
    numbers = list(values)
    if len(set(numbers)) == 1:
        return f"{numbers[0]}" + (f" in each of {len(numbers)} sequences" if len(numbers) > 1 else "")
    if len(numbers) <= 4:
        return ", ".join(map(str, numbers[:-1])) + f" and {numbers[-1]}"
    return f"{min(numbers)} to {max(numbers)} in {len(numbers)} sequences"


def _bytes(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.0f} KiB"
