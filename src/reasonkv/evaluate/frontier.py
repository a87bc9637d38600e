"""Usable budgets, from measured cells: what a method needs to keep a target (`crossings`: where methods swap).

A mean is only ever taken over one task, one budget rule and one regime (`regime`). Examples are the unit: samples of a
problem are averaged first, differences are paired by example, and resampling draws examples.

Legend: B measured budgets, N examples, R bootstrap samples.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from reasonkv.budget import Budget
from reasonkv.errors import ReasonKVError
from reasonkv.evaluate.answers import AnswerRecord
from reasonkv.evaluate.records import Record
from reasonkv.evaluate.results import Results
from reasonkv.evaluate.statistics import bootstrap_means
from reasonkv.evaluate.summary import method_labels
from reasonkv.schedule import Lengths, next_event, step

Regime = Literal["decode-active", "prefix-exhausted", "uncompressed", "selecting"]
Axis = Literal["tokens", "physical_mean", "bytes_held"]
HIGHER_IS_BETTER = {"top1": True, "nll": False, "kl": False, "accuracy": True}
PREFIX_GUARD = "prefix_budget_exhausted"
_SETTINGS = ("dtype", "seed", "limit", "traces", "samples", "sampling", "max_new_tokens")


class FrontierError(ReasonKVError, ValueError):
    """A frontier that cannot be computed from what is there; the message is one sentence."""


def regime(record: Record | AnswerRecord) -> Regime:
    """What a record says anything about.

    - "uncompressed": no event fell; the numbers are full KV's, whatever the method.
    - "prefix-exhausted": events fell, but the method had no decode tokens to choose from. Either it says so itself
      (the guard `prefix_budget_exhausted`), or the prompt is kept inside the budget and fills it together with the
      sinks and the recent window, or every event was a cut of the prompt and decoding never met another one.
    - "decode-active": decoding went on compressing, with tokens of its own to choose from.
    - "selecting": the method held everything, and every decoded token read a part of it.

    With `prompt="count"` a prompt larger than the budget does not by itself exhaust it: its tokens may be dropped, so
    from the first decode event on the method chooses among both. How many events are cuts of the prompt follows from
    the schedule alone.
    """
    if record.selects:
        return "selecting"
    if record.events == 0 or record.budget is None:
        return "uncompressed"
    budget = Budget.from_dict(record.budget)
    if record.guards.get(PREFIX_GUARD, 0) > 0:
        return "prefix-exhausted"
    if budget.prompt == "keep" and max(record.prompt_tokens, budget.sinks) + budget.recent >= budget.tokens:
        return "prefix-exhausted"
    return "decode-active" if record.events > _prompt_events(budget, record.prompt_tokens) else "prefix-exhausted"


def _prompt_events(budget: Budget, prompt: int) -> int:
    state, events = Lengths(prompt=prompt), 0
    while state.logical < prompt:
        boundary = next_event(budget, state)
        state, keep = step(budget, state, min(prompt, boundary or prompt) - state.logical)
        events += keep is not None
    return events


@dataclass(frozen=True)
class Target:
    """What has to be kept.

    Args:
        metric: top1, nll, kl or accuracy.
        value: the number, or the factor where relative.
        relative: times full KV's mean on the same examples.
    """

    metric: str
    value: float
    relative: bool = False

    @classmethod
    def parse(cls, text: str, metric: str) -> Target:
        """`0.95` (absolute) or `0.95x` (relative to full KV).

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
        """How far a mean (or an array of means) is on the right side; full KV's is read for relative targets only."""
        sign = 1 if HIGHER_IS_BETTER[self.metric] else -1
        # a hair's width of slack, so that a mean that equals the target is not lost to rounding
        return sign * (mean - (self.value * full if self.relative else self.value)) + 1e-12


@dataclass(frozen=True)
class Point:
    """One cell on one task in one regime.

    Args:
        task, method: the task, and the method's label.
        rule: every field of the budget but `tokens`, as canonical JSON.
        regime: of all its records.
        tokens: the budget's.
        values: the metric by example.
        full: full KV's on the same examples, as far as it ran.
        physical_mean, bytes_held: slots attended and bytes held, means over examples.
    """

    task: str
    method: str
    rule: str
    regime: Regime
    tokens: int
    values: dict[int, float]
    full: dict[int, float]
    physical_mean: float
    bytes_held: float

    @property
    def mean(self) -> float:
        """Of the metric, over examples."""
        return math.fsum(self.values.values()) / len(self.values)

    def x(self, axis: Axis) -> float:
        """Where it stands on an axis."""
        return float(getattr(self, axis))


