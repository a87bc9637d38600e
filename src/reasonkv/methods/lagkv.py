"""LagKV: a token's keys and values are judged by the range of the tokens that follow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from reasonkv.methods.base import ScorerMethod
from reasonkv.methods.ops import by_head, free_slots, ranks, top_k_slots, upcast
from reasonkv.methods.options import Count
from reasonkv.plan import Plan
from reasonkv.view import SlotView

_LEAST_LAG = 4


@dataclass(frozen=True)
class LagKV(ScorerMethod):
    """Keep tokens that vary most across channels, on the scale of the chunk after them (Liang et al., 2025, "LagKV:
    Lag-Relative Information of the KV Cache Tells Which Tokens Are Important", arXiv 2504.04704).

    After the first `sinks` slots, and after a prompt that is kept whole, slots are cut into chunks of `lag`. Each is
    scored against the next one: each channel is brought to the minimum and maximum that the next chunk has there, the
    standard deviation over channels is taken, and softmaxed over the chunk. The last whole chunk and the slots after it
    are always kept.

    The paper freezes a chunk once it is compressed, so that memory goes on growing. Here every compaction cuts the kept
    slots into chunks anew. A channel that does not change within the reference chunk counts as 0.

    Args:
        lag: slots of a chunk.
        sinks: first slots, which are in no chunk and rank highest.
        value_ratio: weight of the values' score beside the keys'.
        cross: True - scores are compared across chunks; False - ranks within a chunk are, so that every chunk keeps
            about the same share.
        fit: halve `lag` until four chunks fit into the budget beside such a prompt and sinks (at least 4 slots);
            otherwise the newest two chunks may be all that is kept. False is the public code.
    """

    lag: Annotated[int, Ge(2)] = 128
    sinks: Count = 4
    value_ratio: Annotated[float, Ge(0)] = 1.0
    cross: bool = False
    fit: bool = True

    def plan(self, view: SlotView, keep: int) -> Plan:
        lags = [self.fitting(free) for free in free_slots(view, keep)[:, 0, 0].tolist()]
        return Plan(top_k_slots(self.scores(view, lags), keep, view.is_protected_BHN))

    def fitting(self, slots: int) -> int:
        """Return the lag for a number of slots that may be chosen."""
        lag = self.lag
        while self.fit and lag // 2 >= _LEAST_LAG and 4 * lag > slots:
            lag //= 2
        return lag

    def score(self, view: SlotView) -> Tensor:
        return self.scores(view, [self.lag] * len(view.length_B))

    def scores(self, view: SlotView, lags: Sequence[int]) -> Tensor:
        """Return scores between 0 and 1 of all chunks but the last; 1 before the first and from the last chunk on.

        With fewer slots than two chunks there is nothing to compare with: the newer, the better.

        Args:
            view: one layer's slots.
            lags: of every row.
        """
        leading = view.is_protected_BHN[:, 0].cumprod(-1).sum(-1).tolist()  # the same in all heads
        cuts = [(max(self.sinks, first), lag) for first, lag in zip(leading, lags, strict=True)]
        scores_BHN = upcast(view.keys_BHND[:0]).new_ones(view.positions_BHN.shape)
        for first, lag in dict.fromkeys(cuts):
            rows = [row for row, cut in enumerate(cuts) if cut == (first, lag)]
            at = slice(None) if len(rows) == len(cuts) else rows
            self._score_chunks(scores_BHN, at, view, first, lag)
        return scores_BHN

    def _score_chunks(self, scores_BHN: Tensor, at: slice | list[int], view: SlotView, first: int, lag: int) -> None:
        """Write the scores of some rows, whose chunks of `lag` begin at slot `first`."""
        N = scores_BHN.shape[-1]
        chunks = (N - first) // lag
        if chunks < 2:
            rest = max(0, N - first)
            scores_BHN[at, :, N - rest :] = torch.arange(rest, device=scores_BHN.device) / max(1, rest)
            return
        scores_BHCL = (
            lag_relative(view.keys_BHND[at], first, lag)
            + self.value_ratio * lag_relative(view.values_BHND[at], first, lag)
        ) / (1.0 + self.value_ratio)
        if not self.cross:
            shares_BHCL = ranks(scores_BHCL).to(scores_BHCL.dtype) / lag
            scores_BHCL = torch.where(scores_BHCL.isnan(), scores_BHCL, shares_BHCL)
        scores_BHN[at, :, first : first + (chunks - 1) * lag] = scores_BHCL.flatten(2)


def lag_relative(x_BHND: Tensor, sinks: int, lag: int) -> Tensor:
    """Return the score of every slot of all whole chunks but the last, relative to the chunk after its own.

    Args:
        x_BHND: keys or values, any float dtype.
        sinks: slots before the first chunk.
        lag: slots of a chunk (L); there are C + 1 whole chunks.

    Returns:
        float32 (float64 for float64) [B, H, C, L]: sums to 1 over L.
    """
    D, chunks = x_BHND.shape[3], (x_BHND.shape[2] - sinks) // lag

    def of_heads(x_RnD: Tensor) -> Tensor:
        chunks_RCLD = x_RnD.view(-1, chunks, lag, D)
        least_RC1D = chunks_RCLD[:, 1:].amin(2, keepdim=True)
        range_RC1D = chunks_RCLD[:, 1:].amax(2, keepdim=True) - least_RC1D
        scale_RC1D = torch.where(range_RC1D == 0, 0.0, 1.0 / range_RC1D)
        relative_RCLD = (chunks_RCLD[:, :-1] - least_RC1D).mul_(scale_RC1D)
        # In place and by hand: ten times as fast on a CPU as `std`.
        norms_RCL = torch.linalg.vector_norm(relative_RCLD.sub_(relative_RCLD.mean(-1, keepdim=True)), dim=-1)
        return torch.softmax(norms_RCL / math.sqrt(D - 1), -1)

    return by_head(of_heads, x_BHND[:, :, sinks : sinks + chunks * lag])
