"""The usable budget by bisection over real runs: which budget a method needs, without measuring a whole grid.

Budgets are probed at midpoints in log(budget), between the smallest that holds what may never be dropped and the length
of the longest row, where nothing is dropped; of a `Window`, the slots kept of each window, up to its size. All probes
of a search go into one results folder, whose manifest names the methods and the budget rule but no budgets and no
target: the same search continues where it stopped, and one for another target or resolution reuses what it meets.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from reasonkv.budget import Budget, Window
from reasonkv.evaluate.answers import AnswerRecord
from reasonkv.evaluate.evaluator import EvaluateJob, run_evaluate
from reasonkv.evaluate.frontier import (
    HIGHER_IS_BETTER,
    FrontierError,
    Point,
    Target,
    UsableBudget,
    measured_points,
    regime,
    usable_budget,
)
from reasonkv.evaluate.manifest import Manifest
from reasonkv.evaluate.matching import selecting_method, sized
from reasonkv.evaluate.records import Record
from reasonkv.evaluate.runner import Progress, ReplayJob, run_replay, silent
from reasonkv.evaluate.statistics import Difference, holm, paired_difference, paired_p_value
from reasonkv.methods import Method, get_method
from reasonkv.models import LoadedModel

COMMAND = "frontier"
RESOLUTION = 1.1
"""A search ends when the smallest budget that keeps the target is at most this many times the largest that does not."""

Status = Literal["reached", "at most", "not reached", "never compressed"]
RunCell = Callable[[int], Sequence[Record | AnswerRecord]]
"""Runs one method on one task at this many tokens; returns those records and full KV's."""


@dataclass(frozen=True)
class Probe:
    """One budget that was run.

    Args:
        tokens: the budget's.
        keeps: whether its decode-active examples keep the target; None where there are none, or where full KV's share
            on them is 0, so that a relative target asks for nothing.
        mean: the metric over them; None where there are none.
        full: full KV's on the same examples, where it ran.
        examples: decode-active ones.
        regimes: bounded records by regime.
    """

    tokens: int
    keeps: bool | None
    mean: float | None
    full: float | None
    examples: int
    regimes: dict[str, int]


@dataclass(frozen=True)
class Fall:
    """A larger budget that did worse than a smaller one.

    Args:
        smaller, larger: tokens.
        drop: how much worse, over the examples both have, with a 95 % interval.
        p: of the paired t test, Holm-adjusted over all pairs of probes.
    """

    smaller: int
    larger: int
    drop: Difference
    p: float

    @property
    def sure(self) -> bool:
        """More than noise: the interval lies above 0 and p is below 0.05."""
        return self.drop.low > 0 and self.p < 0.05


@dataclass(frozen=True)
class Search:
    """What a search found for one method on one task.

    Args:
        task, method: the task, and the method's label.
        target: what had to be kept.
        status: "reached"; "at most" the smallest budget allowed, which keeps it; "not reached" by any budget at which
            decoding is compressed; "never compressed" at the smallest budget already.
        bracket: the largest budget that missed the target and the smallest above it that kept it. With "at most" the
            smallest budget twice; with "not reached" the upper end is where nothing is compressed any more.
        probes: the budgets that were run, in that order.
        usable: the budget interpolated between them, and its 95 % interval over examples.
        falls: pairs of probes where the larger budget did worse.
    """

    task: str
    method: str
    target: Target
    status: Status
    bracket: tuple[int, int]
    probes: tuple[Probe, ...]
    usable: UsableBudget | None
    falls: tuple[Fall, ...]

    @property
    def tokens(self) -> int | None:
        """The smallest budget run that keeps the target; None where none does."""
        return self.bracket[1] if self.status in {"reached", "at most"} else None

    @property
    def violated(self) -> bool:
        """Larger was not better: a budget above one that keeps the target misses it, or one did surely worse."""
        return bool(self.usable and self.usable.fails_above) or any(fall.sure for fall in self.falls)

    def to_dict(self) -> dict[str, Any]:
        """For JSON output."""
        return {
            **asdict(self),
            "target": str(self.target),
            "tokens": self.tokens,
            "falls": [asdict(fall) | {"sure": fall.sure} for fall in self.falls],
            "monotonicity_violated": self.violated,
        }


