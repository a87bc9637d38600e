"""What to run: frozen dataclasses that Python, a configuration file and the command line fill alike.

Nothing here imports torch. A job holds specs (`"snapkv:window=16"`) and numbers; `reasonkv.evaluate.cells` turns them
into methods and budgets, and `reasonkv.evaluate.run` carries them out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from reasonkv.budget import CutPrompt, PromptPolicy, Trigger, TriggerCounts
from reasonkv.evaluate.settings import JobError, Sampling, TraceSettings, check_choice, check_least
from reasonkv.numbers import layer_shares
from reasonkv.tasks.options import TaskOptions

__all__ = [
    "BudgetOptions", "GenerateJob", "Job", "JobError", "MethodLike", "Metric", "ReplayJob", "Sampling", "TraceSettings",
    "TuneJob", "split_specs",
]  # fmt: skip

Metric = Literal["top1", "nll", "kl", "accuracy"]

RULE = ("interval", "sinks", "recent", "prompt", "trigger", "trigger_counts", "cut_prompt", "prefill_chunk", "stagger",
        "layer_shares")  # fmt: skip
"""Fields of a budget that say when compactions run and what they protect; the others are its size."""
MOST_ANSWERS = 10**6
"""Most problems of a task, and most samples of a problem: their list is made before anything runs."""
DEFAULT_METHODS = ("full", "random", "streaming", "snapkv", "rkv", "keydiff")


class MethodLike(Protocol):
    """A method object, such as `SnapKV(window=16)`."""

    def spec(self) -> str:
        """Return the method as `name:key=value,key=value`."""
        ...


@dataclass(frozen=True, kw_only=True)
class BudgetOptions:
    """The budgets that every bounded method meets, and the rule they share.

    Sizes come from exactly one of `tokens`, `keep`, `mean_slots` and `window` (a window may also have `mean_slots`).
    The other fields are those of `reasonkv.Budget`.

    Args:
        tokens: Slots per KV head and layer after a compaction, one budget for each number.
        keep: Shares of the logical length that stay at a compaction instead, one budget for each, between 0 and 1.
        mean_slots: Mean slots attended per output token instead; the tokens (or the window's retention) are solved
            for each task.
        window: Compress every window of so many decoded tokens once instead, as Kara does; prompt and newest tokens
            stay, and the rule below does not apply.
        window_buffer: Newest tokens that a window never compresses.
        retention: Shares of a window's slots that stay, one budget for each.
        interval: Tokens between two compactions.
        sinks: First tokens that are never evicted; the default shrinks where the budget is small.
        recent: Newest tokens that are never evicted; the default shrinks where the budget is small.
        prompt: count - the prompt is inside the budget and may be evicted; keep - inside and never evicted; on_top -
            never evicted and not counted.
        trigger: occupancy - compact at budget + interval slots; grid - compact at multiples of the interval.
        trigger_counts: Slots that the grid trigger counts: all, or those beyond the prompt's length (decode).
        cut_prompt: When a prompt longer than the budget is cut: after the prefill, or at the first_event of decoding.
        prefill_chunk: Also cut inside the prompt, every so many tokens.
        stagger: Turns in which layers (when serving, requests) are compacted, spread over the interval; 1: all at once.
        layer_shares: Shares of the layers in the slots that are not protected, relative to each other, as in
            0.5/1.5; calibrated takes those of the model's calibration.
    """

    tokens: Sequence[int] = ()
    keep: Sequence[float] = ()
    mean_slots: Sequence[int] = ()
    window: int | None = None
    window_buffer: int = 64
    retention: Sequence[float] = (0.3,)
    interval: int = 128
    sinks: int = 4
    recent: int = 64
    prompt: PromptPolicy = "on_top"
    trigger: Trigger = "occupancy"
    trigger_counts: TriggerCounts = "all"
    cut_prompt: CutPrompt = "prefill"
    prefill_chunk: int | None = None
    stagger: int = 1
    layer_shares: str = ""

    def __post_init__(self) -> None:
        for name in ("tokens", "keep", "mean_slots", "retention"):
            object.__setattr__(self, name, tuple(dict.fromkeys(getattr(self, name))))
        given = [name for name in ("tokens", "keep", "mean_slots") if getattr(self, name)]
        given += ["window"] * (self.window is not None and not self.mean_slots)
        if len(given) > 1:
            raise JobError(f"Give one of {' and '.join(given)}, not both; each says how many slots stay.")
        if layer_shares(self.layer_shares) and self.window is not None:
            raise JobError("layer_shares divides a budget of tokens among layers, which a window has none of.")
        if self.window is not None and not self.retention:
            raise JobError("A window needs at least one retention, as in 0.3.")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every job has: problems, methods and budgets.

    Args:
        task: Tasks, with dials: program, recall:distance=900.
        methods: Methods, with options: full, snapkv, rkv:KEY=VALUE.
        budget: The budgets that bounded methods meet.
        limit: Problems per task: examples 0 to limit - 1.
        seed: Seed of problems, sampling and methods.
        batch_size: Sequences at once; changes nothing but rounding.
        options: How tasks from data become prompts and how outputs are graded.

    Raises:
        JobError: fields that contradict each other or are out of range.
    """

    task: Sequence[str]
    methods: Sequence[str | MethodLike] = DEFAULT_METHODS
    budget: BudgetOptions = field(default_factory=BudgetOptions)
    limit: int = 16
    seed: int = 0
    batch_size: int = 16
    options: TaskOptions = field(default_factory=TaskOptions)

    def __post_init__(self) -> None:
        for name in ("task", "methods"):
            object.__setattr__(self, name, split_specs(getattr(self, name)))
            if not getattr(self, name):
                raise JobError(f"{name} names nothing; give at least one.")
        check_least("limit", self.limit, MOST_ANSWERS)
        check_least("batch_size", self.batch_size, MOST_ANSWERS)


@dataclass(frozen=True, kw_only=True)
class ReplayJob(Job):
    """Feed full KV's traces through bounded caches and score every token (teacher forcing).

    Args:
        task: Tasks, with dials: program, recall:distance=900. None where the traces come from a file.
        traces: How traces are made.
        diagnostics: Also measure what was lost, against full KV's attention over the trace; takes about twice as long.

    Raises:
        JobError: fields that contradict each other or are out of range.
    """

    task: Sequence[str] = ()
    traces: TraceSettings = field(default_factory=TraceSettings)
    diagnostics: bool = False

    def __post_init__(self) -> None:
        if self.traces.is_file:
            own = f"traces:{self.traces.source}"
            if self.task and tuple(self.task) != (own,):
                raise JobError("Traces from a file bring their own prompts; leave the task out.")
            object.__setattr__(self, "task", (own,))
        elif not self.task:
            raise JobError("A replay needs a task, as in program, or traces from a file.")
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class GenerateJob(Job):
    """Answer problems by generating through bounded caches, and count the right answers; full KV always answers first.

    Args:
        samples: Answers per problem; more than one needs a temperature.
        sampling: How tokens are drawn.
        max_new_tokens: Most tokens of an answer. Unless given, the task's own limit or 2,048 for full KV, and for the
            others 1.25 times its longest output of the task and 32 more. The model's context bounds both.
        endpoint: URL of a server with the OpenAI API that answers instead of a model of this process. One that
            `reasonkv serve` started answers twice: with full KV, and with its own method and budget.
        concurrency: Requests that an endpoint gets at once.

    Raises:
        JobError: fields that contradict each other or are out of range.
    """

    samples: int = 1
    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int | None = None
    endpoint: str | None = None
    concurrency: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least("samples", self.samples, MOST_ANSWERS)
        check_least("concurrency", self.concurrency, MOST_ANSWERS)
        if self.max_new_tokens is not None:
            check_least("max_new_tokens", self.max_new_tokens)
        if self.samples > 1 and self.samples * self.limit > MOST_ANSWERS:
            raise JobError(
                f"{self.limit:,} problems with {self.samples:,} samples are more than {MOST_ANSWERS:,} answers."
            )
        if self.samples > 1 and not self.sampling.draws:
            raise JobError(
                f"Greedy decoding writes {self.samples} equal samples; give a temperature above 0, or samples=1."
            )


@dataclass(frozen=True, kw_only=True)
class TuneJob(Job):
    """Find the smallest budget with which each method keeps a target, by bisection over real runs.

    Args:
        budget: The rule of the budgets; without sizes, since those are searched (of a window, its retention).
        metric: top1, nll or kl of a replay, or accuracy of generated answers.
        target: What has to be kept: 0.95 is absolute, 0.95x relative to full KV. Unless given, kl 0.05, top1 0.99,
            nll 1.05x, accuracy 0.95x.
        resolution: Stop when the bracket of budgets is this narrow, as a ratio above 1.
        max_new_tokens: Most output tokens, as in a replay or a generation.

    Raises:
        JobError: fields that contradict each other or are out of range.
    """

    metric: Metric = "top1"
    target: str | None = None
    resolution: float = 1.1
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("metric", self.metric, ("top1", "nll", "kl", "accuracy"))
        if self.max_new_tokens is not None:
            check_least("max_new_tokens", self.max_new_tokens)
        if not 1 < self.resolution < float("inf"):
            raise JobError(f"resolution is a ratio of budgets above 1, as in 1.1, not {self.resolution:g}.")
        if self.budget.tokens or self.budget.keep or self.budget.mean_slots:
            raise JobError("A search finds the budget itself; leave tokens, keep and mean_slots out.")


def split_specs(specs: str | Sequence[str | MethodLike]) -> tuple[str | MethodLike, ...]:
    """Return every spec once, with `"a,b:key=1,other=2"` split into `a` and `b:key=1,other=2`.

    A part `key=value` belongs to the spec before it. Method objects pass through.
    """
    found: list[str | MethodLike] = []
    for entry in [specs] if isinstance(specs, str) else specs:
        if not isinstance(entry, str):
            found.append(entry)
            continue
        own: list[str] = []
        for part in filter(None, (part.strip() for part in entry.split(","))):
            key, equals, _ = part.partition("=")
            if own and equals and ":" not in key:
                own[-1] += "," + part
            else:
                own.append(part)
        found += own
    return tuple(dict.fromkeys(found))
