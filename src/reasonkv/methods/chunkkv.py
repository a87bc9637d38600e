"""ChunkKV: runs of consecutive tokens are kept or evicted together, the same for all heads of a layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from reasonkv.methods.base import Requirements, ScorerMethod
from reasonkv.methods.ops import ranks, upcast
from reasonkv.methods.options import Size
from reasonkv.methods.wraps import ScoreWrapper
from reasonkv.plan import Plan
from reasonkv.view import SlotView


@dataclass(frozen=True)
class ChunkKV(ScoreWrapper, ScorerMethod):
    """Keep whole chunks of tokens by the mean score of another method (Liu et al., 2025, "ChunkKV: Semantic-Preserving
    KV Cache Compression for Efficient Long-Context LLM Inference", arXiv 2502.00299).

    A base method scores slots; scores are summed over the KV heads of the layer and averaged over chunks of `chunk`
    consecutive tokens, which are the same tokens at every compaction. The best chunks are kept in every head; of the
    last one, the slots with the best scores. Slots the budget protects do not count in their chunk's mean.

    Args:
        base: the method whose scores are summed; see `ScoreWrapper`.
        chunk: tokens of a chunk.
        reuse: layers that share the choice of the first of them (the paper's index reuse); 1: none.
    """

    chunk: Size = 10
    reuse: Size = 1

    @property
    def needs(self) -> Requirements:
        return replace(self.scorer.needs, scope="layer" if self.reuse == 1 else "model")

    def plan_layers(self, views: Sequence[SlotView], keep: int) -> list[Plan]:
        plans: list[Plan] = []
        for number, view in enumerate(views):
            first = number - number % self.reuse
            plans.append(self.plan(view, keep) if first == number else Plan(plans[first].kept_BHK))
        return plans

    def score(self, view: SlotView) -> Tensor:
        base_BN = view.reduce(self.scorer.score(view).sum(1), "sum")
        order_BN = chunk_order(base_BN, view.positions_BHN[:, 0], self.chunk, view.is_protected_BHN[:, 0])
        return order_BN[:, None].expand(view.positions_BHN.shape).contiguous()


def chunk_order(scores_BN: Tensor, positions_BN: Tensor, chunk: int, is_protected_BN: Tensor) -> Tensor:
    """Return numbers that sort slots by their chunk's mean score and then by their own, float64 [B, N].

    float64 holds them exactly; NaN where a score is.

    Args:
        scores_BN: scores of slots, summed over heads.
        positions_BN: int64, token indices, ascending; token p is in chunk p // `chunk`.
        chunk: tokens of a chunk.
        is_protected_BN: bool, slots that do not count in the mean.
    """
    tokens_BN = positions_BN.div(chunk, rounding_mode="floor")
    # Chunks that still have slots, numbered from 0: no more than there are slots.
    chunk_BN = (torch.diff(tokens_BN, dim=1, prepend=tokens_BN[:, :1]) != 0).cumsum(1)
    means_BN = chunk_means(scores_BN, chunk_BN, ~is_protected_BN)
    # Of equal means the newer chunk ranks higher, of equal scores the newer slot.
    order_BN = (ranks(means_BN).gather(1, chunk_BN) * scores_BN.shape[1] + ranks(scores_BN)).double()
    return torch.where(scores_BN.isnan(), torch.nan, order_BN)


def chunk_means(scores_BN: Tensor, chunk_BN: Tensor, counts_BN: Tensor) -> Tensor:
    """Return the mean score of every chunk, [B, N]; -inf for chunks of which no slot counts.

    Args:
        scores_BN: scores of slots.
        chunk_BN: int64, number of each slot's chunk, below N.
        counts_BN: bool, the slots that count in the mean.
    """
    # In float64, so that the order in which an accelerator adds does not show after rounding.
    sums_BN = torch.zeros_like(scores_BN, dtype=torch.float64)
    sums_BN.scatter_add_(1, chunk_BN, scores_BN.double().where(counts_BN, 0.0))
    members_BN = torch.zeros_like(sums_BN).scatter_add_(1, chunk_BN, counts_BN.double())
    return (sums_BN / members_BN).where(members_BN > 0, float("-inf")).to(upcast(scores_BN).dtype)
