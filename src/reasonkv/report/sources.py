"""Traces to inspect that belong to no results folder: a task's, a prompt's, a text, and what a cache has seen."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reasonkv.errors import ReasonKVError
from reasonkv.evaluate.cells import RunConfig
from reasonkv.evaluate.chunks import TraceRow
from reasonkv.evaluate.decoding import Request, TextRules, decode_batch
from reasonkv.evaluate.generate import encode, end_tokens, render, room
from reasonkv.evaluate.job import TraceSettings
from reasonkv.evaluate.traces import load_or_make_traces
from reasonkv.models import LoadedModel, one_thread_if_small
from reasonkv.report.inspector import Inspection, Inspector, Subject
from reasonkv.resolve import context_length
from reasonkv.runtimes.transformers import CompressedCache
from reasonkv.tasks import TaskOptions, get_task


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
        (trace,) = load_or_make_traces(
            loaded.model, loaded.tokenizer, task, task_spec=spec, examples=[example], seed=seed, settings=settings,
            folder=Path(place), batch_size=1, options=options,
        )  # fmt: skip
    return trace.row, Subject.of_task(task, spec, example, seed, None, options.think_end)


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
    with (
        one_thread_if_small(loaded.model),
        CompressedCache(loaded.model, "full", prompt_lengths=[len(prompt_P)]) as cache,
    ):
        sampling, request = settings.sampling, Request(prompt_P, most)
        rules = TextRules(loaded.tokenizer, sampling, options.think_end)
        (wrote,) = decode_batch(loaded.model, cache, [request], sampling=sampling, seed=seed, rules=rules)
    return TraceRow(prompt_P, torch.tensor(wrote.tokens)), Subject("a prompt", seed=seed, think_end=options.think_end)


def text_trace(loaded: LoadedModel, file: Path, prompt: str | None, options: TaskOptions) -> tuple[TraceRow, Subject]:
    """Return the text of a file as the output to a prompt; without a prompt its first token is the prompt.

    Raises:
        InspectError: the file cannot be read, has fewer than two tokens, or does not fit the model's context.
    """
    try:
        text = file.read_text(encoding="utf-8")
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
