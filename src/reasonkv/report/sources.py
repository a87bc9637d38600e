"""Traces to inspect: a task's, a prompt's, a text, what a cache has seen, and those of a results folder."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reasonkv.budget import Budget
from reasonkv.errors import ReasonKVError
from reasonkv.evaluate.cells import RunConfig
from reasonkv.evaluate.chunks import TraceRow
from reasonkv.evaluate.decoding import Request, TextRules, write_full
from reasonkv.evaluate.generate import encode, end_tokens, render, room, row_seed
from reasonkv.evaluate.job import TraceSettings
from reasonkv.evaluate.manifest import Arguments, ResultsError
from reasonkv.evaluate.records import FullOutput, read_lines
from reasonkv.evaluate.table import read_folder_records, read_manifest
from reasonkv.evaluate.traces import encode_prompts, file_name, load_or_make_traces, vocabulary_of
from reasonkv.files import finite
from reasonkv.methods import get_method
from reasonkv.models import LoadedModel, one_thread_if_small
from reasonkv.report.inspector import Inspection, Inspector, Subject
from reasonkv.resolve import context_length
from reasonkv.runtimes.transformers import CompressedCache
from reasonkv.tasks import Task, TaskOptions, get_task


class InspectError(ReasonKVError, ValueError):
    """A text or an output that cannot be inspected."""


def task_trace(
    loaded: LoadedModel, spec: str, example: int, seed: int, settings: TraceSettings, options: TaskOptions
) -> tuple[TraceRow, Subject]:
    """Return full KV's trace of a task's problem, and what it is about.

    Raises:
        TaskError, TraceError: there is no such problem, or it leaves no room for output.
    """
    task = get_task(spec, options).for_tokenizer(loaded.tokenizer)
    with tempfile.TemporaryDirectory() as place, one_thread_if_small(loaded.model):
        row = _trace(loaded, task, spec, example, seed, settings, options, Path(place))
    return row, Subject.of_task(task, spec, example, seed, None, options.think_end)


def prompt_trace(
    loaded: LoadedModel, prompt: str, seed: int, settings: TraceSettings, options: TaskOptions
) -> tuple[TraceRow, Subject]:
    """Let full KV answer a prompt, in the tokenizer's chat template where it has one.

    Raises:
        TaskError: a chat is asked for and the tokenizer has no template.
        InspectError: the prompt has no tokens, or fills the model's context.
    """
    prompt_P = _encoded(loaded, *render(loaded.tokenizer, prompt, options))
    most = room(loaded.model, len(prompt_P), settings.max_new_tokens)
    if most < 1:
        raise InspectError(f"The prompt has {len(prompt_P):,} tokens and fills the model's context; shorten it.")
    sampling, request = settings.sampling, Request(prompt_P, most)
    rules = TextRules(loaded.tokenizer, sampling, options.think_end)
    with one_thread_if_small(loaded.model):
        (wrote,) = write_full(loaded.model, [request], sampling=sampling, seed=seed, rules=rules)
    return TraceRow(prompt_P, torch.tensor(wrote.tokens)), Subject("a prompt", seed=seed, think_end=options.think_end)


def text_trace(loaded: LoadedModel, file: Path, prompt: str | None, options: TaskOptions) -> tuple[TraceRow, Subject]:
    """Return the text of a file as the output to a prompt; without a prompt its first token is the prompt.

    Raises:
        InspectError: the file cannot be read, has fewer than two tokens, or does not fit the model's context.
    """
    try:
        text = finite(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InspectError(f"{file} cannot be read as text ({error}).") from None
    if prompt is None:
        ids = _encoded(loaded, text, special=True)
        row = TraceRow(ids[:1], ids[1:])
    else:
        row = TraceRow(_encoded(loaded, *render(loaded.tokenizer, prompt, options)), _encoded(loaded, text))
    limit = context_length(loaded.model)
    if len(row.output_T) == 0 or (limit is not None and row.fed > limit):
        raise InspectError(f"{file} has {row.fed + 1:,} tokens; give a text of 2 to {limit or 'any number of'} tokens.")
    return row, Subject(file.name, source="the text of the file")


def inspect_cache(
    cache: CompressedCache,
    model: PreTrainedModel,
    output: Tensor,
    tokenizer: PreTrainedTokenizerBase,
    row: int,
) -> Inspection:
    """Return an inspection of what `generate` wrote with a cache; arguments and errors as in `CompressedCache.inspect`.

    The sequence is fed again, through full KV and through a cache of the same method, budget and seeds.
    """
    output_L = output if output.ndim == 1 else output[row]
    if not cache.rows or len(output_L) < cache.columns_seen:
        raise InspectError(
            f"The cache has seen {cache.columns_seen:,} tokens and the output has {len(output_L):,}; "
            "give what generate returned with this cache, before reset()."
        )
    sequence = cache.rows[row]
    seen, prompt = sequence.state.logical, sequence.state.prompt
    ids = output_L[cache.columns_seen - seen :].cpu().long()  # without left pads
    written_T = ids[prompt:]
    ends = torch.isin(written_T, torch.tensor(end_tokens(model), dtype=torch.long)).nonzero()
    written_T = written_T[: int(ends[0]) + 1] if len(ends) else written_T
    if len(written_T) == 0:
        raise InspectError("Nothing was generated after the prompt, so there is nothing to inspect.")
    loaded = LoadedModel(str(model.config.name_or_path), model, tokenizer, "")
    inspector = Inspector(loaded, RunConfig(cache.method, cache.budget), cache.session.calibration)
    subject = Subject("generate", row, cache.session.seed, sequence.seed, source="written by the compressed run")
    return inspector.replay(TraceRow(ids[:prompt], written_T), subject)


def _encoded(loaded: LoadedModel, text: str, special: bool = False) -> Tensor:
    ids = encode(loaded.tokenizer, text, special=special)
    if len(ids) == 0:
        raise InspectError("The tokenizer turns the text into no tokens; give another one.")
    return ids


# -- results folders --------------------------------------------------------------------------------------------------


def inspect_folder(
    folder: Path, loaded: LoadedModel, choices: Mapping[str, Any], *, generate: bool = False
) -> Inspection:
    """Inspect one run of a results folder: of the first method and budget that fit, the one that went wrong first.

    Args:
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
    cells = [(one.method, one.options, one.budget, one.task) for one in fitting]
    record = min((one for one, own in zip(fitting, cells, strict=True) if own == cells[0]), key=_how_soon_wrong)
    spec = ",".join(f"{key}={value}" for key, value in record.options.items())
    assert record.budget is not None  # only bounded runs fit
    inspector = Inspector(loaded, RunConfig(get_method(f"{record.method}:{spec}"), Budget.from_dict(record.budget)))
    options = arguments.options
    _refuse_code(record.task, options, choices)
    task = get_task(record.task, options).for_tokenizer(loaded.tokenizer)
    row_of = row_seed(record.example, getattr(record, "sample", 0))
    subject = Subject.of_task(task, record.task, record.example, record.seed, row_of, options.think_end)
    if hasattr(record, "correct"):
        row = _full_output(folder, loaded, record, task, options)
    else:
        row = _trace(loaded, task, record.task, record.example, record.seed, arguments.traces, options, folder)
        if not generate:
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
    loaded: LoadedModel, task: Task, spec: str, example: int, seed: int, settings: TraceSettings, options: TaskOptions,
    folder: Path,
) -> TraceRow:  # fmt: skip
    """Return full KV's trace of a problem, from a folder where it is there."""
    (trace,) = load_or_make_traces(
        loaded.model, loaded.tokenizer, task, task_spec=spec, examples=[example], seed=seed, settings=settings,
        folder=folder, batch_size=1, options=options,
    )  # fmt: skip
    return trace.row


def _full_output(folder: Path, loaded: LoadedModel, record: Any, task: Task, options: TaskOptions) -> TraceRow:
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
