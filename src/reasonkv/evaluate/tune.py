"""Find the smallest budget that keeps a target, by bisection over real runs.

Budgets are probed at midpoints in log(budget), between the smallest that holds what may never be evicted and the length
of the longest sequence, where nothing is evicted; of a `Window`, the slots kept of each window, up to its size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from reasonkv.budget import Budget, Window
from reasonkv.evaluate.cells import make_methods, make_rule
from reasonkv.evaluate.frontier import Comparison, Point, UsableBudget, compared, measured_points, usable_budget
from reasonkv.evaluate.job import BudgetOptions, GenerateJob, ReplayJob, TraceSettings, TuneJob
from reasonkv.evaluate.matching import selecting_method, sized, smallest
from reasonkv.evaluate.merging import merge, without_full
from reasonkv.evaluate.progress import Progress, silent
from reasonkv.evaluate.records import AnswerRecord, ReplayRecord
from reasonkv.evaluate.run import run
from reasonkv.evaluate.sharing import with_shares
from reasonkv.evaluate.statistics import RESAMPLES
from reasonkv.evaluate.table import to_frame
from reasonkv.evaluate.target import DEFAULT_TARGETS, FrontierError, Target
from reasonkv.evaluate.traces import file_name
from reasonkv.layers import bounded_layers
from reasonkv.methods import Method, divides, layer_budgets
from reasonkv.models import LoadedModel
from reasonkv.tasks import get_task

Records = Sequence[ReplayRecord] | Sequence[AnswerRecord]
RunCell = Callable[[int], Records]
"""Runs one method on one task at this many tokens; returns those records and full KV's."""
OnProbe = Callable[["Point | None", "Probe"], None]


@dataclass(frozen=True)
class Probe:
    """One budget that was run."""

    tokens: int
    # whether its compressed examples keep the target; None where there are none, or where full KV's share on them is 0,
    # so that a relative target asks for nothing
    keeps: bool | None
    mean: float | None
    full: float | None  # full KV's on the same examples, where it ran
    examples: int  # compressed ones
    regimes: dict[str, int]  # bounded records by regime


@dataclass(frozen=True)
class Search:
    """What a search found for one method on one task."""

    task: str
    method: str
    target: Target
    # "reached"; "at most" the smallest budget allowed, which keeps it; "not reached" by any budget at which decoding is
    # compressed; "never compressed" at the smallest budget already
    status: Literal["reached", "at most", "not reached", "never compressed"]
    # the largest budget that missed the target and the smallest above it that kept it. With "at most" the smallest
    # budget twice; with "not reached" the upper end is where nothing is compressed any more.
    bracket: tuple[int, int]
    probes: tuple[Probe, ...]  # the budgets that were run, in that order
    usable: UsableBudget | None  # the budget interpolated between them, and its 95 % interval over examples
    falls: tuple[Comparison, ...]  # pairs of probes where the larger budget, `theirs`, did worse

    @property
    def tokens(self) -> int | None:
        """The smallest budget run that keeps the target; None where none does."""
        return self.bracket[1] if self.status in {"reached", "at most"} else None

    @property
    def violated(self) -> bool:
        """Larger was not better: a budget above one that keeps the target misses it, or one did surely worse."""
        return bool(self.usable and self.usable.fails_above) or any(fall.holds for fall in self.falls)

    def to_dict(self) -> dict[str, Any]:
        """Return the search for JSON output."""
        falls = [
            {"smaller": one.ours.tokens, "larger": one.theirs.tokens, "drop": one.advantage, "p": one.p,
             "sure": one.holds}
            for one in self.falls
        ]  # fmt: skip
        own = {"target": str(self.target), "tokens": self.tokens, "monotonicity_violated": self.violated}
        return vars(self) | own | {"falls": falls}