def metric_value(record: Record | AnswerRecord, metric: str) -> float:
    """The metric of a record.

    Raises:
        FrontierError: records of this kind have no such metric.
    """
    if isinstance(record, AnswerRecord) != (metric == "accuracy"):
        has = "accuracy" if isinstance(record, AnswerRecord) else "top1, nll and kl"
        raise FrontierError(f"These records have {has}, not {metric}; choose another --metric or another folder.")
    return float(record.correct) if isinstance(record, AnswerRecord) else float(getattr(record, metric))


def measured_points(records: Sequence[Record | AnswerRecord], metric: str) -> list[Point]:
    """Every cell, split by task, budget rule and regime, budgets ascending, in the order they first occur."""
    labels = method_labels(records)
    full: dict[str, dict[int, list[float]]] = {}
    cells: dict[tuple[str, str, str, Regime, int], list[Record | AnswerRecord]] = {}
    for record in records:
        if record.budget is None:
            full.setdefault(record.task, {}).setdefault(record.example, []).append(metric_value(record, metric))
            continue
        rule = json.dumps({k: v for k, v in record.budget.items() if k not in ("tokens", "retention")}, sort_keys=True)
        label = labels[json.dumps([record.method, record.options], sort_keys=True)]
        cells.setdefault((record.task, label, rule, regime(record), record.budget["tokens"]), []).append(record)
    order = {key[:4]: at for at, key in reversed(list(enumerate(cells)))}
    points = []
    for key in sorted(cells, key=lambda key: (order[key[:4]], key[4])):
        members, by_example = cells[key], dict[int, list[float]]()
        for record in members:
            by_example.setdefault(record.example, []).append(metric_value(record, metric))
        values = {one: math.fsum(v) / len(v) for one, v in sorted(by_example.items())}
        ours = full.get(key[0], {})
        reference = {one: math.fsum(ours[one]) / len(ours[one]) for one in values if one in ours}
        physical, held = (
            math.fsum(getattr(m, n) for m in members) / len(members) for n in ("physical_mean", "bytes_held")
        )
        points.append(Point(*key, values, reference, physical, held))
    return points


@dataclass(frozen=True)
class UsableBudget:
    """The smallest budget that keeps a target.

    Args:
        status: "reached" between two measured budgets; "at most" the smallest measured one, which keeps it already;
            "not reached" by the largest.
        tokens: on the axis it was asked for; None when not reached.
        low: lower end of the 95 % interval; equal to `smallest` it means "or less". None: not reached either.
        high: upper end; None where more than 2.5 % of resamples do not reach the target.
        smallest, largest: measured.
        examples: in all points together.
        fails_above: measured budgets above one that keeps the target, which do not keep it.
    """

    status: Literal["reached", "at most", "not reached"]
    tokens: float | None
    low: float | None
    high: float | None
    smallest: float
    largest: float
    examples: int
    fails_above: tuple[float, ...] = ()


