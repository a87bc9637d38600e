"""The replay run: methods x budgets x tasks x examples, in batches, continued where a kill stopped it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from reasonkv.budget import Budget, BudgetError
from reasonkv.evaluate.manifest import Manifest, open_results
from reasonkv.evaluate.matching import budget_for_mean, check_matchable
from reasonkv.evaluate.records import RECORDS, Record, append_records, read_records, record_key, repair
from reasonkv.evaluate.replay import Cell, replay_batch, to_record
from reasonkv.evaluate.traces import Trace, TraceSettings, load_or_make_traces
from reasonkv.methods import Method, layer_budgets
from reasonkv.models import LoadedModel, one_thread_if_small
from reasonkv.runtimes.transformers.support import compressed_layers
from reasonkv.tasks import get_task

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many of it are done, and how many there are."""


def silent(what: str, done: int, total: int) -> None:
    """Progress that nobody is shown."""


@dataclass(frozen=True)
class ReplayJob:
    """Everything that decides the records of a run.

    Args:
        command: the command it is recorded as.
        tasks: task specs.
        methods: methods; each bounded one meets every budget, full KV none.
        budgets: budgets.
        mean_slots: mean physical lengths to reach instead: for each task and each of these, the tokens of the one
            budget given are solved from the schedule.
        limit: examples 0 to limit - 1 of each task.
        seed: of problems, sampling and methods.
        traces: how traces are made.
        batch_size: rows at once; changes nothing but rounding.
        diagnostics: also measure what was lost (`reasonkv.evaluate.diagnostics`).
    """

    tasks: Sequence[str]
    methods: Sequence[Method]
    budgets: Sequence[Budget]
    limit: int
    seed: int = 0
    traces: TraceSettings = field(default_factory=TraceSettings)
    batch_size: int = 16
    command: str = "replay"
    mean_slots: Sequence[float] = ()
    diagnostics: bool = False

    def cells(self, traces: Sequence[Trace] | None = None, layers: int = 1) -> list[Cell]:
        """Full KV once, then every bounded method at every budget, each once.

        Args:
            traces: of one task, for what only they can tell: whether prompts fit, and the tokens of `mean_slots`.
            layers: compressed layers of the model, for methods whose layers have budgets of their own.

        Raises:
            BudgetError: a prompt or a method's own window does not fit a budget, or a mean cannot be reached.
        """
        rows = None
        if traces is not None:
            rows = [(len(one.prompt_P), len(one.prompt_P) + len(one.output_T) - 1) for one in traces]
        return plan_cells(self.methods, self.budgets, self.mean_slots, rows, layers)

    @property
    def steps(self) -> int:
        """How often `run_replay` reports something as finished, at most: traces and every cell, for each task."""
        budgets = len(self.mean_slots or self.budgets)
        return len(self.tasks) * (1 + sum(budgets if method.bounded else 1 for method in self.methods))

    def manifest(self, model: LoadedModel) -> Manifest:
        """What the results folder will say about this run."""
        arguments = {
            "dtype": model.dtype,
            "task": list(self.tasks),
            "methods": [method.spec() for method in self.methods],
            "budgets": [budget.to_dict() for budget in self.budgets],
            "mean_slots": list(self.mean_slots),
            "limit": self.limit,
            "seed": self.seed,
            "traces": asdict(self.traces),
            **({"diagnostics": True} if self.diagnostics else {}),
            **model.calibration_argument(self.methods),
        }
        return Manifest(self.command, arguments, {"name": model.name, "hash": model.hash}, model.device_name)


