"""What an engine held and dropped, for its log, and for Prometheus beside vLLM's own metrics.

The worker counts, but another process answers `/metrics`. `prometheus_client` bridges the two where the environment
names a folder, PROMETHEUS_MULTIPROC_DIR, when the server is started; otherwise the numbers are in the log alone.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from reasonkv.plan import Plan
from reasonkv.runtimes.vllm.step import Step


@dataclass
class Meter:
    """Counts since the engine started.

    Args:
        steps: engine steps with at least one token.
        events: requests' events.
        dropped: slots dropped or folded away, per KV head.
        folded: those that live on in another slot, a mean over layers and heads.
        seconds: host time spent in events (on an accelerator, without waiting for it).
        step_seconds: host time of all steps.
        peak: most slots a request held at once.
        newest: the step before.

    """

    steps: int = 0
    events: int = 0
    dropped: int = 0
    folded: float = 0.0
    seconds: float = 0.0
    step_seconds: float = 0.0
    peak: int = 0
    newest: Step | None = field(default=None, repr=False)
    exporter: Exporter | None = field(default=None, repr=False)

    @property
    def physical(self) -> int:
        """Slots held by the requests of the newest step, after its events."""
        if self.newest is None:
            return 0
        dropped = sum(event.held - event.after.physical for event in self.newest.events)
        return int(self.newest.held.sum()) + self.newest.tokens - dropped

    @property
    def logical(self) -> int:
        """Tokens seen by the requests of the newest step."""
        return 0 if self.newest is None else int(self.newest.lengths.sum()) + self.newest.tokens

    def note_plans(self, plans: list[Plan], layers: int) -> None:
        """Count folded slots of one or all layers."""
        for plan in plans:
            if plan.fold is not None:
                kept = plan.kept_BHK.shape[-1]
                self.folded += float(((plan.fold.into_BHN >= 0).sum(-1) - kept).float().mean(-1).sum()) / layers

    def note_event(self, dropped: int) -> None:
        """Count one request's event, carried out in all layers."""
        self.events += 1
        self.dropped += dropped

    def note_step(self, step: Step, seconds: float) -> None:
        """Count one finished step, its events among them."""
        self.steps += 1
        self.step_seconds += seconds
        self.peak = max(self.peak, step.longest)
        self.newest = step
        if self.exporter is not None:
            self.exporter.update(self)

    def __str__(self) -> str:
        share = self.seconds / self.step_seconds if self.step_seconds else 0.0
        return (
            f"{self.events} events, {self.dropped} slots dropped per head, peak {self.peak} slots a request, "
            f"{self.seconds:.2f} s ({share:.1%} of step time) compacting"
        )


COUNTERS = {
    "events": ("reasonkv:events", "Compactions, one per request and event."),
    "dropped": ("reasonkv:slots_dropped", "Slots dropped or folded away, per KV head."),
    "folded": ("reasonkv:slots_folded", "Slots folded into others, a mean over layers and heads."),
    "seconds": ("reasonkv:compaction_seconds", "Host seconds spent compacting."),
    "step_seconds": ("reasonkv:step_seconds", "Host seconds of engine steps."),
}
GAUGES = {
    "physical": ("reasonkv:physical_tokens", "Slots held by the requests of the newest step, per KV head."),
    "logical": ("reasonkv:logical_tokens", "Tokens seen by the requests of the newest step."),
    "peak": ("reasonkv:peak_slots", "Most slots a request held at once."),
}


class Exporter:
    """The meter's numbers as Prometheus metrics of this process."""

    def __init__(self) -> None:
        from prometheus_client import Counter, Gauge

        # No registry: the server collects from the files, and a second engine of this process may have the same names.
        self.counters = {field: Counter(name, text, registry=None) for field, (name, text) in COUNTERS.items()}
        self.gauges = {
            field: Gauge(name, text, registry=None, multiprocess_mode="livemax")
            for field, (name, text) in GAUGES.items()
        }
        self.exported = dict.fromkeys(COUNTERS, 0.0)

    @classmethod
    def where_collected(cls) -> Exporter | None:
        """One, if another process collects what this one counts."""
        return cls() if os.environ.get("PROMETHEUS_MULTIPROC_DIR") else None

    def update(self, meter: Meter) -> None:
        """Bring every metric up to date."""
        for field_, counter in self.counters.items():
            value = float(getattr(meter, field_))
            counter.inc(value - self.exported[field_])
            self.exported[field_] = value
        for field_, gauge in self.gauges.items():
            gauge.set(getattr(meter, field_))
