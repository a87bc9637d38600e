"""A plan: models x tasks x methods x budgets x seeds, each cell a results folder that resumes.

Full KV is a cell of its own for each model, task and seed; the cells of the methods take its traces or outputs. Cells
run on Ray, which places them on GPUs or groups of cores and starts one again whose worker died, or one after the other.
The folders of one job's cells are then merged into one that every command reads.
"""

from __future__ import annotations

import functools
import hashlib
import traceback
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from reasonkv.errors import ReasonKVError
from reasonkv.evaluate.cells import make_budgets, make_methods
from reasonkv.evaluate.job import BudgetOptions, GenerateJob, JobError, ReplayJob
from reasonkv.evaluate.merging import merge, without_full
from reasonkv.evaluate.progress import Progress, silent
from reasonkv.evaluate.run import run
from reasonkv.evaluate.traces import file_name
from reasonkv.files import write_atomically
from reasonkv.models import LoadedModel

DONE, FAILED = ".done", ".traceback.txt"
RETRIES = 3
"""How often Ray starts a cell again whose worker died."""
J = TypeVar("J", ReplayJob, GenerateJob)


class ModelSource(Hashable, Protocol):
    """What loads a model: hashable, and small enough to be sent to a worker."""

    @property
    def model(self) -> str:
        """The model's name."""
        ...

    def load(self) -> LoadedModel:
        """Load it."""
        ...


@dataclass(frozen=True)
class Cell:
    """One method at one budget on one task, or full KV on it."""

    source: ModelSource
    job: ReplayJob | GenerateJob  # one task, one seed, and full KV with at most one method at one budget
    folder: Path  # its results folder
    full: Path | None  # full KV's cell of the same task, which runs before
    label: str

    @property
    def words(self) -> str:
        """What it runs."""
        return f"{self.source.model}, {self.job.task[0]}, seed {self.job.seed}: {self.label}"

    @property
    def is_done(self) -> bool:
        """Whether the same cell has finished in its folder."""
        return (self.folder / DONE).is_file() and (self.folder / DONE).read_text() == self.digest

    @property
    def digest(self) -> str:
        """Identifies the model and the job; a batch's size changes nothing but rounding."""
        return hashlib.sha256(repr((self.source, replace(self.job, batch_size=1))).encode()).hexdigest()

    def run(self, model: LoadedModel, progress: Progress = silent) -> list[Any]:
        """Run the cell, or finish it; return its records. Errors are those of `reasonkv.evaluate.run.run`."""
        sources = [self.full] if self.full else []
        shown = without_full(progress) if self.full else progress
        found = run(self.job, model, self.folder, shown, sources=sources)
        write_atomically(self.folder / DONE, self.digest.encode())
        return list(found)


@dataclass(frozen=True)
class Group:
    """The cells of one job with one model and seed, and the results folder that they are merged into."""

    job: ReplayJob | GenerateJob
    folder: Path
    cells: tuple[Cell, ...]

    def merge(self) -> bool:
        """Write the group's folder from the finished cells; return whether there are any."""
        finished = [cell.folder for cell in self.cells if cell.is_done]
        if finished:
            merge(self.job, self.folder, finished)
        return bool(finished)


def make_cells(source: ModelSource, job: J, cells: Path, place: str) -> Iterator[Cell]:
    """Yield the cells of a job, of each task full KV's first.

    Args:
        cells: folder of all cells; full KV's are in `cells/full`, for all jobs to which full KV is the same, in folders
            named after the task and all settings.
        place: folder in it for the cells of this job.

    Raises:
        MethodError, BudgetError, JobError: a method or budget that does not exist.
    """
    methods = [method for method in make_methods(job) if method.bounded]
    for task in job.task:
        alone = replace(job, task=(task,), methods=("full",), budget=BudgetOptions())
        full = Cell(source, alone, cells, None, "full")
        name = f"{file_name(str(task))}-seed{job.seed}-{full.digest[:8]}"
        yield (full := replace(full, folder=cells / "full" / name))
        for method in methods:
            for size in split_sizes(job.budget):
                words = f"mean {size.mean_slots[0]}" if size.mean_slots else make_budgets(size)[0].label
                label = f"{method.spec()} @ {words}"
                own = replace(job, task=(task,), methods=("full", method.spec()), budget=size)
                yield Cell(source, own, cells / place / file_name(str(task)) / file_name(label), full.folder, label)


