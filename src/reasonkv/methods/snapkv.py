"""SnapKV during decode: what the recent queries attend to is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from reasonkv.methods.base import Requirements, ScorerMethod
from reasonkv.methods.ops import average_pool, fill_window, max_pool, window_attention
from reasonkv.methods.options import Kernel, Size
from reasonkv.view import SlotView


@dataclass(frozen=True)
class SnapKV(ScorerMethod):
    """Keep what the newest queries attend to, smoothed over neighbours (Li et al., 2024, "SnapKV: LLM Knows What You
    are Looking for Before Generation", arXiv 2404.14469, section 4).

    The paper compresses once, after the prompt, and per query head. Here every compaction does, and a KV head keeps one
    set by the mean over its query heads.

    Args:
        window: newest queries that vote; their tokens are always kept.
        kernel: slots pooled together, odd; 1 turns pooling off.
        pooling: "avg" - zeros beyond the ends count in the mean; "max" - per query head.
        denominator: "all" - the softmax runs over all slots as in the model (the paper); "old" - only over the slots
            before the window (VaSE's decode harness).
    """

    window: Size = 64
    kernel: Kernel = 5
    pooling: Literal["avg", "max"] = "avg"
    denominator: Literal["all", "old"] = "all"

    @property
    def needs(self) -> Requirements:
        return Requirements(queries=self.window, recent=self.window)

    def score(self, view: SlotView) -> Tensor:
        N, T = view.positions_BHN.shape[-1], view.queries_BHgTD().shape[3]
        attention_BHgn = window_attention(view, over=self.denominator)[..., : N - T]
        if self.pooling == "max":
            votes_BHn = max_pool(attention_BHgn, self.kernel).mean(2)
        else:
            votes_BHn = average_pool(attention_BHgn.mean(2), self.kernel)  # both are linear: the order is free
        return fill_window(votes_BHn, N)
