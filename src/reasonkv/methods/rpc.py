"""RPC: one set of slots for a layer, by the smoothed attention of the newest queries among what may be evicted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from reasonkv.methods.base import Requirements, ScorerMethod
from reasonkv.methods.ops import attend, average_pool, fill_window, max_pool
from reasonkv.methods.options import Kernel, Size
from reasonkv.view import SlotView


@dataclass(frozen=True)
class RPC(ScorerMethod):
    """Keep the path of reasoning that the newest queries attend to (Song et al., 2025, "Reasoning Path Compression:
    Compressing Generation Trajectories for Efficient LLM Reasoning", arXiv 2505.13866, and its code).

    The softmax of each selector query runs over the generated slots before the selector window alone: neither the
    window nor anything else that is protected takes part. It is summed over the queries, averaged over all query heads
    of the layer, and averaged over neighbouring slots. Every head keeps the same slots.

    The paper compresses every P = 1024 tokens to a quarter and lets the rest grow: `keep=0.25, interval=1024` in the
    budget. It always keeps the prompt: `prompt="keep"` or "on_top".

    Args:
        window: newest queries that select; their tokens are always kept.
        kernel: slots pooled together, odd; 1 turns pooling off.
        pooling: "avg" - zeros beyond the ends count in the mean; "max".
        heads: "all" - as above; "group" - every KV head chooses by its own query heads.
    """

    window: Size = 32
    kernel: Kernel = 7
    pooling: Literal["avg", "max"] = "avg"
    heads: Literal["all", "group"] = "all"

    @property
    def needs(self) -> Requirements:
        scope: Literal["layer", "head"] = "layer" if self.heads == "all" else "head"
        return Requirements(queries=self.window, recent=self.window, scope=scope)

    def score(self, view: SlotView) -> Tensor:
        n = view.positions_BHN.shape[-1] - view.queries_BHgTD().shape[3]
        is_out_RN = view.is_protected_BHN.flatten(0, 1)

        def leave_out(block: slice, logits_rgTn: Tensor) -> None:
            logits_rgTn.masked_fill_(is_out_RN[block, None, None, :n], float("-inf"))

        votes_BHn = attend(
            view.queries_BHgTD(),
            view.keys_BHND[:, :, :n],
            view.scaling,
            lambda _, attention_rgTn: attention_rgTn.sum(2).mean(1),
            adjust=leave_out,
        )
        if self.heads == "all":
            votes_BHn = view.reduce(votes_BHn.mean(1, keepdim=True), "mean").expand_as(votes_BHn).contiguous()
        pool = average_pool if self.pooling == "avg" else max_pool
        return fill_window(pool(votes_BHn, self.kernel), view.positions_BHN.shape[-1])
