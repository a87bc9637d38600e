"""How a gate is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class GateRecipe:
    """How a gate is trained; the defaults are the paper's, except for `queries` and what a sequence is.

    Args:
        page_size: Tokens of a page.
        steps: Optimizer steps.
        rows: Sequences of one step.
        queries: Most queries of a sequence that are trained on, spread evenly over those after its prompt.
        rate: Peak of the learning rate, reached after the warmup and followed by a cosine down to a hundredth.
        warmup: Steps of the warmup.
        seed: Seed of the first weights, and of the problems of tasks.
    """

    page_size: int = 64
    steps: int = 800
    rows: int = 16
    queries: int = 256
    rate: float = 1e-3
    warmup: int = 20
    seed: int = 0

    def rate_at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))
