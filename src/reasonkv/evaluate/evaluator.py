"""The evaluation run: problems x methods x budgets answered by real generation, continued where a kill stopped it."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from reasonkv.budget import Budget
from reasonkv.errors import ReasonKVError
from reasonkv.evaluate.answers import AnswerRecord, answer_key, read_answers
from reasonkv.evaluate.decoding import Generated, Request, decode_batch
from reasonkv.evaluate.generate import Sampling, context_length, row_seed
from reasonkv.evaluate.manifest import Manifest, open_results
from reasonkv.evaluate.outputs import Output, Outputs
from reasonkv.evaluate.records import RECORDS, append_records, repair
from reasonkv.evaluate.replay import Cell
from reasonkv.evaluate.runner import Progress, plan_cells, silent
from reasonkv.evaluate.text import first_divergence, repetition
from reasonkv.evaluate.traces import encode_prompts
from reasonkv.methods import Method, get_method
from reasonkv.methods.base import refuse_future
from reasonkv.models import LoadedModel, one_thread_if_small
from reasonkv.runtimes.transformers import CompressedCache
from reasonkv.runtimes.transformers.support import compressed_layers
from reasonkv.tasks import Problem, Task, get_task

FULL_LIMIT = 2048
"""Most tokens full KV writes unless a limit is given."""
LONGER, MORE = 1.25, 32
"""A method may write this many times full KV's longest output of the task, and this many tokens more."""


class EvaluateError(ReasonKVError, ValueError):
    """An evaluation that makes no sense; the message is one sentence."""


@dataclass(frozen=True)
class EvaluateJob:
    """Everything that decides the answers of a run.

    Args:
        tasks: task specs.
        methods: methods; each bounded one meets every budget. Full KV is the yardstick: it runs first in any case.
        budgets: budgets.
        limit: examples 0 to limit - 1 of each task.
        seed: of problems, sampling and methods.
        samples: answers per example; more than one needs `sampling`.
        sampling: temperature and nucleus, or None for greedy.
        max_new_tokens: most tokens of an answer; None gives full KV 2,048 and the others 1.25 times full KV's longest
            output of the task and 32 more. The model's context bounds both.
        batch_size: rows at once; changes nothing but rounding.
        command: the command it is recorded as.
        mean_slots: mean physical lengths to reach instead: for each task and each of these, the tokens of the one
            budget given are solved from the schedule and the lengths of full KV's outputs.

    Raises:
        EvaluateError: fields that contradict each other.
        MethodError: a method that works in replay only.
    """

    tasks: Sequence[str]
    methods: Sequence[Method]
    budgets: Sequence[Budget]
    limit: int
    seed: int = 0
    samples: int = 1
    sampling: Sampling | None = None
    max_new_tokens: int | None = None
    batch_size: int = 16
    command: str = "evaluate"
    mean_slots: Sequence[float] = ()

    def __post_init__(self) -> None:
        if self.sampling is None and self.samples > 1:
            raise EvaluateError(
                f"Greedy decoding writes {self.samples} equal samples; give --temperature 0.6, or --samples 1."
            )
        for name in ("limit", "samples", "batch_size"):
            if getattr(self, name) < 1:
                raise EvaluateError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if any(method.bounded for method in self.methods) and not self.budgets:
            raise EvaluateError("A bounded method needs a budget; give --budgets or --mean-slots.")
        for method in self.methods:
            refuse_future(method)

    @property
    def all_methods(self) -> list[Method]:
        """The methods in the order they run: full KV, then the others as given, each once."""
        others = [method for method in self.methods if method.bounded]
        return list(dict.fromkeys([get_method("full"), *others]))

    def cells(self, outputs: Sequence[Output] | None = None, layers: int = 1) -> list[Cell]:
        """Full KV once, then every bounded method at every budget, each once.

        Args:
            outputs: full KV's, of one task, for what only they can tell: whether prompts fit, and the tokens of
                `mean_slots`.
            layers: compressed layers of the model, for methods whose layers have budgets of their own.

        Raises:
            BudgetError: a prompt or a method's own window does not fit a budget, or a mean cannot be reached.
        """
        rows = None
        if outputs is not None:
            rows = [(one.prompt_tokens, one.prompt_tokens + len(one.tokens) - 1) for one in outputs]
        return plan_cells(self.all_methods, self.budgets, self.mean_slots, rows, layers)

    @property
    def steps(self) -> int:
        """How often `run_evaluate` reports something as finished, at most: every cell, for each task."""
        budgets = len(self.mean_slots or self.budgets)
        return len(self.tasks) * (1 + budgets * (len(self.all_methods) - 1))

    def manifest(self, model: LoadedModel) -> Manifest:
        """What the results folder will say about this run."""
        arguments = {
            "dtype": model.dtype,
            "task": list(self.tasks),
            "methods": [method.spec() for method in self.all_methods],
            "budgets": [budget.to_dict() for budget in self.budgets],
            "mean_slots": list(self.mean_slots),
            "limit": self.limit,
            "seed": self.seed,
            "samples": self.samples,
            "sampling": asdict(self.sampling) if self.sampling else None,
            "max_new_tokens": self.max_new_tokens,
            **model.calibration_argument(self.all_methods),
        }
        return Manifest(self.command, arguments, {"name": model.name, "hash": model.hash}, model.device_name)