def usable_budget(
    points: Sequence[Point], target: Target, *, axis: Axis = "tokens", seed: int = 0, resamples: int = 2000
) -> UsableBudget:
    """The smallest budget from which on every measured budget keeps the target.

    Between two measured budgets the metric is taken to be linear in log(budget). Measured curves need not rise: the
    envelope that is crossed is, at every budget, the worst margin at it or at any larger measured one, so a budget
    that keeps the target by luck below one that fails is not called usable (`fails_above` names such budgets). The
    interval is the bootstrap percentile interval over examples: each resample computes all means and the crossing
    again.

    Args:
        points: of one task, method, rule and regime, at one or more budgets.
        target: what has to be kept; relative targets need full KV on every example.
        axis: what the budget is measured in.
        seed: of the resampling.
        resamples: bootstrap samples; those that hold no example of some point are left out.

    Raises:
        FrontierError: no points, points of several cells, or full KV is missing.
    """
    if not points:
        raise FrontierError("A usable budget needs at least one measured budget.")
    if len({(p.task, p.method, p.rule, p.regime) for p in points}) > 1:
        raise FrontierError("A usable budget belongs to one task, method, budget rule and regime.")
    if target.relative and any(len(p.full) < len(p.values) for p in points):
        raise FrontierError("A target relative to full KV needs full KV on the same examples; add full to --methods.")
    points = sorted(points, key=lambda point: point.x(axis))
    x_B = np.array([point.x(axis) for point in points])
    examples = sorted(set().union(*(point.values for point in points)))
    stack_3BN = np.zeros((3, len(points), len(examples)))
    for b, point in enumerate(points):
        for n, example in enumerate(examples):
            if example in point.values:
                stack_3BN[:, b, n] = point.values[example], point.full.get(example, 0.0), 1.0
    margin_B = _margins(stack_3BN.mean(axis=-1), target)
    found = float(_crossing(x_B, margin_B[:, None])[0])
    drawn_BR = _margins(bootstrap_means(stack_3BN, seed=seed, resamples=resamples), target)
    drawn_R = _crossing(x_B, drawn_BR[:, np.isfinite(drawn_BR).all(axis=0)])
    ends = [float(np.quantile(drawn_R, q, method="higher")) if len(drawn_R) else math.inf for q in (0.025, 0.975)]
    keeps = np.flatnonzero(margin_B >= 0)
    fails = tuple(float(x) for b, x in enumerate(x_B) if len(keeps) and b > keeps[0] and margin_B[b] < 0)
    status: Literal["reached", "at most", "not reached"] = "reached"
    if math.isinf(found):
        status = "not reached"
    elif found <= x_B[0]:
        status = "at most"
    tokens, low, high = (None if math.isinf(one) else one for one in (found, *ends))
    return UsableBudget(status, tokens, low, high, float(x_B[0]), float(x_B[-1]), len(examples), fails)


def _margins(stack: NDArray[np.float64], target: Target) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore", divide="ignore"):
        margins: NDArray[np.float64] = target.margin(stack[0] / stack[2], stack[1] / stack[2])
    return margins


def _crossing(x_B: NDArray[np.float64], margin_BR: NDArray[np.float64]) -> NDArray[np.float64]:
    """Where the envelope of each column reaches 0; infinite where it never does, and at least the smallest x."""
    envelope_BR = np.minimum.accumulate(margin_BR[::-1], axis=0)[::-1]
    log_B = np.log(x_B)
    first_R = (envelope_BR >= 0).argmax(axis=0)
    columns = np.arange(margin_BR.shape[1])
    before_R = np.maximum(first_R - 1, 0)
    below, above = envelope_BR[before_R, columns], envelope_BR[first_R, columns]
    rise = np.where(above > below, above - below, 1.0)
    share = np.where(first_R > 0, -below / rise, 1.0)
    at = np.exp(log_B[before_R] + np.clip(share, 0, 1) * (log_B[first_R] - log_B[before_R]))
    at = np.where(first_R == 0, x_B[0], at)  # without the rounding of exp and log
    crossing: NDArray[np.float64] = np.where(envelope_BR[-1] >= 0, at, np.inf)
    return crossing


def joined(results: Sequence[Results]) -> list[Record | AnswerRecord]:
    """The records of folders that may be compared; what several hold (full KV, say) counts once.

    Raises:
        FrontierError: their models, kinds or settings differ.
    """
    first = results[0]
    found: dict[str, Record | AnswerRecord] = {}
    for one in results:
        if bool(one.answers) != bool(first.answers):
            raise FrontierError(f"{one.folder} and {first.folder} hold different kinds of results; give one kind.")
        mine, theirs = (r.manifest.get("model", {}).get("hash") for r in (one, first))
        if mine != theirs:
            raise FrontierError(f"{one.folder} and {first.folder} hold results of different models.")
        a, b = (r.manifest.get("arguments", {}) for r in (one, first))
        for name in _SETTINGS:
            if a.get(name) != b.get(name):
                raise FrontierError(f"{one.folder} and {first.folder} differ in {name}, so they cannot be compared.")
        own: list[Record | AnswerRecord] = [*one.records, *one.answers]
        for record in own:
            found.setdefault(record.key, record)
    return list(found.values())
