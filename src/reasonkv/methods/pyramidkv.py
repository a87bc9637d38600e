"""PyramidKV: lower layers keep more slots than higher ones, and SnapKV chooses them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from reasonkv.budget import Budget
from reasonkv.methods.base import Requirements, protected_tokens
from reasonkv.methods.options import Size
from reasonkv.methods.snapkv import SnapKV
from reasonkv.numbers import divide


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """SnapKV with a budget per layer that falls linearly from the first layer to the last (Cai et al., 2024,
    "PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling", arXiv 2406.02069).

    What every layer protects is set apart; of the b slots per layer beyond it, the last layer gets b / beta, the first
    2b - b / beta, those between lie on a line. The layers together have exactly layers x `tokens`.

    Args:
        window, kernel, pooling, denominator: SnapKV's.
        beta: how steep the pyramid is; 1 gives every layer the same, which is SnapKV.
        variant: "corrected" - as above; "kvpress" - as there: all of `tokens` is divided, shares are rounded one by
            one, so that their sum may miss, and where the last layer would get less than the window all layers get
            the same.
    """

    beta: Size = 20
    variant: Literal["corrected", "kvpress"] = "corrected"

    @property
    def needs(self) -> Requirements:
        return replace(super().needs, layer_budgets=True)

    def layer_tokens(self, budget: Budget, layers: int, prompt: int) -> list[int]:
        assert budget.tokens is not None  # `resolve_budget` refuses a share of the length
        if self.variant == "kvpress":
            return kvpress_pyramid(budget.tokens, layers, window=self.window, beta=self.beta)
        common = protected_tokens(budget, self.window, prompt)
        return [common + share for share in pyramid(budget.tokens - common, layers, self.beta)]


def pyramid(mean: int, layers: int, beta: int) -> list[int]:
    """Return shares on a line from 2 mean - mean / beta down to mean / beta, which sum to exactly layers x mean."""
    if layers == 1:
        return [mean]
    return divide(layers * mean, [(2 * beta - 1) * (layers - 1) - 2 * at * (beta - 1) for at in range(layers)])


def kvpress_pyramid(mean: float, layers: int, *, window: int, beta: int, length: int | None = None) -> list[int]:
    """Return slots per layer as kvpress divides `mean` slots per layer.

    `length` is the number of tokens to choose from, which caps the first layer's share; None for as many as are wanted.
    """
    least = mean / beta
    most = 2 * mean - least
    if length is not None and most >= length - window:
        most = length - window
        least = 2 * mean - most
    if layers == 1 or not (length is None or length >= most) or not most >= least >= window:
        return [round(mean)] * layers
    step = (most - least) / (layers - 1)
    return [round(most - layer * step) for layer in range(layers)]