def find_usable_budget(
    run_cell: RunCell,
    low: int,
    high: int,
    target: Target,
    *,
    resolution: float = RESOLUTION,
    seed: int = 0,
    on_probe: Callable[[Point | None, Probe], None] | None = None,
) -> Search:
    """Bisect for the smallest budget that keeps a target, on decode-active records.

    A budget without decode-active records bounds the search from above, since its rows are full KV's; so does one where
    full KV has 0 on the few examples that are still compressed. Where the smallest budget already keeps the target, the
    midpoint is run as well: if that one misses it, the search goes on above it. The interval is `usable_budget`'s over
    all probes.

    Args:
        run_cell: runs the cell at a budget; called once per budget.
        low: the smallest budget allowed.
        high: a budget that drops nothing, which is not run.
        target: what has to be kept.
        resolution: where to stop, as a ratio of budgets above 1.
        seed: of the bootstrap.
        on_probe: called with every probe.

    Raises:
        FrontierError: the resolution is not above 1, the range is empty, full KV is missing for a relative target, or
            the cell gives no bounded records.
    """
    if not resolution > 1:
        raise FrontierError(f"The resolution is a ratio of budgets above 1, as in 1.1, not {resolution:g}.")
    if not 1 <= low <= high:
        raise FrontierError(f"There is no budget between {low} and {high}.")
    points: dict[int, Point] = {}
    probes: list[Probe] = []
    name = ("", "")

    def keeps(tokens: int) -> bool | None:
        nonlocal name
        point, probe, name = _probe(run_cell(tokens), tokens, target)
        probes.append(probe)
        if point is not None:
            points[tokens] = point
        if on_probe is not None:
            on_probe(point, probe)
        return probe.keeps

    first = keeps(low)
    if first is None and low in points:
        raise FrontierError(
            f"Full KV's {target.metric} is 0 on {name[0]}, so a target relative to it asks for nothing; "
            f"give an absolute target, or a task it can do."
        )
    status: Status = "reached"
    missed, kept = low, high
    if first is None:
        status, kept = "never compressed", low
    elif first:
        status, kept = "at most", low
        middle = _middle(low, high, resolution)
        if middle is not None and keeps(middle) is False:
            status, missed, kept = "reached", middle, high
    if status == "reached":
        while (middle := _middle(missed, kept, resolution)) is not None:
            missed, kept = (middle, kept) if keeps(middle) is False else (missed, middle)
        if not any(probe.keeps for probe in probes if probe.tokens == kept):  # nothing compressed is known to do
            status = "not reached"
    usable = usable_budget(list(points.values()), target, seed=seed) if points else None
    return Search(*name, target, status, (missed, kept), tuple(probes), usable, _falls(points, target.metric, seed))


def _probe(
    records: Sequence[Record | AnswerRecord], tokens: int, target: Target
) -> tuple[Point | None, Probe, tuple[str, str]]:
    """What the records of a cell say: its decode-active point, the probe, and (task, label)."""
    points = measured_points(records, target.metric)
    if not points or {(one.task, one.method, one.tokens) for one in points} != {
        (points[0].task, points[0].method, tokens)
    }:
        raise FrontierError(f"A search needs the records of one method on one task at {tokens} tokens.")
    regimes: dict[str, int] = Counter(regime(record) for record in records if record.budget is not None)
    name = (points[0].task, points[0].method)
    point = next((one for one in points if one.regime == "decode-active"), None)
    if point is None:
        return None, Probe(tokens, None, None, None, 0, dict(regimes)), name
    if target.relative and len(point.full) < len(point.values):
        raise FrontierError("A target relative to full KV needs full KV on the same examples.")
    full = math.fsum(point.full.values()) / len(point.full) if point.full else None
    holds: bool | None = None
    if not says_nothing(target, point):
        holds = bool(target.margin(point.mean, full if full is not None else math.nan) >= 0)
    return point, Probe(tokens, holds, point.mean, full, len(point.values), dict(regimes)), name