def tune(
    job: TuneJob,
    model: LoadedModel,
    folder: Path,
    progress: Progress = silent,
    *,
    on_probe: OnProbe = lambda point, probe: None,
) -> list[Search]:
    """Find the usable budget of every bounded method of a job on every task of it.

    Full KV runs in any case: it gives the lengths and what a relative target refers to. Every probe is a results folder
    in `folder/cells`, so a search that was stopped, or one for another target, continues; `folder` itself holds what
    `run` would leave for the probes of this search. Arguments and errors are those of `reasonkv.evaluate.run.run`.

    Raises:
        FrontierError: a job that cannot be searched.
    """
    job, layers = with_shares(job, model), len(bounded_layers(model.model.config))
    target, rule, methods = check_search(job)
    inner, cells, found = _inner_job(job), folder / "cells", list[Search]()
    folders, sizes = list[Path](), set[int]()
    for spec in job.task:
        place = cells / file_name(str(spec))
        alone = replace(inner, task=(spec,), methods=("full",), budget=BudgetOptions())
        full = run(alone, model, place / "full", progress)
        folders.append(place / "full")
        for method in methods:

            def run_cell(tokens: int, spec: Any = spec, method: Method = method, place: Path = place) -> Records:
                name = method.spec()
                folders.append(place / file_name(f"{name}-{tokens}"))
                sizes.add(tokens)
                own = replace(inner, task=(spec,), methods=("full", name), budget=_with_sizes(job.budget, [tokens]))
                return run(own, model, folders[-1], without_full(progress), sources=[place / "full"])

            low, high = budget_range(rule, method, full, layers)
            found.append(
                find_usable_budget(
                    run_cell, low, high, target, resolution=job.resolution, seed=job.seed, on_probe=on_probe
                )
            )
    names = ("full", *(method.spec() for method in methods))
    merge(replace(inner, methods=names, budget=_with_sizes(job.budget, sizes)), folder, folders)
    return found


def _with_sizes(budget: BudgetOptions, sizes: Iterable[int]) -> BudgetOptions:
    """Return the rule at some sizes, which of a window are the slots kept of it."""
    if budget.window is not None:
        return replace(budget, retention=[one / budget.window for one in sorted(sizes)])
    return replace(budget, tokens=sorted(sizes))


def check_search(job: TuneJob) -> tuple[Target, Budget, list[Method]]:
    """Check what can be checked without a model; return the target, the budget rule and the bounded methods.

    Raises:
        FrontierError: a target that makes no sense, no bounded method, or one that keeps everything.
        TaskError, MethodError, BudgetError: a task, method or rule that does not exist, or a method's own window that
            does not fit the buffer of a `Window`.
    """
    target = Target.parse(job.target or DEFAULT_TARGETS[job.metric], job.metric)
    for spec in job.task:
        get_task(spec, job.options)
    methods = [method for method in make_methods(_inner_job(job)) if method.bounded]
    if (selecting := selecting_method(methods)) is not None:
        raise FrontierError(f"{selecting} drops nothing, so there is no budget to find; run it with --budgets instead.")
    if not methods:
        raise FrontierError("A search needs a bounded method; full KV has no budget.")
    rule = make_rule(job.budget)
    if isinstance(rule, Window):
        rule.check_protected(recent=max(method.needs.recent for method in methods))
    return target, rule, methods


def _inner_job(job: TuneJob) -> ReplayJob | GenerateJob:
    """Return the replay or generation that measures the metric."""
    names = ("task", "methods", "budget", "limit", "seed", "batch_size", "options")
    shared: dict[str, Any] = {name: getattr(job, name) for name in names}
    if job.metric == "accuracy":
        return GenerateJob(max_new_tokens=job.max_new_tokens, **shared)
    traces = TraceSettings() if job.max_new_tokens is None else TraceSettings(max_new_tokens=job.max_new_tokens)
    return ReplayJob(traces=traces, **shared)


def budget_range(rule: Budget, method: Method, full: Records, layers: int = 1) -> tuple[int, int]:
    """Return the smallest budget that holds what is never evicted, and one that evicts nothing of full KV's rows.

    Args:
        layers: compressed layers, for methods and budgets that divide tokens among them.
    """
    if isinstance(rule, Window):
        return 1, rule.size
    low = smallest(rule, method, max(one.prompt_tokens for one in full))
    # the last output token is never fed; a prompt on top of the budget takes none of it
    high = max(one.output_tokens - 1 + (one.prompt_tokens if rule.prompt != "on_top" else 0) for one in full)
    most = high = max(low, high)
    while divides(method, rule) and _least_share(method, sized(rule, high), layers) < most:
        high *= 2
    return low, high


