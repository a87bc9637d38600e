"""Full KV's attention over known traces: which tokens later queries really look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from reasonkv.calibration.queries import attention_weights
from reasonkv.evaluate.chunks import TraceRow, feed
from reasonkv.methods.base import Requirements
from reasonkv.methods.full import FullKV
from reasonkv.methods.ops import upcast
from reasonkv.runtimes.transformers import CompressedCache
from reasonkv.runtimes.transformers.attention import LogitRule

Reduce = Literal["sum", "max"]

BLOCK_QUERIES = 64
"""Queries whose reduced attention is remembered together, at least."""
BLOCKS = 32
"""Most such blocks per row and layer, so that what is remembered stays well below the queries and keys themselves."""
WORK_ELEMENTS = 1 << 20
"""Attention weights worked on at once: 4 MiB of float32."""


@dataclass(frozen=True)
class QueryRecorder(FullKV):
    """Full KV with a ring of queries as long as the longest row: in the end it holds every query at its token index."""

    tokens: int = 1

    @property
    def needs(self) -> Requirements:
        """A ring of so many queries."""
        return Requirements(queries=self.tokens)


@dataclass(frozen=True)
class _LayerTrace:
    """Rotated queries [B, Hq, L, D] and keys [B, H, L, D] of one layer by token index; rows end at their length."""

    queries_BHqLD: Tensor
    keys_BHLD: Tensor
    rule: LogitRule


class FullAttention:
    """Full KV's attention over one batch of known traces.

    Holds the rotated queries and keys of every full-attention layer in the model's dtype, and, for rows and layers that
    were asked about, the reduced attention of blocks of queries, so that asking at many compactions costs about as much
    as asking once. Attention is the model's own: scaling, soft cap and learned sinks included.

    Legend: B rows, H KV heads, Hq query heads, L tokens of the longest row, D head_dim.

    Args:
        layers: by index in the model.
        lengths: tokens of every row: prompt and output, but for the last output token.
    """

    def __init__(self, layers: dict[int, _LayerTrace], lengths: Sequence[int]) -> None:
        self._layers = layers
        self.layers = list(layers)
        self.lengths = list(lengths)
        self._blocks: dict[tuple[int, int, Reduce], Tensor] = {}

    @staticmethod
    def collect(model: PreTrainedModel, rows: Sequence[TraceRow]) -> FullAttention:
        """Feed the traces through full KV once and keep the queries and keys.

        Args:
            rows: the traces; tokens are counted from the first of the prompt, and the last output token is not fed.

        Raises:
            UnsupportedModelError: the model's attention cannot be observed.
        """
        lengths = [row.fed for row in rows]
        longest = max(lengths)
        layers = {}
        prompts = [len(row.prompt_P) for row in rows]
        with CompressedCache(model, QueryRecorder(longest), prompt_lengths=prompts, max_length=longest) as cache:
            for _ in feed(model, cache, rows, score=False):
                pass
            for layer in cache.compressed_layers:
                storage = layer.storage
                assert storage is not None and storage.keys is not None and storage.ring is not None
                assert layer.rule is not None
                queries, keys = storage.ring.transpose(1, 2), storage.keys[:, :, :longest]
                if layer.expansion is not None:
                    queries = layer.expansion.absorb(queries)
                    keys, _ = layer.expansion.shown(keys, storage.values[:, :, :longest])
                layers[layer.index] = _LayerTrace(queries, keys.clone(), layer.rule)
        return FullAttention(layers, lengths)

    def received(self, layer: int, row: int, start: int, end: int, reduce: Reduce = "sum") -> Tensor:
        """Return the attention that the queries at token indices start..end-1 pay to tokens 0..end-1.

        Per KV head the mean over the query heads of its group, then the sum or the maximum over the queries. Causal: a
        query pays nothing to later tokens. No queries (start = end) pay 0.

        Returns:
            float32 [H, end].

        Raises:
            ValueError: not a full-attention layer, not a row, or not 0 <= start <= end <= the row's tokens.
        """
        if layer not in self._layers:
            raise ValueError(f"Layer {layer} is not a full-attention layer; those are {self.layers}.")
        if not 0 <= row < len(self.lengths):
            raise ValueError(f"There is no row {row}; the reference has {len(self.lengths)}.")
        if not 0 <= start <= end <= self.lengths[row]:
            raise ValueError(f"Row {row} has {self.lengths[row]} tokens; {start} to {end} is no range of them.")
        size = self._block_queries(row)
        first, last = -(-start // size), end // size  # whole blocks
        if last <= first:
            return self._reduced(layer, row, start, end, reduce)
        whole_nHL = self._whole_blocks(layer, row, reduce)[first:last, :, :end]
        total_HL = torch.zeros_like(whole_nHL[0])
        for part_HL in (
            self._reduced(layer, row, start, first * size, reduce),
            whole_nHL.sum(0) if reduce == "sum" else whole_nHL.amax(0),
            self._reduced(layer, row, last * size, end, reduce),
        ):
            _reduce_into(total_HL, part_HL, reduce)
        return total_HL

    def _block_queries(self, row: int) -> int:
        return max(BLOCK_QUERIES, -(-self.lengths[row] // BLOCKS))

    def _whole_blocks(self, layer: int, row: int, reduce: Reduce) -> Tensor:
        """Return the reduced attention of every whole block of queries, float32 [n, H, L]."""
        key = (layer, row, reduce)
        if key not in self._blocks:
            length, size = self.lengths[row], self._block_queries(row)
            edges = list(range(0, length + 1, size))
            blocks_nHL = [
                torch.nn.functional.pad(self._reduced(layer, row, start, end, reduce), (0, length - end))
                for start, end in pairwise(edges)
            ]
            self._blocks[key] = torch.stack(blocks_nHL)
        return self._blocks[key]

    def _reduced(self, layer: int, row: int, start: int, end: int, reduce: Reduce) -> Tensor:
        """Return what `received` returns, computed from the queries, a few at a time."""
        found = self._layers[layer]
        Hq, H = found.queries_BHqLD.shape[1], found.keys_BHLD.shape[1]
        total_HL = torch.zeros(H, end, device=found.keys_BHLD.device)
        keys_HLD = upcast(found.keys_BHLD[row, :, :end])
        step = max(1, WORK_ELEMENTS // (Hq * max(1, end)))
        for at in range(start, end, step):
            upto = min(at + step, end)
            queries_HgTD = upcast(found.queries_BHqLD[row, :, at:upto]).reshape(H, Hq // H, upto - at, -1)
            position_T = torch.arange(at, upto, device=keys_HLD.device)
            weights_HTL = attention_weights(queries_HgTD, keys_HLD[:, :upto], position_T, **vars(found.rule)).mean(1)
            part_HL = weights_HTL.sum(1) if reduce == "sum" else weights_HTL.amax(1)
            _reduce_into(total_HL, part_HL.float(), reduce)
        return total_HL


def _reduce_into(total_HL: Tensor, part_Hl: Tensor, reduce: Reduce) -> None:
    """Add attention to the older l tokens into a total, or take the larger; weights are never below 0."""
    target = total_HL[:, : part_Hl.shape[1]]
    if reduce == "sum":
        target += part_Hl
    else:
        torch.maximum(target, part_Hl, out=target)
