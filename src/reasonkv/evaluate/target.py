"""What a budget has to keep."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from reasonkv.errors import ReasonKVError

DEFAULT_TARGETS = {"kl": "0.05", "top1": "0.99", "nll": "1.05x", "accuracy": "0.95x"}
"""Of `reasonkv frontier`. A top-1 relative to full KV's own, which is 1, would say the same."""
HIGHER_IS_BETTER = {"top1": True, "nll": False, "kl": False, "accuracy": True}


class FrontierError(ReasonKVError, ValueError):
    """A frontier that cannot be computed from what is there; the message is one sentence."""


@dataclass(frozen=True)
class Target:
    """What has to be kept."""

    metric: str
    value: float  # the number, or the factor where relative
    relative: bool = False  # times full KV's mean on the same examples

    @classmethod
    def parse(cls, text: str, metric: str) -> Target:
        """Read `0.95` (absolute) or `0.95x` (relative to full KV).

        Raises:
            FrontierError: not a number, or a target that full KV itself misses or that cannot be relative.
        """
        if metric not in HIGHER_IS_BETTER:
            raise FrontierError(f"The metric must be one of {', '.join(HIGHER_IS_BETTER)}, not {metric!r}.")
        relative = text.strip().lower().endswith("x")
        try:
            value = float(text.strip().rstrip("xX"))
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value < 0:
            raise FrontierError(f"A target is a number as in 0.95, or a factor of full KV as in 0.95x, not {text!r}.")
        if relative and metric == "kl":
            raise FrontierError("Full KV's KL is 0, so a target for kl must be absolute, as in 0.05.")
        higher = HIGHER_IS_BETTER[metric]
        if relative and (value > 1 if higher else value < 1):
            bound = "at most" if higher else "at least"
            raise FrontierError(f"Relative to full KV, a target for {metric} is {bound} 1x, not {text.strip()}.")
        if not relative and higher and value > 1:
            raise FrontierError(f"{metric} is a share, so its target lies between 0 and 1, not at {value:g}.")
        return cls(metric, value, relative)

    def __str__(self) -> str:
        sign = ">=" if HIGHER_IS_BETTER[self.metric] else "<="
        return f"{self.metric} {sign} {self.value:g}" + (" x full KV" if self.relative else "")

    def margin(self, mean: Any, full: Any) -> Any:
        """Return how far a mean (or an array) is on the right side; full KV counts for relative targets only."""
        sign = 1 if HIGHER_IS_BETTER[self.metric] else -1
        # a hair's width of slack, so that a mean that equals the target is not lost to rounding
        return sign * (mean - (self.value * full if self.relative else self.value)) + 1e-12
