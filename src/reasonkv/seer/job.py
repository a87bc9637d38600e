"""What to train a gate on, and how: frozen dataclasses for Python, a configuration file and the command line.

Nothing here imports torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from reasonkv.calibration.job import CorpusJob


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


@dataclass(frozen=True, kw_only=True)
class TrainGateJob(GateRecipe, CorpusJob):
    """Train the gate that the method `seer` chooses pages with; the model itself is not changed.

    Args:
        limit: Problems per task.
        tokens: Most tokens of a text.
        out: File to write (.safetensors); `reasonkv_gate.safetensors` in the model's folder is found by itself.

    Raises:
        CorpusError: a number below 1, a wrong file ending, or not exactly one of text and task.
    """

    out: Path
    limit: int = 800
    tokens: int = 4_000_000