def _least_share(method: Method, budget: Budget, layers: int) -> int:
    return min(one.tokens or 0 for one in layer_budgets(method, budget, layers) if one is not None)


def find_usable_budget(
    run_cell: RunCell,
    low: int,
    high: int,
    target: Target,
    *,
    resolution: float = 1.1,
    seed: int = 0,
    on_probe: OnProbe = lambda point, probe: None,
) -> Search:
    """Bisect for the smallest budget that keeps a target, on compressed records.

    A budget without compressed records bounds the search from above, since its rows are full KV's; so does one where
    full KV has 0 on the few examples that are still compressed. Where the smallest budget already keeps the target, the
    midpoint is run as well: if that one misses it, the search goes on above it. The interval is `usable_budget`'s over
    all probes.

    Args:
        run_cell: called once per budget.
        low: the smallest budget allowed.
        high: a budget that evicts nothing, which is not run.

    Raises:
        FrontierError: the range is empty, full KV is missing for a relative target, or a cell has no bounded records.
    """
    if not 1 <= low <= high:
        raise FrontierError(f"There is no budget between {low} and {high}.")
    points: dict[int, Point] = {}
    probes: list[Probe] = []
    name = ("", "")

    def keeps(tokens: int) -> bool | None:
        nonlocal name
        point, probe, name = _probe(to_frame(run_cell(tokens)), tokens, target)
        probes.append(probe)
        if point is not None:
            points[tokens] = point
        on_probe(point, probe)
        return probe.keeps

    first, middle = keeps(low), _middle(low, high, resolution)
    if first is None and low in points:
        raise FrontierError(
            f"Full KV's {target.metric} is 0 on {name[0]}, so a target relative to it asks for nothing; "
            f"give an absolute target, or a task it can do."
        )
    status: Literal["reached", "at most", "not reached", "never compressed"] = "reached"
    missed, kept = low, high
    if first is None:
        status, kept = "never compressed", low
    elif first and (middle is None or keeps(middle) is not False):
        status, kept = "at most", low
    else:
        missed = middle if first and middle is not None else low
        while (middle := _middle(missed, kept, resolution)) is not None:
            missed, kept = (middle, kept) if keeps(middle) is False else (missed, middle)
        if not any(probe.keeps for probe in probes if probe.tokens == kept):  # nothing compressed is known to do
            status = "not reached"
    usable = usable_budget(list(points.values()), target, seed=seed) if points else None
    pairs = combinations((points[tokens] for tokens in sorted(points)), 2)
    worse = compared(pairs, target.metric, better=True, seed=seed, resamples=RESAMPLES)
    falls = tuple(one for one in worse if one.advantage.mean > 1e-12)
    return Search(*name, target, status, (missed, kept), tuple(probes), usable, falls)


def _probe(frame: pd.DataFrame, tokens: int, target: Target) -> tuple[Point | None, Probe, tuple[str, str]]:
    """Return what the records of a cell say: its compressed point, the probe, and (task, label)."""
    points = measured_points(frame, target.metric)
    if len({(one.task, one.method) for one in points}) != 1 or {one.tokens for one in points} != {tokens}:
        raise FrontierError(f"A search needs the records of one method on one task at {tokens} tokens.")
    regimes = frame.loc[frame["tokens"] > 0, "regime"].value_counts().to_dict()
    name = (points[0].task, points[0].method)
    point = next((one for one in points if one.regime == "compressed"), None)
    if point is None:
        return None, Probe(tokens, None, None, None, 0, regimes), name
    if target.relative and len(point.full) < len(point.values):
        raise FrontierError("A target relative to full KV needs full KV on the same examples.")
    full = math.fsum(point.full.values()) / len(point.full) if point.full else None
    holds = bool(target.margin(point.mean, math.nan if full is None else full) >= 0)
    keeps = None if point.says_nothing(target) else holds
    return point, Probe(tokens, keeps, point.mean, full, len(point.values), regimes), name


def _middle(low: int, high: int, resolution: float) -> int | None:
    """Return the whole number between two budgets that halves their ratio; None where they are close enough."""
    if high - low < 2 or high <= low * resolution:
        return None
    return min(max(round(math.sqrt(low * high)), low + 1), high - 1)