def make_group(name: str, source: ModelSource, job: J, seed: int, out: Path) -> Group:
    """Return one job of a plan with one model and seed.

    Raises:
        MethodError, BudgetError, JobError: a method or budget that does not exist, or a bounded method without one.
    """
    methods = dict.fromkeys(["full", *(method.spec() for method in make_methods(job))])
    job = replace(job, seed=seed, methods=tuple(methods))
    if len(methods) > 1 and not make_budgets(job.budget):
        raise JobError(f"{name} has bounded methods and no budget; give budgets, keep, mean-slots or a window.")
    place = file_name(f"{name}-{source.model}-seed{seed}")
    return Group(job, out / place, tuple(make_cells(source, job, out / "cells", place)))


def split_sizes(budget: BudgetOptions) -> list[BudgetOptions]:
    """Return one budget for each size of a budget with several; none without sizes."""
    names = ("retention",) if budget.window is not None and not budget.mean_slots else ("tokens", "keep", "mean_slots")
    axis = next((name for name in names if getattr(budget, name)), None)
    one: list[dict[str, Any]] = [] if axis is None else [{axis: (size,)} for size in getattr(budget, axis)]
    return [replace(budget, **fields) for fields in one]


@functools.lru_cache(maxsize=1)
def load_once(source: ModelSource) -> LoadedModel:
    """Return a model, loaded once for the cells that follow each other in a process."""
    return source.load()


def attempt(
    cell: Cell, failed_before: str | None = None, threads: int | None = None, progress: Progress = silent
) -> str | None:
    """Run a cell and return why it failed; None where it is done. Nothing is raised, so that other cells go on.

    Args:
        failed_before: why full KV's cell failed, if it did.
        threads: of torch, in a worker that has so many cores.
    """
    if failed_before is not None:
        return "full KV's cell of this task failed"
    try:
        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        cell.run(load_once(cell.source), progress)
    except ReasonKVError as error:
        return " ".join(str(error).split())
    except Exception as error:
        text = "".join(traceback.format_exception(error))
        cell.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(cell.folder / FAILED, text.encode())
        return f"{type(error).__name__}: {' '.join(str(error).split())} (details in {cell.folder / FAILED})"
    return None


Tell = Callable[[Cell, str | None], None]
"""Called when a cell has ended, with why it failed, or None."""


def run_in_turn(cells: Sequence[Cell], tell: Tell, progress: Progress = silent) -> None:
    """Run cells one after the other in this process; a cell that failed does not stop the others."""
    causes: dict[Path, str | None] = {}
    for cell in cells:
        cause = causes[cell.folder] = attempt(cell, causes.get(cell.full) if cell.full else None, progress=progress)
        tell(cell, cause)


def run_on_ray(cells: Sequence[Cell], tell: Tell, *, cores: int, address: str | None = None) -> None:
    """Run cells on Ray: one at a time on each GPU, or on each group of `cores` cores where there is no GPU.

    Args:
        cells: full KV's cells before those that need them.
        cores: per cell.
        address: of a running cluster whose machines share the results folder; None starts Ray on this machine.
    """
    import ray

    # nothing goes through Ray's object store but a sentence for each cell
    local: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "object_store_memory": 100_000_000}
    ray.init(address=address or "local", logging_level="ERROR", **({} if address else local))
    try:
        on_gpus = ray.cluster_resources().get("GPU", 0) >= 1
        share: dict[str, Any] = {"num_gpus": 1} if on_gpus else {"num_cpus": cores}
        task = ray.remote(max_retries=RETRIES, **share)(attempt)
        running: dict[Any, Cell] = {}
        started: dict[Path, Any] = {}
        for cell in cells:  # Ray starts a cell when full KV's has ended
            before = started.get(cell.full) if cell.full else None
            started[cell.folder] = task.remote(cell, before, None if on_gpus else cores)
            running[started[cell.folder]] = cell
        while running:
            (ended,), _ = ray.wait(list(running), num_returns=1)
            try:
                cause = ray.get(ended)
            except ray.exceptions.RayError as error:
                cause = f"its worker died: {' '.join(str(error).split())[:300]}"
            tell(running.pop(ended), cause)
    finally:
        ray.shutdown()
