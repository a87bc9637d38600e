"""The runner: every task, method and budget of a job, in batches, continued where a kill stopped it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from reasonkv.calibration import Calibration, find_calibration
from reasonkv.evaluate.cells import RunConfig, check_job, job_arguments, make_budgets, make_methods, plan_cells
from reasonkv.evaluate.decoding import Request, TextRules, decode_rows
from reasonkv.evaluate.generate import (
    decode,
    first_divergence,
    graded,
    opens_thinking,
    repetition,
    room,
    row_seed,
    thinking_tokens,
)  # fmt: skip
from reasonkv.evaluate.job import GenerateJob, Job, ReplayJob
from reasonkv.evaluate.manifest import Manifest, Weights, open_results
from reasonkv.evaluate.merging import adopt
from reasonkv.evaluate.progress import Meter, Progress, silent
from reasonkv.evaluate.published import with_published
from reasonkv.evaluate.records import (
    RECORDS,
    AnswerItem,
    AnswerRecord,
    FullOutput,
    Measured,
    RecordFile,
    ReplayRecord,
    record_key,
)
from reasonkv.evaluate.replay import replay_batch
from reasonkv.evaluate.sharing import with_shares
from reasonkv.evaluate.traces import Trace, encode_prompts, file_name, load_or_make_traces
from reasonkv.layers import bounded_layers
from reasonkv.methods import Method, get_method
from reasonkv.models import LoadedModel, one_thread_if_small
from reasonkv.runtimes.transformers import CompressedCache, RowStats
from reasonkv.tasks import Problem, get_task
from reasonkv.tasks.given import GivenTraces

FULL_LIMIT = 2048
"""Most tokens full KV writes unless the job or the task has a limit."""
LONGER, MORE = 1.25, 32
"""A method may write this many times full KV's longest output of the task, and this many tokens more."""


def run(
    job: ReplayJob | GenerateJob,
    model: LoadedModel,
    folder: Path,
    progress: Progress = silent,
    *,
    command: str | None = None,
    sources: Sequence[Path] = (),
) -> list[ReplayRecord] | list[AnswerRecord]:
    """Run a job into a results folder, or finish one that was stopped.

    Args:
        command: the name it is recorded under; "replay" or "evaluate" unless given.
        sources: finished folders of parts of the job, whose records, traces and outputs are taken.

    Returns:
        Every record of the folder.

    Raises:
        JobError, BudgetError, MethodError, TaskError, TraceError: arguments that cannot be carried out.
        ResultsError, RecordError: the folder belongs to something else, or is damaged.
        CalibrationError: a method needs statistics of the model's queries, or a budget calibrated shares of the layers,
            and there are none.
        ReplayError, DecodingError: numbers that cannot be trusted.
    """
    check_job(job)  # what is wrong with the arguments alone is reported before any work
    job = with_shares(with_published(job, model), model)
    kind = GenerateTask if isinstance(job, GenerateJob) else ReplayTask
    needed = any(method.needs.calibration for method in make_methods(job))
    calibration = find_calibration(model.model, model.calibration_file) if needed else None
    arguments: dict[str, Any] = {"dtype": model.dtype, **job_arguments(job)}
    if calibration is not None:
        arguments["calibration"] = calibration.digest
    if model.kv_dtype is not None:
        arguments["kv_dtype"] = model.kv_dtype
    if isinstance(job, ReplayJob) and isinstance(task := get_task(job.task[0], job.options), GivenTraces):
        arguments["given"] = task.digest
    named = command or ("evaluate" if isinstance(job, GenerateJob) else "replay")
    weights = Weights(name=model.name, hash=model.hash)
    manifest = Manifest(command=named, arguments=arguments, model=weights, device=model.device_name)
    layers = len(bounded_layers(model.model.config))
    session = Session(job, model, folder, progress, manifest, calibration, layers, sources)
    with one_thread_if_small(model.model):
        return session.run(kind)


@dataclass
class Session:
    """A job that runs into a results folder; the model of a remote run is an `Endpoint`."""

    job: Job
    model: Any
    folder: Path
    progress: Progress
    manifest: Manifest
    calibration: Calibration | None = None
    layers: int = 1  # compressed layers of the model
    sources: Sequence[Path] = ()  # finished folders of parts of the job
    run_id: str = field(init=False)
    file: RecordFile[Any] = field(init=False)

    def run(self, kind: type[TaskRun]) -> list[Any]:
        """Hold the folder, run what is missing of every task, and return all records; errors as in `run`."""
        job, self.run_id = self.job, self.manifest.run
        with open_results(self.folder, self.manifest):
            self.file = RecordFile(self.folder / RECORDS, kind.kind)
            adopt(self.file, kind.kind, self.run_id, self.sources)
            methods, budgets = make_methods(job), make_budgets(job.budget)
            for spec in job.task:
                task = kind(self, spec)
                for config in plan_cells(methods, budgets, job.budget.mean_slots, task.rows, self.layers):
                    task.run(config)
            return list(self.file.records.values())