def run_evaluate(job: EvaluateJob, model: LoadedModel, folder: Path, progress: Progress = silent) -> list[AnswerRecord]:
    """Run a job into a results folder, or finish one that was stopped.

    Returns:
        Every record of the folder.

    Raises:
        BudgetError, MethodError, TaskError, TraceError: arguments that cannot be carried out.
        ResultsError, RecordError: the folder belongs to something else, or is damaged.
        DecodingError: numbers that cannot be trusted.
    """
    job.cells()  # what is wrong with the arguments alone is said before any work
    tasks = {spec: get_task(spec) for spec in job.tasks}
    manifest = job.manifest(model)
    with open_results(folder, manifest), one_thread_if_small(model.model):
        path = folder / RECORDS
        repair(path)
        done = {record.key for record in read_answers(path)}
        for spec, task in tasks.items():
            run = _TaskRun(job, model, spec, task, manifest.run, path, done, progress)
            run.answer()
        return read_answers(path)


@dataclass(frozen=True)
class _Item:
    """One answer to write: the problem, its prompt's ids, and the sample's number."""

    problem: Problem
    prompt_P: Tensor
    sample: int

    @property
    def name(self) -> tuple[int, int]:
        return self.problem.example, self.sample


class _TaskRun:
    """One task of a run: full KV first, then the other cells, whose limits and comparisons follow from it."""

    def __init__(
        self,
        job: EvaluateJob,
        model: LoadedModel,
        spec: str,
        task: Task,
        run: str,
        path: Path,
        done: set[str],
        progress: Progress,
    ) -> None:
        self.job, self.model, self.spec, self.task, self.run = job, model, spec, task, run
        self.path, self.done, self.progress = path, done, progress
        self.outputs = Outputs(path.parent, spec)
        problems = [task.problem(example, seed=job.seed) for example in range(job.limit)]
        prompts = encode_prompts(model.model, model.tokenizer, task, problems)
        self.items = [
            _Item(problem, prompt_P, sample)
            for problem, prompt_P in zip(problems, prompts, strict=True)
            for sample in range(job.samples)
        ]

    def answer(self) -> None:
        """Write every record of the task that is not there yet."""
        self._run_cell(Cell(get_method("full"), None), self.job.max_new_tokens or FULL_LIMIT)
        outputs = [self.outputs[item.name] for item in self.items]
        longest = max(len(one.tokens) for one in outputs)
        limit = self.job.max_new_tokens or math.ceil(LONGER * longest) + MORE
        for cell in self.job.cells(outputs, compressed_layers(self.model.model.config)):
            if cell.budget is not None:
                self._run_cell(cell, limit)

    def _run_cell(self, cell: Cell, limit: int) -> None:
        """Answer what is missing of one cell.

        A batch that was stopped half-way is generated again whole and its missing records written, so that no record
        depends, even in its last bit, on where a run was stopped.
        """
        what, finished = f"{self.spec}: {cell.label}", 0
        for batch in self._batches():
            if not all(self._is_done(cell, item) for item in batch):
                began = time.perf_counter()
                answers = self._generate(cell, batch, limit)
                seconds = (time.perf_counter() - began) / len(batch)
                if cell.budget is None:  # before the records, so that a record never lacks its output
                    self.outputs.add(
                        Output(*item.name, len(item.prompt_P), one.tokens)
                        for item, one in zip(batch, answers, strict=True)
                    )
                records = [self._record(cell, item, one, seconds) for item, one in zip(batch, answers, strict=True)]
                records = [record for record in records if record.key not in self.done]
                append_records(self.path, records)
                self.done.update(record.key for record in records)
            finished += len(batch)
            self.progress(what, finished, len(self.items))

    def _batches(self) -> list[list[_Item]]:
        """Prompts of similar length together, since they are padded to the longest; the same every time."""
        ordered = sorted(self.items, key=lambda item: (len(item.prompt_P), item.name))
        size = self.job.batch_size
        return [ordered[at : at + size] for at in range(0, len(ordered), size)]

    def _generate(self, cell: Cell, batch: Sequence[_Item], limit: int) -> list[Generated]:
        model = self.model.model
        requests = [
            Request(item.prompt_P, self._room(len(item.prompt_P), limit), row_seed(*item.name)) for item in batch
        ]
        longest = max(len(item.prompt_P) for item in self.items)
        with CompressedCache(
            model,
            self.model.method_for(cell.method),
            cell.budget,
            prompt_lengths=[len(one.prompt_P) for one in requests],
            seed=self.job.seed,
            row_seeds=[one.row_seed for one in requests],
            max_length=longest + self._room(longest, limit),  # the task's, so that no byte count depends on a batch
            calibration=self.model.calibration_for(cell.method),
        ) as cache:
            return decode_batch(model, cache, requests, sampling=self.job.sampling, seed=self.job.seed)

    def _room(self, prompt: int, limit: int) -> int:
        context = context_length(self.model.model)
        return limit if context is None else min(limit, context - prompt)

    def _is_done(self, cell: Cell, item: _Item) -> bool:
        return self._key(cell, item) in self.done and (cell.budget is not None or item.name in self.outputs)

    def _key(self, cell: Cell, item: _Item) -> str:
        budget = cell.budget.to_dict() if cell.budget else None
        return answer_key(cell.method.name, cell.method.options(), budget, self.spec, *item.name, self.job.seed)

    def _record(self, cell: Cell, item: _Item, answer: Generated, seconds: float) -> AnswerRecord:
        stats = answer.stats
        text = str(self.model.tokenizer.decode(answer.tokens, skip_special_tokens=True))
        example, sample = item.name
        return AnswerRecord(
            run=self.run,
            method=cell.method.name,
            options=cell.method.options(),
            budget=cell.budget.to_dict() if cell.budget else None,
            task=self.spec,
            example=example,
            sample=sample,
            seed=self.job.seed,
            prompt_tokens=len(item.prompt_P),
            output_tokens=len(answer.tokens),
            correct=bool(self.task.check(item.problem, text)),
            truncated=answer.truncated,
            repetition=repetition(answer.tokens),
            first_divergence=first_divergence(answer.tokens, self.outputs[item.name].tokens),
            output=text,
            physical_mean=float(stats.physical_mean),
            physical_peak=float(stats.physical_peak),
            physical_terminal=float(stats.physical_terminal),
            saved_ratio_terminal=1 - stats.physical_terminal / stats.length,
            bytes_held=int(stats.bytes_held),
            bytes_peak=int(stats.bytes_peak),
            bytes_full=int(stats.bytes_full),
            events=stats.events,
            tokens_dropped=stats.tokens_dropped,
            guards=dict(stats.fallbacks),
            seconds=round(seconds, 4),
            slots_read_mean=stats.slots_read_mean,
            bytes_read_mean=stats.bytes_read_mean,
        )