def says_nothing(target: Target, point: Point) -> bool:
    """Whether the target is relative to a share that is 0 for full KV too, so that anything keeps it."""
    return target.relative and HIGHER_IS_BETTER[target.metric] and bool(point.full) and not any(point.full.values())


def _middle(low: int, high: int, resolution: float) -> int | None:
    """The whole number between two budgets that halves their ratio; None where they are close enough."""
    if high - low < 2 or high <= low * resolution:
        return None
    return min(max(round(math.sqrt(low * high)), low + 1), high - 1)


def _falls(points: dict[int, Point], metric: str, seed: int) -> tuple[Fall, ...]:
    sign = 1 if HIGHER_IS_BETTER[metric] else -1
    pairs = list(combinations(sorted(points), 2))
    gains = []
    for smaller, larger in pairs:
        ours, theirs = points[smaller].values, points[larger].values
        gains.append({one: sign * (ours[one] - theirs[one]) for one in ours.keys() & theirs.keys()})
    p_values = holm([paired_p_value(list(one.values())) for one in gains])  # over the rises, too
    found = []
    for (smaller, larger), gain, p in zip(pairs, gains, p_values, strict=True):
        drop = paired_difference(gain, dict.fromkeys(gain, 0.0), seed=seed)
        if drop is not None and drop.mean > 1e-12:
            found.append(Fall(smaller, larger, drop, p))
    return tuple(found)


# -- over jobs --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _ReplayProbe(ReplayJob):
    """A part of a search that is recorded as the whole search."""

    search: ReplayJob

    def manifest(self, model: LoadedModel) -> Manifest:
        return _manifest(self.search.manifest(model))


@dataclass(frozen=True, kw_only=True)
class _EvaluateProbe(EvaluateJob):
    """A part of a search that is recorded as the whole search."""

    search: EvaluateJob

    def manifest(self, model: LoadedModel) -> Manifest:
        return _manifest(self.search.manifest(model))


def _manifest(whole: Manifest) -> Manifest:
    arguments = {name: value for name, value in whole.arguments.items() if name not in {"budgets", "mean_slots"}}
    rule = {name: value for name, value in whole.arguments["budgets"][0].items() if name not in {"tokens", "retention"}}
    return replace(whole, command=COMMAND, arguments=arguments | {"rule": rule})


def search_budgets(
    job: ReplayJob | EvaluateJob,
    model: LoadedModel,
    folder: Path,
    target: Target,
    *,
    resolution: float = RESOLUTION,
    progress: Progress = silent,
    on_probe: Callable[[Point | None, Probe], None] | None = None,
) -> list[Search]:
    """Find the usable budget of every bounded method of a job on every task of it.

    Full KV runs in any case: it gives the rows' lengths and what a relative target refers to.

    Args:
        job: with one budget, whose `tokens` (of a `Window` its retention) are ignored, and without `mean_slots`.
        model: the model.
        folder: results folder; a search that was stopped, or one for another target, continues in it.
        target: what has to be kept; accuracy belongs to an `EvaluateJob`, every other metric to a `ReplayJob`.
        resolution, on_probe: as in `find_usable_budget`.
        progress: called as `run_replay` and `run_evaluate` call it.

    Raises:
        FrontierError: a job that cannot be searched.
        And everything `run_replay` and `run_evaluate` raise.
    """
    methods = check_search(job, target, resolution)
    rule, found = job.budgets[0], []
    for task in job.tasks:
        full = [one for one in _run(job, model, folder, task, get_method("full"), None, progress) if one.task == task]
        full = [one for one in full if one.budget is None]
        for method in methods:
            low, high = budget_range(rule, method, full)

            def run_cell(tokens: int, task: str = task, method: Method = method) -> list[Record | AnswerRecord]:
                budget = sized(rule, tokens)
                records = _run(job, model, folder, task, method, budget, progress)
                cell = (task, method.name, method.options(), budget.to_dict())
                mine = [one for one in records if (one.task, one.method, one.options, one.budget) == cell]
                return [*(one for one in records if one.task == task and one.budget is None), *mine]

            found.append(
                find_usable_budget(run_cell, low, high, target, resolution=resolution, seed=job.seed, on_probe=on_probe)
            )
    return found


