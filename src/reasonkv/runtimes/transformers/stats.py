"""What a compressed cache held and dropped, per row."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from reasonkv.budget import slot_bytes

if TYPE_CHECKING:
    from reasonkv.runtimes.transformers.cache import CompressedCache
    from reasonkv.runtimes.transformers.rows import Row
    from reasonkv.runtimes.transformers.storage import LayerStorage


@dataclass(frozen=True)
class RowStats:
    """One row of a batch; slots are per KV head, averaged over compressed layers.

    Args:
        length: tokens seen (logical length).
        prompt: how many of them are prompt.
        physical_mean: slots held, mean over the tokens fed after the prompt (0 before the first); all are attended,
            unless the method selects or pads.
        physical_peak: most slots held at once, the prompt's forward included; each layer's own most, where they differ.
        physical_terminal: slots held now.
        events: compactions; of the layer with most of them, where layers have budgets of their own.
        tokens_dropped: slots dropped or folded away by them, per KV head, rounded.
        tokens_folded: those of them that live on in another slot.
        bytes_held: bytes this row's storage takes when it runs alone: slots allocated, token indices, counts, queries.
        bytes_peak: bytes if all layers held the row's peak at once, as they would without staging; at least bytes_held.
        bytes_full: bytes of keys and values a cache without bound would hold for the same tokens.
        guards: at how many events a method fell back on a rule of its own, by the rule's name.
        slots_read_mean: slots attended per token fed after the prompt, where a method selects, or holds padding that
            nothing attends to; None: all that are held.
        bytes_read_mean: the bytes of their keys and values in all layers, and of the page summaries read to choose.

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
    guards: dict[str, int] = field(default_factory=dict)
    slots_read_mean: float | None = None
    bytes_read_mean: float | None = None

    @property
    def saved_ratio(self) -> float:
        """Share of the tokens seen that is no longer held, 0 for full KV."""
        return 1.0 - self.physical_terminal / self.length if self.length else 0.0


@dataclass(frozen=True)
class CacheStats:
    """Stats of all rows.

    Args:
        rows: one entry per row of the batch.
        compressed_layers, other_layers: layers under the method; sliding layers that stay stock and are not counted.
        compaction_seconds: host time spent in events (on an accelerator, without waiting for it).
        bytes_allocated: bytes of keys and values allocated now for the whole batch, ragged tails included.
        bytes_allocated_peak: the most that was allocated at once; a long prompt is staged one layer at a time.

    """

    rows: list[RowStats]
    compressed_layers: int
    other_layers: int
    compaction_seconds: float
    bytes_allocated: int
    bytes_allocated_peak: int

    def __str__(self) -> str:
        if not self.rows:
            return "empty cache"
        n = len(self.rows)
        held, full = sum(r.bytes_held for r in self.rows), sum(r.bytes_full for r in self.rows)
        return (
            f"{n} row{'s' if n > 1 else ''}: {sum(r.length for r in self.rows) / n:.0f} tokens seen, "
            f"{sum(r.physical_terminal for r in self.rows) / n:.0f} slots held "
            f"(mean {sum(r.physical_mean for r in self.rows) / n:.0f}, "
            f"peak {max(r.physical_peak for r in self.rows):.0f}), "
            f"{sum(r.events for r in self.rows)} events, {held / 2**20:.2f} MiB held of {full / 2**20:.2f} MiB"
        )


def collect_stats(cache: CompressedCache) -> CacheStats:
    """What every row of a cache held and dropped so far, and the bytes of it."""
    layers = cache.compressed_layers
    storages = [layer.storage for layer in layers if layer.storage is not None]
    slots = [0] * len(cache.tracks)  # bytes of one slot of all heads in all layers of a track
    for layer in layers:
        if layer.storage is not None:
            slots[layer.track] += layer.storage.bytes_per_slot()
    plain = sum(_plain_slot_bytes(s) for s in storages)
    rows = [_row_stats(cache, number, slots, plain) for number in range(len(cache.rows))]
    live = sum(storage.bytes_allocated() for storage in storages)
    others = len(cache.layers) - len(layers)
    return CacheStats(rows, len(layers), others, cache.compaction_seconds, live, cache.bytes_peak)


def _row_stats(cache: CompressedCache, number: int, slots: list[int], plain: int) -> RowStats:
    own = [track.rows[number] for track in cache.tracks]
    first, selection, layers = own[0], cache.selection, len(cache.compressed_layers)

    def mean(values: list[int]) -> float:
        total = sum(track.layers * value for track, value in zip(cache.tracks, values, strict=True))
        return total // layers if total % layers == 0 else total / layers  # a whole number where all layers are alike

    allocated = [row.state.held if cache.budget is None else row.capacity(cache.max_length) for row in own]
    peaks = [max(row.peak, held) for row, held in zip(own, allocated, strict=True)]
    fixed = sum(layer.storage.bytes_per_row() for layer in cache.compressed_layers if layer.storage is not None)
    fixed += 4 * first.state.length if cache.method.needs.token_ids else 0
    fixed += 0 if selection is None else selection.bytes_held(first.state.held)
    slots_read, summaries_read = (None, 0.0) if selection is None else selection.read(number)
    attended, decoded = mean([row.attended for row in own]), first.decoded
    passed = sum(track.layers * row.padding_passed for track, row in zip(cache.tracks, own, strict=True)) / layers
    if passed or any(row.padding for row in own):
        slots_read = (attended - passed) / decoded if decoded else 0.0
    return RowStats(
        length=first.state.length,
        prompt=min(first.state.prompt, first.state.length),
        physical_mean=attended / decoded if decoded else 0.0,
        physical_peak=mean([row.peak for row in own]),
        physical_terminal=mean([row.state.held for row in own]),
        events=max(row.events for row in own),
        tokens_dropped=round(mean([row.dropped for row in own])),
        tokens_folded=sum(track.layers * row.folded for track, row in zip(cache.tracks, own, strict=True)) / layers,
        bytes_held=sum(held * slot for held, slot in zip(allocated, slots, strict=True)) + fixed,
        bytes_peak=sum(peak * slot for peak, slot in zip(peaks, slots, strict=True)) + fixed,
        bytes_full=first.state.length * plain,
        guards={name: len(events) for name, events in sorted(_guards(own).items())},
        slots_read_mean=slots_read,
        bytes_read_mean=None if slots_read is None else slots_read * plain + summaries_read,
    )


def _guards(rows: list[Row]) -> dict[str, set[int]]:
    """Events at which a guard of any layer decided."""
    found: dict[str, set[int]] = {}
    for row in rows:
        for name, events in row.guards.items():
            found.setdefault(name, set()).update(events)
    return found


def _plain_slot_bytes(storage: LayerStorage) -> int:
    if storage.keys is None or storage.values is None:
        return 0
    width = slot_bytes(storage.keys.shape[3], storage.values.shape[3], storage.keys.element_size())
    return storage.keys.shape[1] * width