def plan_cells(
    methods: Sequence[Method],
    budgets: Sequence[Budget],
    mean_slots: Sequence[float] = (),
    rows: Sequence[tuple[int, int]] | None = None,
    layers: int = 1,
) -> list[Cell]:
    """Every bounded method at every budget, and full KV without one, each once, in the methods' order.

    Args:
        methods: the methods.
        budgets: the budgets; with `mean_slots`, one whose tokens are solved for each mean (and for each method that
            divides its budget among layers).
        mean_slots: mean physical lengths to reach instead of `budgets`.
        rows: (tokens of the prompt, tokens fed in all) of one task's rows, for what only they can tell: whether
            prompts fit, and the tokens of `mean_slots`. None checks what can be checked without.
        layers: compressed layers of the model.

    Raises:
        BudgetError: a prompt or a method's own window does not fit a budget, or a mean cannot be reached, or has no
            meaning for a method that selects.
    """
    if mean_slots:
        check_matchable(methods)
    solved: dict[Method | None, list[Budget]] = {}  # None: methods whose layers share one budget
    if rows is not None and mean_slots:
        decoding = [(prompt, fed) for prompt, fed in rows if fed > prompt]
        if not decoding:
            raise BudgetError(
                "--mean-slots is the mean over tokens fed after the prompt, but every output of full KV is a single "
                "token, which is never fed; give --budgets instead."
            )
        prompts, fed = zip(*decoding, strict=True)
        for method in methods:
            own = method if method.needs.layer_budgets else None
            if own not in solved:
                solved[own] = [budget_for_mean(budgets[0], mean, prompts, fed, own, layers) for mean in mean_slots]
    longest = None if rows is None else max(prompt for prompt, _ in rows)
    cells = []
    for method in methods:
        met = solved.get(method if method.needs.layer_budgets else None, budgets)
        cells += [Cell(method, budget) for budget in (met if method.bounded else [None])]
    for cell in cells:
        if cell.budget is not None and (rows is not None or not mean_slots):
            cell.budget.check_protected(recent=cell.method.needs.recent, prompt_length=longest)
            layer_budgets(cell.method, cell.budget, layers, longest)
    return list(dict.fromkeys(cells))


def run_replay(job: ReplayJob, model: LoadedModel, folder: Path, progress: Progress = silent) -> list[Record]:
    """Run a job into a results folder, or finish one that was stopped.

    Returns:
        Every record of the folder.

    Raises:
        BudgetError, MethodError, TaskError: arguments that cannot be carried out.
        ResultsError, RecordError: the folder belongs to something else, or is damaged.
        ReplayError: numbers that cannot be trusted.
    """
    job.cells()  # what is wrong with the arguments alone is said before any work
    tasks = {spec: get_task(spec) for spec in job.tasks}
    manifest = job.manifest(model)
    with open_results(folder, manifest), one_thread_if_small(model.model):
        path = folder / RECORDS
        repair(path)
        done = {record.key for record in read_records(path)}
        for spec, task in tasks.items():
            counted = 0

            def traces_done(count: int, spec: str = spec) -> None:
                nonlocal counted
                counted += count
                progress(f"{spec}: full-KV traces", counted, job.limit)

            traces = load_or_make_traces(
                model.model,
                model.tokenizer,
                task,
                task_spec=spec,
                examples=range(job.limit),
                seed=job.seed,
                settings=job.traces,
                folder=folder,
                batch_size=job.batch_size,
                on_done=traces_done,
            )
            for cell in job.cells(traces, compressed_layers(model.model.config)):
                _replay_cell(job, model, spec, cell, traces, manifest.run, path, done, progress)
        return read_records(path)


def batches(traces: Sequence[Trace], size: int) -> list[list[Trace]]:
    """Traces of similar length together, since a batch runs as long as its longest row; the same every time."""
    ordered = sorted(traces, key=lambda trace: (len(trace.output_T), len(trace.prompt_P), trace.example))
    return [ordered[at : at + size] for at in range(0, len(ordered), size)]


def _replay_cell(
    job: ReplayJob,
    model: LoadedModel,
    task: str,
    cell: Cell,
    traces: Sequence[Trace],
    run: str,
    path: Path,
    done: set[str],
    progress: Progress,
) -> None:
    """Replay what is missing of one cell.

    A batch that was stopped half-way is replayed whole and its missing records written, so that no record depends,
    even in its last bit, on where a run was stopped.
    """

    def key(trace: Trace) -> str:
        budget = cell.budget.to_dict() if cell.budget else None
        return record_key(cell.method.name, cell.method.options(), budget, task, trace.example, job.seed)

    what, finished = f"{task}: {cell.label}", 0
    for batch in batches(traces, job.batch_size):
        missing = {trace.example for trace in batch if key(trace) not in done}
        if missing:
            outcomes = replay_batch(
                model.model,
                batch,
                replace(cell, method=model.method_for(cell.method)),
                seed=job.seed,
                calibration=model.calibration_for(cell.method),
                diagnostics=job.diagnostics,
            )
            records = [
                to_record(run, task, job.seed, cell, trace, outcome)
                for trace, outcome in zip(batch, outcomes, strict=True)
                if trace.example in missing
            ]
            append_records(path, records)
            done.update(record.key for record in records)
        finished += len(batch)
        progress(what, finished, len(traces))