class TaskRun(ABC):
    """One task of a job: its items (traces, or answers to write) in batches, and what ran on them."""

    kind: type[Measured]
    batches: list[list[Any]]
    meter: Meter
    rows: list[tuple[int, int]] | None = None
    """Of every item, tokens of the prompt and tokens that full KV fed in all; None where budgets do not need them."""

    def __init__(self, session: Session, spec: str) -> None:
        self.session, self.spec, job = session, spec, session.job
        self.task = get_task(spec, job.options).for_tokenizer(session.model.tokenizer)
        self.examples = range(job.limit if self.task.size is None else min(job.limit, self.task.size))
        self._finished: set[RunConfig] = set()

    def in_batches(self, items: Sequence[Any]) -> list[list[Any]]:
        """Cut the items into batches, the same every time."""
        size = self.session.job.batch_size
        return [list(items[at : at + size]) for at in range(0, len(items), size)]

    def run(self, config: RunConfig) -> None:
        """Run what is missing of one configuration.

        A batch that was stopped half-way is run again whole and its missing records written, so that no record depends,
        even in its last bit, on where a run was stopped.
        """
        if config in self._finished:
            return
        self._finished.add(config)
        records, total = self.session.file.records, sum(map(len, self.batches))
        keys = [[self.key(config, item) for item in batch] for batch in self.batches]
        self.meter = Meter(self.session.progress, f"{self.spec}: {config.label}", total)
        for batch, own in zip(self.batches, keys, strict=True):
            if not all(key in records and self.is_whole(config, item) for key, item in zip(own, batch, strict=True)):
                for record in self.execute(config, batch):
                    self.session.file.append([record])
                    self._count(keys)
            self._count(keys)

    def _count(self, keys: Sequence[Sequence[str]]) -> None:
        """Show how many records are there, and how many of them are right."""
        there = [one for batch in keys for key in batch if (one := self.session.file.records.get(key)) is not None]
        scores = [one.correct if one.score is None else one.score for one in there if isinstance(one, AnswerRecord)]
        self.meter.reach(len(there), sum(scores) / len(scores) if scores else None)

    @abstractmethod
    def execute(self, config: RunConfig, batch: Sequence[Any]) -> Iterable[Any]:
        """Run one batch and yield its records, each the moment it is known."""

    def is_whole(self, config: RunConfig, item: Any) -> bool:
        """Return whether all that belongs to a record in the folder is there, too."""
        return True

    def key(self, config: RunConfig, item: Any) -> str:
        """Return the key of the record that a configuration leaves for an item."""
        fields = self.identity(config) | {"example": item.example, "sample": getattr(item, "sample", 0)}
        return record_key(*(fields[name] for name in self.kind.KEY))

    def identity(self, config: RunConfig) -> dict[str, Any]:
        """Return the fields that all records of a configuration share."""
        return {
            "run": self.session.run_id,
            "method": config.method.name,
            "options": config.method.options(),
            "budget": config.budget.to_dict() if config.budget else None,
            "task": self.spec,
            "seed": self.session.job.seed,
        }

    def runnable(self, config: RunConfig) -> tuple[Method, Calibration | None]:
        """Return the method as the model runs it, and the statistics that it needs."""
        calibration = self.session.calibration if config.method.needs.calibration else None
        return config.method.for_tokenizer(self.session.model.tokenizer), calibration


def measured(stats: RowStats, seconds: float) -> dict[str, Any]:
    """Return the fields of a record that say what a cache held."""
    saved = 1 - stats.physical_terminal / stats.length
    return vars(stats) | {"guards": stats.fallbacks, "seconds": round(seconds, 4), "saved_ratio_terminal": saved}


class ReplayTask(TaskRun):
    """The traces of one task, replayed; similar lengths stand together, since a batch runs as long as its longest."""

    kind = ReplayRecord

    def __init__(self, session: Session, spec: str) -> None:
        super().__init__(session, spec)
        self.job, model = cast(ReplayJob, session.job), session.model
        meter = Meter(session.progress, f"{spec}: full-KV traces", len(self.examples))
        traces = load_or_make_traces(
            model.model, model.tokenizer, self.task, task_spec=spec, examples=self.examples, seed=self.job.seed,
            settings=self.job.traces, folder=session.folder, batch_size=self.job.batch_size, on_done=meter.reach,
            on_tokens=meter.add, options=self.job.options,
        )  # fmt: skip
        traces.sort(key=lambda trace: (len(trace.output_T), len(trace.prompt_P), trace.example))
        self.batches = self.in_batches(traces)
        self.rows = [(len(trace.prompt_P), trace.row.fed) for trace in traces]

    def execute(self, config: RunConfig, batch: Sequence[Trace]) -> Iterator[ReplayRecord]:
        """Replay one batch."""
        method, calibration = self.runnable(config)
        outcomes = replay_batch(
            self.session.model.model, batch, RunConfig(method, config.budget), seed=self.job.seed,
            calibration=calibration, diagnostics=self.job.diagnostics, dtype=self.session.model.kv_dtype,
            on_tokens=self.meter.add,
        )  # fmt: skip
        for trace, outcome in zip(batch, outcomes, strict=True):
            yield ReplayRecord(
                **self.identity(config), **measured(outcome.stats, outcome.seconds), **vars(outcome.metrics),
                example=trace.example, prompt_tokens=len(trace.prompt_P), output_tokens=len(trace.output_T),
                trace_correct=trace.correct,
                diagnostics={name: round(measure, 6) for name, measure in outcome.diagnostics.items()},
            )  # fmt: skip


