"""TOVA: what the newest token attends to is kept, one set for all heads of a layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from reasonkv.methods.base import Requirements, ScorerMethod
from reasonkv.methods.ops import window_attention
from reasonkv.methods.options import Size
from reasonkv.view import SlotView


@dataclass(frozen=True)
class TOVA(ScorerMethod):
    """Keep what the newest query attends to, averaged over all query heads of the layer (Oren et al., 2024,
    "Transformers are Multi-State RNNs", arXiv 2401.06104: Token Omission Via Attention).

    The paper evicts the lowest slot at every step: `interval=1` in the budget.

    Args:
        window: newest queries whose attention is averaged; the paper uses one. Their tokens are always kept.
    """

    window: Size = 1

    @property
    def needs(self) -> Requirements:
        return Requirements(queries=self.window, recent=self.window, scope="layer")

    def score(self, view: SlotView) -> Tensor:
        attention_BHgN = window_attention(view)
        mean_B1N = view.reduce(attention_BHgN.flatten(1, 2).mean(1, keepdim=True), "mean")
        return mean_B1N.expand(view.positions_BHN.shape).contiguous()
