"""CAKE: attention that is high on average, or that changes from query to query."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge
from torch import Tensor

from reasonkv.methods.base import Requirements, ScorerMethod
from reasonkv.methods.ops import average_pool, fill_window, newest_attention
from reasonkv.methods.options import Kernel, Size
from reasonkv.view import SlotView


@dataclass(frozen=True)
class CAKE(ScorerMethod):
    """Keep slots by mean and variance of the newest queries' attention (Qin et al., 2025, "CAKE: Cascading and Adaptive
    KV Cache Eviction with Layer Preferences", arXiv 2503.12491, and its code).

    score = mean + gamma x variance over the window's queries, averaged over neighbouring slots and over the query heads
    of a KV head.

    The paper also divides slots among layers, by the entropy and the variance of the attention they pay to the prompt.
    Lengths here follow from the number of tokens alone, so every layer has the same: this is the paper's eviction
    indicator without its layer preferences. The authors' code drops the variance while decoding (`gamma=0`).

    Args:
        window: newest queries that vote; their tokens are always kept.
        gamma: weight of the variance, the unbiased one (of a single query: 0).
        kernel: slots pooled together, odd; 1 turns pooling off.
    """

    window: Size = 32
    gamma: Annotated[float, Ge(0)] = 200.0
    kernel: Kernel = 5

    @property
    def needs(self) -> Requirements:
        return Requirements(queries=self.window, recent=self.window)

    def score(self, view: SlotView) -> Tensor:
        N, T = view.positions_BHN.shape[-1], view.queries_BHgTD().shape[3]

        def indicator(_: slice, attention_rgTN: Tensor) -> Tensor:
            old_rgTn = attention_rgTN[..., : N - T]
            return (old_rgTn.mean(2) + self.gamma * old_rgTn.var(2, correction=min(1, T - 1))).mean(1)

        return fill_window(average_pool(newest_attention(view, indicator), self.kernel), N)
