"""SlotView: what a method may look at when it plans an event of one layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from reasonkv import noise
from reasonkv.network import Network
from reasonkv.rotary import Rotary


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """Statistics of one layer's queries after query normalisation and before RoPE; F = rotary pairs.

    Args:
        mean_HqF: complex64, mean of q_f.
        modulus_HqF: float32, mean of |q_f|.
        square_HqF: float32, mean of |q_f|^2; None in imported older files.
        horizon_HqJ: float32, weights of the future distances 1, 2, 4, ..., each row summing to 1; None unless fitted.
        forecast: the network of every KV head, for the method `forecast`; None unless fitted.
    """

    mean_HqF: Tensor
    modulus_HqF: Tensor
    square_HqF: Tensor | None = None
    horizon_HqJ: Tensor | None = None
    forecast: Network | None = None


class TraceAttention(Protocol):
    """Full KV's attention over known traces, one per batch row; `reasonkv.evaluate.reference` collects it."""

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens of every row."""

    def received(self, layer: int, row: int, start: int, end: int, reduce: Literal["sum", "max"] = "sum") -> Tensor:
        """Attention [H, end] that the queries of tokens start..end-1 pay to tokens 0..end-1, float32."""


class Ranks(Protocol):
    """Tensor-parallel processes, each with as many KV heads of its own."""

    def gather(self, x: Tensor) -> Tensor:
        """Every rank's `x` (of one shape), stacked in front in the order of their heads: the same on all ranks.

        A collective: all ranks call it equally often and in the same order.
        """


@dataclass(frozen=True)
class SlotView:
    """The slots of one layer for B rows that all hold N slots and keep the same number at this event.

    Rows of a batch that differ in length come in separate views, so a method never sees padding and needs no mask.
    Legend: B rows, H KV heads, Hq query heads (query head h reads KV head h // (Hq / H)), N slots, T queries,
    D head_dim.

    Args:
        keys_BHND: rotated keys, in the model's dtype.
        values_BHND: values.
        positions_BHN: int64, the token's index in its row, ascending in N.
        counts_BHN: int32, source tokens a slot stands for (1 unless merged).
        is_prompt_BHN: bool, the slot holds a token of the prompt.
        is_protected_BHN: bool, the slot may not be dropped (sinks, recent, and the prompt if the budget says so).
        queries_BHqTD: the newest T rotated queries, oldest first, or None if the method asked for none.
        query_positions_BT: int64, their token indices.
        scaling: the factor the model applies to query-key products (usually D ** -0.5).
        state: method state by name, [B, H, N] (`Requirements(slot_state=...)`); "log_mass" if it is stored.
        length_B: int64, tokens the row has seen.
        event_B: int64, number of the row's event, from 0.
        row_seed_B: int64, the row's seed.
        seed: the run's seed.
        layer: index of the layer in the model.
        first_head: global index of KV head 0 (other than 0 under tensor parallelism).
        ranks: the processes that hold the layer's other heads, or None where all heads are here.
        rows: the batch row of each of the B rows.
        prompt_length_B: int64, tokens of the row's prompt, dropped ones included.
        query_heads: Hq, known whether or not queries are.
        calibration: statistics of this layer's queries, or None if the method asked for none.
        rotary: the layer's rotary embedding, or None if the method asked for neither it nor calibration.
        token_ids: per row, int64 [length]: every token it has seen; None if the method did not ask.
        row_state: what `Method.observe` keeps, by name, [B, ...].
        output_projection_HqDM: float32 slices of the output projection (query head, head_dim, model width), or None.
        reference: full KV's attention over the whole traces, for methods that declare `Requirements(future=True)`; None
            wherever the future is not known.
    """

    keys_BHND: Tensor
    values_BHND: Tensor
    positions_BHN: Tensor
    counts_BHN: Tensor
    is_prompt_BHN: Tensor
    is_protected_BHN: Tensor
    queries_BHqTD: Tensor | None
    query_positions_BT: Tensor | None
    scaling: float
    length_B: Tensor
    event_B: Tensor
    row_seed_B: Tensor
    seed: int
    layer: int
    first_head: int = 0
    state: dict[str, Tensor] = field(default_factory=dict)
    rows: tuple[int, ...] = ()
    prompt_length_B: Tensor | None = None
    query_heads: int = 0
    calibration: LayerStatistics | None = None
    rotary: Rotary | None = None
    token_ids: tuple[Tensor, ...] | None = None
    row_state: dict[str, Tensor] = field(default_factory=dict)
    output_projection_HqDM: Tensor | None = None
    reference: TraceAttention | None = None
    ranks: Ranks | None = None

    @property
    def group_size(self) -> int:
        """Query heads per KV head (1 where neither queries nor `query_heads` are given)."""
        if self.queries_BHqTD is not None:
            return self.queries_BHqTD.shape[1] // self.positions_BHN.shape[1]
        return max(1, self.query_heads // self.positions_BHN.shape[1])

    def queries_BHgTD(self) -> Tensor:
        """The queries with their KV head as an axis of its own: [B, H, g, T, D].

        Raises:
            ValueError: the method declared no `needs.queries`.
        """
        if self.queries_BHqTD is None:
            raise ValueError("This method needs recent queries; declare them in Requirements(queries=T).")
        B, _, T, D = self.queries_BHqTD.shape
        return self.queries_BHqTD.view(B, self.positions_BHN.shape[1], self.group_size, T, D)

    def reduce(self, x: Tensor, how: Literal["sum", "mean", "max"]) -> Tensor:
        """What was reduced over the heads here, reduced over all heads: whoever lets heads decide together calls this.

        The same on every rank, to the bit; `x` itself where all heads are here.

        Args:
            x: any shape, the same on all ranks; of "mean", a mean over this rank's heads.
            how: the reduction that made it.
        """
        if self.ranks is None:
            return x
        parts = self.ranks.gather(x)
        return parts.amax(0) if how == "max" else parts.sum(0) if how == "sum" else parts.mean(0)

    def all_heads(self, x: Tensor, dim: int) -> Tensor:
        """Numbers of the heads here joined with those of all other heads, along the axis that counts heads."""
        return x if self.ranks is None else torch.cat(list(self.ranks.gather(x)), dim)

    def future_attention_BHN(self, reduce: Literal["sum", "max"] = "sum") -> Tensor:
        """Attention that full KV's queries still to come in the trace pay to every slot's token, float32 [B, H, N].

        Args:
            reduce: sum or maximum over those queries; both are 0 when none is left.

        Raises:
            ValueError: there is no reference, or a row has seen more tokens than its trace has.
        """
        if self.reference is None:
            raise ValueError("This method needs the attention still to come; declare it in Requirements(future=True).")
        scores = []
        for row, length, positions_HN in zip(self.rows, self.length_B.tolist(), self.positions_BHN, strict=True):
            end = self.reference.lengths[row]
            if length > end:
                raise ValueError(f"Row {row} has seen {length} tokens, but its reference knows only {end}.")
            received_HL = self.reference.received(self.layer, row, length, end, reduce)
            scores.append(received_HL.gather(1, positions_HN))
        return torch.stack(scores)

    def uniform_BHN(self, draw: int = 0, *, per_event: bool = True) -> Tensor:
        """One float32 uniform in (0, 1) per slot: a hash of seed, row seed, layer, head, event and token index.

        Args:
            draw: number of the draw within the event, for methods that need several.
            per_event: fresh numbers at every event; False gives a token the same number for ever.
        """
        event_B = self.event_B if per_event else torch.zeros_like(self.event_B)
        last_head = self.first_head + self.positions_BHN.shape[1]
        heads = torch.arange(self.first_head, last_head, device=self.length_B.device)
        return noise.uniform(
            self.positions_BHN,
            seed=self.seed,
            row_seed=self.row_seed_B[:, None, None],
            layer=self.layer,
            head=heads[None, :, None],
            event=event_B[:, None, None],
            draw=draw,
        )
