"""From a job's specs to what runs: methods, budgets, and each method at each budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from reasonkv.budget import Budget, BudgetError, Window
from reasonkv.evaluate.job import RULE, BudgetOptions, GenerateJob, Job, JobError, ReplayJob, Sampling
from reasonkv.evaluate.matching import budget_for_mean, check_matchable
from reasonkv.methods import Method, divides, get_method, layer_budgets, refuse_future
from reasonkv.resolve import resolve_budget
from reasonkv.tasks import get_task


@dataclass(frozen=True)
class RunConfig:
    """One method at one budget; the budget is None exactly for full KV."""

    method: Method
    budget: Budget | None

    @property
    def label(self) -> str:
        """The method and its size, for people."""
        return self.method.spec() + (f" @ {self.budget.label}" if self.budget else "")


def make_budgets(options: BudgetOptions) -> list[Budget]:
    """Return one budget for each size; with `mean_slots` one whose size is still to be solved; none without sizes.

    Raises:
        BudgetError: fields that contradict each other.
    """
    if options.window is not None:
        windows: list[Budget] = [
            Window(size=options.window, buffer=options.window_buffer, retention=share) for share in options.retention
        ]
        return windows[: 1 if options.mean_slots else None]
    rule = {name: getattr(options, name) for name in RULE}
    if options.keep:
        return [Budget(keep=share, **rule) for share in options.keep]
    return [make_rule(options)] if options.mean_slots else [Budget(tokens=size, **rule) for size in options.tokens]


def make_rule(options: BudgetOptions) -> Budget:
    """Return a budget that holds just its sinks and recent tokens (or half a window), for a size that is to be found.

    Raises:
        BudgetError: fields that contradict each other.
    """
    if options.window is not None:
        return Window(size=options.window, buffer=options.window_buffer, retention=0.5)
    return Budget(tokens=max(1, options.sinks + options.recent), **{name: getattr(options, name) for name in RULE})


def make_config(method: str, options: BudgetOptions) -> RunConfig:
    """Return one method at one budget, as `generate` and `inspect` run it.

    Raises:
        JobError: a bounded method without exactly one budget, or full KV with one.
        MethodError, BudgetError: the method or budget does not exist, or the two do not fit.
    """
    chosen, budgets = get_method(method), make_budgets(options)
    if not chosen.bounded and budgets:
        raise JobError(f"{chosen.name} takes no budget; leave the budget out, or choose another method.")
    if chosen.bounded and (len(budgets) != 1 or options.mean_slots):
        raise JobError(f"{chosen.name} needs one budget here; give its tokens, or a window with one retention.")
    return plan_cells([chosen], budgets)[0]


def make_methods(job: Job) -> list[Method]:
    """Return the methods in the order they run, each once; a generation begins with full KV.

    Raises:
        MethodError: no such method or option, or one that works in replay only.
    """
    methods = [get_method(cast(Any, one)) for one in job.methods]
    if isinstance(job, GenerateJob):
        for method in methods:
            refuse_future(method)
        methods = [get_method("full"), *(method for method in methods if method.bounded)]
    return list(dict.fromkeys(methods))


def check_job(job: Job) -> list[RunConfig]:
    """Check everything that can be checked without a model, and return what runs as far as it is known.

    Raises:
        JobError, TaskError, MethodError, BudgetError: one sentence.
    """
    for spec in job.task:
        get_task(spec, job.options)
    methods, budgets = make_methods(job), make_budgets(job.budget)
    if not budgets and any(method.bounded for method in methods):
        raise JobError("A bounded method needs a budget; give its tokens, keep, mean_slots or a window.")
    return plan_cells(methods, budgets, job.budget.mean_slots)


def count_steps(job: Job) -> int:
    """Return how often `run` reports something as finished: every cell of each task, and the traces of a replay."""
    return len(job.task) * (len(check_job(job)) + (not isinstance(job, GenerateJob)))


def job_arguments(job: Job) -> dict[str, Any]:
    """Return what a manifest says of a job, whatever runs it."""
    arguments: dict[str, Any] = {
        "task": list(job.task),
        "methods": [method.spec() for method in make_methods(job)],
        "budgets": [one.to_dict() for one in make_budgets(job.budget)],
        "mean_slots": list(job.budget.mean_slots),
        "limit": job.limit,
        "seed": job.seed,
    }
    if chosen := job.options.to_dict():
        arguments["options"] = chosen
    if isinstance(job, GenerateJob):
        drawn = job.sampling.to_dict() if job.sampling != Sampling() else None
        arguments |= {"samples": job.samples, "sampling": drawn, "max_new_tokens": job.max_new_tokens}
    elif isinstance(job, ReplayJob):
        arguments |= {"traces": job.traces.to_dict()} | ({"diagnostics": True} if job.diagnostics else {})
    return arguments


def plan_cells(
    methods: Sequence[Method],
    budgets: Sequence[Budget],
    mean_slots: Sequence[float] = (),
    rows: Sequence[tuple[int, int]] | None = None,
    layers: int | None = None,
) -> list[RunConfig]:
    """Return every bounded method at every budget, and full KV without one, each once, in the methods' order.

    Args:
        methods, budgets: what meets; with `mean_slots` one budget, whose size is solved for each mean (and for each
            method that divides its budget among layers).
        mean_slots: mean physical lengths to reach instead.
        rows: (tokens of the prompt, tokens fed in all) of one task's sequences, for what only they can tell: whether
            prompts fit, and the sizes for `mean_slots`. None checks what can be checked without.
        layers: compressed layers of the model, if they are known; then shares of theirs are checked.

    Raises:
        BudgetError: a prompt or a method's own window does not fit a budget, or a mean cannot be reached, or has no
            meaning for a method that selects.
    """
    if mean_slots:
        check_matchable(methods)
    solved: dict[Method | None, Sequence[Budget]] = {}  # None: methods whose layers share one budget
    if rows is not None and mean_slots:
        decoding = [(prompt, fed) for prompt, fed in rows if fed > prompt]
        if not decoding:
            raise BudgetError(
                "--mean-slots is the mean over tokens fed after the prompt, but every output of full KV is a single "
                "token, which is never fed; give --budgets instead."
            )
        prompts, fed = zip(*decoding, strict=True)
        for own in dict.fromkeys(method if divides(method, budgets[0]) else None for method in methods):
            solved[own] = [budget_for_mean(budgets[0], mean, prompts, fed, own, layers or 1) for mean in mean_slots]
    elif mean_slots:  # not known yet: one configuration for each, whose budget is not checked
        budgets = list(budgets) * len(mean_slots)
    longest = None if rows is None else max(prompt for prompt, _ in rows)
    cells = []
    for method in methods:
        met = solved.get(method if mean_slots and divides(method, budgets[0]) else None, budgets)
        cells += [RunConfig(method, budget) for budget in (met if method.bounded else [None])]
    if mean_slots and rows is None:
        return cells
    for cell in cells:
        if cell.budget is not None:
            fitted, _ = resolve_budget(cell.method, cell.budget)  # as the cache runs it: a default window may shrink
            cell.budget.check_protected(recent=fitted.needs.recent, prompt_length=longest)
            if layers is not None:
                layer_budgets(fitted, cell.budget, layers, longest)
    return list(dict.fromkeys(cells))