def check_search(job: ReplayJob | EvaluateJob, target: Target, resolution: float = RESOLUTION) -> list[Method]:
    """The bounded methods of a job, each once, after checking what can be checked without a model.

    Raises:
        FrontierError: the job does not measure the metric, has other than one budget, no bounded method, or one that
            drops nothing; or the resolution is not above 1.
        BudgetError: a method's own window does not fit the buffer of a `Window`.
    """
    if (target.metric == "accuracy") != isinstance(job, EvaluateJob):
        raise FrontierError(f"{target.metric} cannot be measured by this kind of job.")
    if len(job.budgets) != 1 or job.mean_slots:
        raise FrontierError("A search takes one budget, whose other fields are the rule, and no mean slots.")
    if not (resolution > 1 and math.isfinite(resolution)):
        raise FrontierError(f"The resolution is a ratio of budgets above 1, as in 1.1, not {resolution:g}.")
    if (selecting := selecting_method(job.methods)) is not None:
        raise FrontierError(f"{selecting} drops nothing, so there is no budget to find; run it with --budgets instead.")
    methods = list(dict.fromkeys(method for method in job.methods if method.bounded))
    if not methods:
        raise FrontierError("A search needs a bounded method; full KV has no budget.")
    if isinstance(job.budgets[0], Window):
        job.budgets[0].check_protected(recent=max(method.needs.recent for method in methods))
    return methods


def budget_range(rule: Budget, method: Method, full: Sequence[Record | AnswerRecord]) -> tuple[int, int]:
    """The smallest budget that holds what may never be dropped, and one that drops nothing of full KV's rows.

    Args:
        rule: every field of the budget but `tokens`.
        method: its own window counts as protected.
        full: full KV's records of one task.
    """
    if isinstance(rule, Window):
        return 1, rule.size
    recent = max(rule.recent, method.needs.recent)
    low = max(1, rule.sinks + recent)
    if rule.prompt == "keep":
        low = max(low, max(one.prompt_tokens for one in full) + recent + 1)
    # the last output token is never fed; a prompt on top of the budget takes none of it
    high = max(one.output_tokens - 1 + (one.prompt_tokens if rule.prompt != "on_top" else 0) for one in full)
    return low, max(low, high)


def _run(
    job: ReplayJob | EvaluateJob,
    model: LoadedModel,
    folder: Path,
    task: str,
    method: Method,
    budget: Budget | None,
    progress: Progress,
) -> Sequence[Record | AnswerRecord]:
    """Run one cell into the folder, or read it back; every record of the folder."""
    values: dict[str, Any] = {one.name: getattr(job, one.name) for one in fields(job)}
    values |= {"tasks": [task], "methods": [method], "budgets": [] if budget is None else [budget], "search": job}

    def own(what: str, done: int, total: int) -> None:
        if budget is None or what.endswith(f" @ {budget.label}"):  # not the traces, which are there already
            progress(what, done, total)

    if isinstance(job, EvaluateJob):
        return run_evaluate(_EvaluateProbe(**values), model, folder, own)
    return run_replay(_ReplayProbe(**values), model, folder, own)
