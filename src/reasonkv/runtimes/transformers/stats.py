"""What a compressed cache held and dropped, per row."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RowStats:
    """One row of a batch; slots are per KV head, averaged over compressed layers.

    Args:
        length: tokens seen (logical length).
        prompt: how many of them are prompt.
        physical_mean: slots attended, mean over the tokens fed after the prompt (0 before the first).
        physical_peak: most slots held at once, the prompt's forward included.
        physical_terminal: slots held now.
        events: compactions.
        tokens_dropped: slots dropped or folded away by them, per KV head.
        tokens_folded: those of them that live on in another slot.
        bytes_held: bytes this row's storage takes when it runs alone: slots allocated, token indices, counts, queries.
        bytes_peak: bytes if all layers held the row's peak at once, as they would without staging; at least bytes_held.
        bytes_full: bytes of keys and values a cache without bound would hold for the same tokens.

    """

    length: int
    prompt: int
    physical_mean: float
    physical_peak: int
    physical_terminal: int
    events: int
    tokens_dropped: int
    tokens_folded: float
    bytes_held: int
    bytes_peak: int
    bytes_full: int

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
            f"peak {max(r.physical_peak for r in self.rows)}), "
            f"{sum(r.events for r in self.rows)} events, {held / 2**20:.2f} MiB held of {full / 2**20:.2f} MiB"
        )
