"""What an engine's requests held and evicted, for its log, and for Prometheus beside vLLM's own metrics.

The worker counts, but another process answers `/metrics`. `prometheus_client` connects them through files, if the
environment names a folder (PROMETHEUS_MULTIPROC_DIR) when the server starts; otherwise the numbers are only logged.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from reasonkv.budget import Budget, PeriodicWindow
from reasonkv.plan import Plan
from reasonkv.runtimes.vllm.config import SCHEDULER
from reasonkv.runtimes.vllm.step import StepLayout

logger = logging.getLogger("vllm.reasonkv")

COUNTERS = {
    "compactions": ("reasonkv:events", "Compactions, one per request and event, a mean over layers."),
    "dropped": ("reasonkv:slots_dropped", "Slots evicted or merged, per KV head, a mean over layers."),
    "folded": ("reasonkv:slots_folded", "Slots merged into others, a mean over layers and heads."),
    "seconds": ("reasonkv:compaction_seconds", "Host seconds spent compacting."),
    "step_seconds": ("reasonkv:step_seconds", "Host seconds of engine steps."),
}
GAUGES = {
    "physical": (
        "reasonkv:physical_tokens",
        "Slots the newest step's requests hold, per KV head, a mean over layers.",
    ),
    "logical": ("reasonkv:logical_tokens", "Tokens seen by the requests of the newest step."),
    "peak": ("reasonkv:peak_slots", "Most slots a request held at once."),
}

_RESUMED_STOCK = (
    "Request %s was preempted. All it has is fed again, in chunks, and its compactions fall at their ends, so its text "
    f"may go on differently; with --scheduler-cls {SCHEDULER} it would not."
)
_RESUMED = "Request %s was preempted. All it has is fed again in chunks that end at its compactions."
_RESUMED_PERIODIC = (
    "Request %s was preempted. All it has is fed again; under a global period compactions fall elsewhere."
)


@dataclass
class Meter:
    """Counts since the engine started."""

    exporter: Exporter | None = None  # shows them to Prometheus
    steps: int = 0  # with at least one token
    compactions: float = 0.0  # one per request and event, a mean over layers
    dropped: float = 0.0  # slots evicted or merged per KV head, a mean over layers
    folded: float = 0.0  # slots merged, a mean over layers and heads
    seconds: float = 0.0  # host time spent compacting (on an accelerator, without waiting for it)
    step_seconds: float = 0.0  # host time of all steps
    peak: int = 0  # most slots a request held at once, a mean over layers
    newest: Sequence[StepLayout] = ()  # by tier
    shares: Sequence[float] = ()  # of all layers, those of every tier

    @property
    def physical(self) -> int:
        """Slots held by the requests of the newest step, after its compactions."""
        return round(sum(share * step.slots_after for step, share in zip(self.newest, self.shares, strict=True)))

    @property
    def logical(self) -> int:
        """Tokens seen by the requests of the newest step."""
        return int(self.newest[0].lengths.sum()) + self.newest[0].tokens if self.newest else 0

    def note_plans(self, plans: list[Plan], layers: int) -> None:
        """Count merged slots of one or all of so many layers."""
        for plan in plans:
            merged_B = plan.merged_B()
            self.folded += 0.0 if merged_B is None else float(merged_B.sum()) / layers

    def note_step(self, steps: Sequence[StepLayout], shares: Sequence[float], seconds: float) -> None:
        """Count one finished step: what it did in every tier, which have such shares of all layers."""
        self.steps += 1
        self.step_seconds += seconds
        self.newest, self.shares = steps, shares
        held_B = sum(share * (step.held + step.fed) for step, share in zip(steps, shares, strict=True))
        self.peak = max(self.peak, round(held_B.max()))
        if self.exporter is not None:
            self.exporter.update(self)

    def note_idle(self) -> None:
        """Count no slots any more: every request has ended."""
        if self.newest:
            self.newest = self.shares = ()
            if self.exporter is not None:
                self.exporter.update(self)

    def __str__(self) -> str:
        share = self.seconds / self.step_seconds if self.step_seconds else 0.0
        return (
            f"{self.compactions:.0f} compactions, {self.dropped:.0f} slots dropped per head, peak {self.peak} slots a "
            f"request, {self.seconds:.2f} s ({share:.1%} of step time) compacting"
        )


class Exporter:
    """The meter's numbers as Prometheus metrics of this process."""

    def __init__(self) -> None:
        from prometheus_client import Counter, Gauge

        # No registry: the server collects from the files, and a second engine of this process may have the same names.
        self._counters = {key: Counter(*texts, registry=None) for key, texts in COUNTERS.items()}
        options: dict[str, Any] = {"registry": None, "multiprocess_mode": "livemax"}
        self._gauges = {key: Gauge(*texts, **options) for key, texts in GAUGES.items()}
        self._exported = dict.fromkeys(COUNTERS, 0.0)

    @classmethod
    def where_collected(cls) -> Exporter | None:
        """Return one if another process collects what this one counts."""
        return cls() if os.environ.get("PROMETHEUS_MULTIPROC_DIR") else None

    def update(self, meter: Meter) -> None:
        """Bring every metric up to date."""
        for key, counter in self._counters.items():
            value = float(getattr(meter, key))
            counter.inc(value - self._exported[key])
            self._exported[key] = value
        for key, gauge in self._gauges.items():
            gauge.set(getattr(meter, key))


def note_resumed(name: str, budget: Budget, has_scheduler: bool) -> None:
    """Log what becomes of a preempted request that goes on."""
    if not has_scheduler:
        logger.warning(_RESUMED_STOCK, name)
        return
    logger.info(_RESUMED_PERIODIC if isinstance(budget, PeriodicWindow) else _RESUMED, name)
