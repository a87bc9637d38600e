"""Inspect a run of a results folder: the method, budget and example that were chosen, or what went wrong first."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from reasonkv.budget import Budget
from reasonkv.evaluate.cells import RunConfig
from reasonkv.evaluate.chunks import TraceRow
from reasonkv.evaluate.generate import row_seed
from reasonkv.evaluate.manifest import Arguments, ResultsError
from reasonkv.evaluate.records import FullOutput, read_lines
from reasonkv.evaluate.table import read_folder_records, read_manifest
from reasonkv.evaluate.traces import encode_prompts, file_name, load_or_make_traces, vocabulary_of
from reasonkv.methods import get_method
from reasonkv.models import LoadedModel
from reasonkv.report.inspector import Inspection, Inspector, Subject
from reasonkv.tasks import Task, TaskOptions, get_task


def inspect_folder(
    folder: Path, loaded: LoadedModel, choices: Mapping[str, Any], *, generate: bool = False
) -> Inspection:
    """Inspect one run of a results folder: of the first method and budget that fit, the one that went wrong first.

    Args:
        folder: made by replay or evaluate.
        loaded: the model that made it.
        choices: task, example, method, tokens and grade; None is no choice.
        generate: let the compressed run write its own answer, as it does in a folder of evaluate.

    Raises:
        ResultsError: the folder holds no results or none that fit, was made with other weights, or names code that is
            not among the choices.
        RecordError: a record is damaged.
    """
    manifest, records = read_manifest(folder), read_folder_records(folder)
    arguments = Arguments.of(manifest["arguments"])
    if loaded.hash != manifest["model"]["hash"]:
        raise ResultsError(f"{folder} was made with other weights of {manifest['model']['name']}; give --model.")
    wanted = {"task": choices.get("task"), "example": choices.get("example")}
    if choices.get("method"):
        method = get_method(choices["method"])
        wanted |= {"method": method.name, "options": method.options()}
    fitting = [
        one
        for one in records
        if one.budget is not None
        and choices.get("tokens") in (None, one.budget["tokens"])
        and all(value in (None, getattr(one, name)) for name, value in wanted.items())
    ]
    if not fitting:
        raise ResultsError(
            f"{folder} holds no bounded run with these choices; leave --method, --budget, --task or --example out."
        )
    cell = [(one.method, one.options, one.budget, one.task) for one in fitting]
    record = min((one for one, own in zip(fitting, cell, strict=True) if own == cell[0]), key=_how_soon_wrong)
    spec = ",".join(f"{key}={value}" for key, value in record.options.items())
    assert record.budget is not None  # only bounded runs fit
    inspector = Inspector(loaded, RunConfig(get_method(f"{record.method}:{spec}"), Budget.from_dict(record.budget)))
    options = arguments.options
    _refuse_code(record.task, options, choices)
    task = get_task(record.task, options).for_tokenizer(loaded.tokenizer)
    row_of = row_seed(record.example, getattr(record, "sample", 0))
    subject = Subject.of_task(task, record.task, record.example, record.seed, row_of, options.think_end)
    answers = hasattr(record, "correct")
    row = (_full_output if answers else _trace)(folder, arguments, loaded, record, task, options)
    if not answers and not generate:
        return inspector.replay(row, subject)
    return inspector.generation(row, subject, sampling=arguments.sampling, max_new_tokens=arguments.max_new_tokens)


def _refuse_code(task: str, options: TaskOptions, choices: Mapping[str, Any]) -> None:
    """Raise where a folder, which may be a stranger's, names Python code or a file that may name some."""
    if task.endswith((".yaml", ".yml")) and choices.get("task") != task:
        raise ResultsError(f"The problems are those of the file {task}; give --task {task} if you trust it.")
    if ".py:" in (options.grade or "") and choices.get("grade") != options.grade:
        raise ResultsError(f"The grader is code, {options.grade}; give --grade {options.grade} to run it.")


def _how_soon_wrong(record: Any) -> tuple[bool, bool, int]:
    at = record.first_divergence if hasattr(record, "correct") else record.first_mismatch
    return getattr(record, "correct", False), at is None, at or 0


def _trace(
    folder: Path, arguments: Arguments, loaded: LoadedModel, record: Any, task: Task, options: TaskOptions
) -> TraceRow:
    """Return the trace of a replay's record, from the folder."""
    (trace,) = load_or_make_traces(
        loaded.model, loaded.tokenizer, task, task_spec=record.task, examples=[record.example], seed=record.seed,
        settings=arguments.traces, folder=folder, batch_size=1, options=options,
    )  # fmt: skip
    return trace.row


def _full_output(
    folder: Path, arguments: Arguments, loaded: LoadedModel, record: Any, task: Task, options: TaskOptions
) -> TraceRow:
    """Return full KV's answer to an answer record's problem, from the folder."""
    written = read_lines(folder / f"outputs-{file_name(record.task)}.jsonl", FullOutput)
    tokens = next((one.tokens for one in written if (one.example, one.sample) == (record.example, record.sample)), None)
    if tokens is None:
        raise ResultsError(f"{folder} lacks full KV's output of example {record.example}; run its command again.")
    problem = task.problem(record.example, seed=record.seed)
    (prompt_P,) = encode_prompts(loaded.model, loaded.tokenizer, task, [problem], options)
    if max(tokens) >= vocabulary_of(loaded.model):
        raise ResultsError(f"{folder} has an output of example {record.example} with tokens that the model has not.")
    return TraceRow(prompt_P, torch.tensor(tokens))
