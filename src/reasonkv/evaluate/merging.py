"""Results folders that share their work: full KV runs once, and the folders of many cells become one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from reasonkv.evaluate.cells import job_arguments
from reasonkv.evaluate.job import GenerateJob, ReplayJob
from reasonkv.evaluate.manifest import MANIFEST, Manifest
from reasonkv.evaluate.progress import Progress
from reasonkv.evaluate.records import RECORDS, AnswerRecord, RecordFile, ReplayRecord, read_lines
from reasonkv.files import write_atomically


def adopt(file: RecordFile[Any], kind: type[Any], run: str, sources: Sequence[Path]) -> None:
    """Take the records, traces and outputs of finished folders into a folder that is being written.

    Args:
        file: the records of that folder; those it has already stay.
        sources: results folders of the same task, model and settings, such as full KV's.

    Raises:
        RecordError: a record of a source is damaged.
    """
    for source in sources:
        _copy_beside(source, file.path.parent)
        file.append(one.model_copy(update={"run": run}) for one in read_lines(source / RECORDS, kind))


def merge(job: ReplayJob | GenerateJob, folder: Path, sources: Sequence[Path]) -> None:
    """Write the results folder of a job from the folders of its parts, as far as they are finished.

    The folder is what `run(job, ...)` leaves, so every command reads it, and `run` computes what is missing.

    Args:
        job: all tasks, methods and budgets of the parts.
        folder: written whole; what it held before is replaced.
        sources: results folders of the parts, in the order their records shall have; at least one.

    Raises:
        ResultsError, RecordError: a source is damaged.
    """
    kind = AnswerRecord if isinstance(job, GenerateJob) else ReplayRecord
    manifests = [Manifest.read(source / MANIFEST) for source in sources]
    arguments: dict[str, Any] = {}
    for one in manifests:
        arguments |= one.arguments
    budgets = [budget for one in manifests for budget in one.arguments["budgets"]]
    if shares := next((budget["layer_shares"] for budget in budgets if "layer_shares" in budget), None):
        job = replace(job, budget=replace(job.budget, layer_shares=shares))  # as they ran, not the word "calibrated"
    whole = job_arguments(job)
    arguments |= {name: whole[name] for name in ("task", "methods", "budgets", "mean_slots")}
    manifest = manifests[0].model_copy(update={"arguments": arguments})
    records: dict[str, Any] = {}
    for source in sources:
        for record in read_lines(source / RECORDS, kind):
            records.setdefault(record.key, record.model_copy(update={"run": manifest.run}))
    folder.mkdir(parents=True, exist_ok=True)
    for source in sources:
        _copy_beside(source, folder)
    write_atomically(folder / RECORDS, b"".join(one.model_dump_json().encode() + b"\n" for one in records.values()))
    manifest.write(folder / MANIFEST)


def without_full(progress: Progress) -> Progress:
    """Return a progress that is silent about full KV's part, which is taken and no news."""

    def advance(what: str, *counts: Any, **facts: Any) -> None:
        if not what.endswith((": full", ": full-KV traces")):
            progress(what, *counts, **facts)

    return advance


def _copy_beside(source: Path, folder: Path) -> None:
    """Copy traces and outputs that the folder lacks; a trace's tensors before the list that makes them count."""
    found = [*source.glob("traces-*"), *source.glob("outputs-*")]
    for path in sorted(found, key=lambda one: one.suffix == ".json"):
        if not (folder / path.name).exists():
            temporary = folder / f".{path.name}.tmp"
            shutil.copyfile(path, temporary)
            os.replace(temporary, folder / path.name)