class AnswerTask(TaskRun):
    """The problems of one task, answered; full KV answers first, since limits and comparisons follow from that."""

    kind = AnswerRecord

    def __init__(self, session: Session, spec: str) -> None:
        super().__init__(session, spec)
        self.job = cast(GenerateJob, session.job)
        self.outputs = RecordFile(session.folder / f"outputs-{file_name(spec)}.jsonl", FullOutput)
        self.batches = self.make_batches([self.task.problem(one, seed=self.job.seed) for one in self.examples])
        self.limit = self.job.max_new_tokens or self.full_limit()
        self.run(RunConfig(get_method("full"), None))
        outputs = [self.outputs.records[item.output_key] for batch in self.batches for item in batch]
        self.limit = self.job.max_new_tokens or math.ceil(LONGER * max(len(one.tokens) for one in outputs)) + MORE
        self.rows = [(one.prompt_tokens, one.prompt_tokens + len(one.tokens) - 1) for one in outputs]

    @abstractmethod
    def make_batches(self, problems: Sequence[Problem]) -> list[list[Any]]:
        """Return the answers to write."""

    def full_limit(self) -> int:
        """Return the most tokens that full KV writes where the job has no limit."""
        return FULL_LIMIT

    def is_whole(self, config: RunConfig, item: AnswerItem) -> bool:
        """Return whether full KV's record has its output in the folder."""
        return config.budget is not None or item.output_key in self.outputs.records

    def answer(
        self, config: RunConfig, item: Any, prompt_tokens: int, tokens: list[int], text: str, **own: Any
    ) -> AnswerRecord:
        """Return the record of an answer; what full KV wrote is kept first, so that a record never lacks its output.

        Args:
            tokens: ids of the output.
            text: the output, which continues the thinking of its prompt where `item.opened`.
        """
        place = {"example": item.example, "sample": item.sample, "prompt_tokens": prompt_tokens}
        if config.budget is None:
            self.outputs.append([FullOutput(**place, tokens=tokens)])
        full = self.outputs.records[item.output_key].tokens
        return AnswerRecord(
            **self.identity(config), **place, repetition=repetition(tokens),
            first_divergence=first_divergence(tokens, full), **own,
            **graded(self.task, item.problem, text, item.opened),
        )  # fmt: skip


class GenerateTask(AnswerTask):
    """Answers of a model in this process. Prompts of similar length stand together, since they are padded."""

    def make_batches(self, problems: Sequence[Problem]) -> list[list[AnswerItem]]:
        """Return the answers to write, shortest prompts first."""
        model, options = self.session.model, self.job.options
        prompts = encode_prompts(model.model, model.tokenizer, self.task, problems, options)
        opened = [opens_thinking(model.tokenizer, prompt_P, options.think_end) for prompt_P in prompts]
        asked = zip(problems, prompts, opened, strict=True)
        items = [AnswerItem(*one, sample) for one in asked for sample in range(self.job.samples)]
        items.sort(key=lambda item: (len(item.prompt_P), item.example, item.sample))
        self.longest = max(len(prompt_P) for prompt_P in prompts)
        self.sampling = self.job.sampling.stopping(self.task.stop)
        return self.in_batches(items)

    def full_limit(self) -> int:
        """Return the task's own limit, if it has one."""
        return self.task.max_new_tokens or FULL_LIMIT

    def execute(self, config: RunConfig, batch: Sequence[AnswerItem]) -> Iterator[AnswerRecord]:
        """Answer one batch."""
        model, tokenizer = self.session.model.model, self.session.model.tokenizer
        job, (method, calibration) = self.job, self.runnable(config)
        requests = [
            Request(item.prompt_P, room(model, len(item.prompt_P), self.limit), row_seed(item.example, item.sample))
            for item in batch
        ]
        with CompressedCache(
            model, method, config.budget, prompt_lengths=[len(one.prompt_P) for one in requests], seed=job.seed,
            row_seeds=[one.row_seed for one in requests],
            # the task's longest, so that no byte count depends on a batch
            max_length=self.longest + room(model, self.longest, self.limit), calibration=calibration,
            dtype=self.session.model.kv_dtype if config.budget is not None else None,
        ) as cache:  # fmt: skip
            rules = TextRules(tokenizer, self.sampling, job.options.think_end)
            for number, found in decode_rows(
                model, cache, requests, sampling=self.sampling, seed=job.seed, rules=rules, on_tokens=self.meter.add
            ):
                item, tokens = batch[number], found.tokens
                yield self.answer(
                    config, item, len(item.prompt_P), tokens, decode(tokenizer, tokens, self.sampling.stop),
                    output_tokens=len(tokens), truncated=found.truncated, **measured(found.stats, found.seconds),
                    thinking_tokens=thinking_tokens(tokenizer, tokens, job.options.think_end, item.opened),
                )  # fmt: skip
