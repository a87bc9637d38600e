"""Reference traces: what full KV wrote, and how sure it was of every token, computed once and kept with the results.

The traces are decoded through our cache with nothing evicted; their log-probabilities come from a teacher-forced pass
of the stock cache over them, so the distribution that methods are measured by is the model's own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reasonkv.errors import ReasonKVError
from reasonkv.evaluate.chunks import TraceRow, feed
from reasonkv.evaluate.decoding import OnTokens, Request, TextRules, write_full
from reasonkv.evaluate.generate import encode, encode_given, end_tokens, render, room
from reasonkv.evaluate.manifest import ResultsError
from reasonkv.evaluate.metrics import TeacherLogprobs
from reasonkv.evaluate.settings import TraceSettings
from reasonkv.files import write_atomically
from reasonkv.inputs import Count, read_json
from reasonkv.resolve import context_length
from reasonkv.runtimes.transformers.lightning import stock_cache
from reasonkv.tasks import Problem, Task, TaskOptions
from reasonkv.tasks.given import GivenTraces
from reasonkv.tasks.options import THINK_END

WHOLE_VOCABULARY = 256
"""Vocabularies up to this size are stored whole."""
TOP_K = 64
"""Tokens stored per position of larger vocabularies."""


class TraceError(ReasonKVError, ValueError):
    """Traces that cannot be made from this task and model."""


@dataclass(frozen=True)
class Trace:
    """One prompt with its output (end-of-sequence token included if it was reached)."""

    example: int
    prompt_P: Tensor  # int64 token ids
    output_T: Tensor  # likewise
    teacher: TeacherLogprobs  # full KV's log-probabilities at the T positions that predict `output_T`
    correct: bool | None  # whether the task's checker accepts the output; None where there is nothing to check it by
    # index in `output_T` of the first token after the last `</think>`, or None if there is none
    answer_at: int | None = None

    @property
    def row(self) -> TraceRow:
        """What is fed."""
        return TraceRow(self.prompt_P, self.output_T)


def file_name(task: str) -> str:
    """Return a task's name and dials as part of a file's name: a dash for everything but letters and digits.

    Only the end of a long path is used, since file systems allow 255 characters.
    """
    return re.sub(r"[^A-Za-z0-9]+", "-", task).strip("-")[-150:]


def load_or_make_traces(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    *,
    task_spec: str,
    examples: Sequence[int],
    seed: int,
    settings: TraceSettings,
    folder: Path,
    batch_size: int,
    on_done: Callable[[int], None] = lambda count: None,
    on_tokens: OnTokens = lambda count: None,
    options: TaskOptions | None = None,
) -> list[Trace]:
    """Return a task's traces, from `folder` where they are and made where they are not.

    Args:
        task_spec: the task as the user wrote it.
        folder: the results folder; `traces-<task>.safetensors` and `.json` are written there after every batch.
        on_done: called with the number of traces that are there.

    Raises:
        TraceError: a prompt that leaves no room for output.
        ResultsError: the folder's traces are damaged or belong to other settings.
    """
    path = folder / f"traces-{file_name(task_spec)}.safetensors"
    origin: dict[str, Any] = {"task": task_spec, "seed": seed, "settings": settings.to_dict()}
    found = _read(path, origin, vocabulary_of(model))
    maker = _Maker(model, tokenizer, task, seed, settings, options or TaskOptions(), on_tokens)
    on_done(len(found.keys() & set(examples)))
    missing = [example for example in examples if example not in found]
    for first in range(0, len(missing), batch_size):
        batch = [task.problem(example, seed=seed) for example in missing[first : first + batch_size]]
        made = maker.make(batch)
        found |= {trace.example: trace for trace in made}
        _write(path, [found[example] for example in sorted(found)], origin)
        on_done(len(found.keys() & set(examples)))
    end = options.think_end if options else THINK_END
    return [replace(found[one], answer_at=answer_start(tokenizer, found[one].output_T, end)) for one in examples]


def answer_start(tokenizer: PreTrainedTokenizerBase, output_T: Tensor, think_end: str = THINK_END) -> int | None:
    """Return the index of the first token of `output_T` after thinking ended last; None if nothing follows it."""
    mark_M = encode(tokenizer, think_end)
    if len(mark_M) == 0 or len(output_T) <= len(mark_M):
        return None
    ends = (output_T.unfold(0, len(mark_M), 1) == mark_M).all(-1).nonzero()
    start = int(ends[-1]) + len(mark_M) if len(ends) else len(output_T)
    return start if start < len(output_T) else None


def encode_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    problems: Sequence[Problem],
    options: TaskOptions | None = None,
) -> list[Tensor]:
    """Return prompts as int64 ids [P], each with room for at least one output token.

    Raises:
        TraceError: a prompt without tokens, or one that fills the model's context.
    """
    asked = task.prompt_options(options or TaskOptions())
    rendered = [render(tokenizer, problem.prompt, asked, from_data=task.chat) for problem in problems]
    prompts = [encode(tokenizer, text, special=special) for text, special in rendered]
    _check_prompts(model, task, prompts)
    return prompts


def _check_prompts(model: PreTrainedModel, task: Task, prompts: Sequence[Tensor]) -> None:
    limit, lengths = context_length(model), [len(prompt) for prompt in prompts]
    if min(lengths) == 0:
        raise TraceError(
            f"The tokenizer turns a prompt of {task.name} into no tokens; give a model with its own tokenizer."
        )
    if limit is not None and max(lengths) >= limit:
        raise TraceError(
            f"A prompt of {task.name} has {max(lengths)} tokens, but the model's context is {limit}; "
            f"choose easier dials for the task or another model."
        )


def reference_logprobs(
    model: PreTrainedModel, prompts: Sequence[Tensor], outputs: Sequence[Tensor]
) -> list[TeacherLogprobs]:
    """Return, for each row, full KV's log-probabilities at the T positions that predict its output (stock cache)."""
    vocabulary = vocabulary_of(model)
    k = vocabulary if vocabulary <= WHOLE_VOCABULARY else TOP_K
    rows = [TraceRow(prompt, output) for prompt, output in zip(prompts, outputs, strict=True)]
    chunks: list[list[TeacherLogprobs]] = [[] for _ in rows]
    for scored in feed(model, stock_cache(model.config), rows):
        chunks[scored.row].append(TeacherLogprobs.from_logits(scored.logits_NV, k))
    return [TeacherLogprobs.joined(own) for own in chunks]


def vocabulary_of(model: PreTrainedModel) -> int:
    """Return how many logits the model gives for a position."""
    return int(model.config.get_text_config().vocab_size)


@dataclass(frozen=True)
class _Maker:
    """Makes the traces of a task."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task: Task
    seed: int
    settings: TraceSettings
    options: TaskOptions
    on_tokens: OnTokens

    def make(self, problems: Sequence[Problem]) -> list[Trace]:
        prompts, outputs = self.given(problems) if isinstance(self.task, GivenTraces) else self.written(problems)
        teachers = reference_logprobs(self.model, prompts, outputs)
        traces = []
        for problem, prompt, output, teacher in zip(problems, prompts, outputs, teachers, strict=True):
            text = str(self.tokenizer.decode(output, skip_special_tokens=True))
            correct = None if isinstance(self.task, GivenTraces) else self.task.check(problem, text)
            traces.append(Trace(problem.example, prompt, output, teacher, correct))
        return traces

    def given(self, problems: Sequence[Problem]) -> tuple[list[Tensor], list[Tensor]]:
        """Return prompts and outputs of a file."""
        assert isinstance(self.task, GivenTraces)
        own = [self.task.traces[problem.example] for problem in problems]
        pairs = [encode_given(self.tokenizer, one, self.options) for one in own]
        prompts, known = [prompt_P for prompt_P, _ in pairs], vocabulary_of(self.model)
        _check_prompts(self.model, self.task, prompts)
        for problem, pair in zip(problems, pairs, strict=True):
            if len(pair[1]) == 0 or max(int(one.max()) for one in pair) >= known:
                name = self.task.name
                raise TraceError(
                    f"Trace {problem.example} of {name} has no output, or token ids beyond the model's {known:,}."
                )
        return prompts, [output_T[: room(self.model, len(prompt_P), len(output_T))] for prompt_P, output_T in pairs]

    def written(self, problems: Sequence[Problem]) -> tuple[list[Tensor], list[Tensor]]:
        """Return prompts, and what full KV writes, or the task's reference text."""
        model, tokenizer, task = self.model, self.tokenizer, self.task
        prompts = encode_prompts(model, tokenizer, task, problems, self.options)
        most = room(model, max(len(prompt) for prompt in prompts), self.settings.max_new_tokens)
        if self.settings.source == "reference":
            if task.chat:
                raise TraceError(f"The task {task.name} has no reference traces; use traces=greedy or sampled.")
            tail = torch.tensor(end_tokens(model)[:1], dtype=torch.long)
            return prompts, [torch.cat([encode(tokenizer, problem.trace), tail])[:most] for problem in problems]
        requests = [Request(prompt, most, problem.example) for prompt, problem in zip(prompts, problems, strict=True)]
        sampling = self.settings.sampling.stopping(task.stop)
        rules = TextRules(tokenizer, sampling, self.options.think_end)
        found = write_full(model, requests, sampling=sampling, seed=self.seed, rules=rules, on_tokens=self.on_tokens)
        return prompts, [torch.tensor(one.tokens) for one in found]


def _write(path: Path, traces: Sequence[Trace], origin: dict[str, Any]) -> None:
    tensors: dict[str, Tensor] = {}
    for trace in traces:
        own = {"prompt": trace.prompt_P.int(), "output": trace.output_T.int()}
        own |= {"logprobs": trace.teacher.logprobs_Nk, "rest": trace.teacher.rest_N}
        if trace.teacher.ids_Nk is not None:
            own["ids"] = trace.teacher.ids_Nk.int()
        tensors |= {f"{trace.example}.{name}": tensor.contiguous() for name, tensor in own.items()}
    summary = [
        {"example": trace.example, "prompt_tokens": len(trace.prompt_P), "output_tokens": len(trace.output_T),
         "correct": trace.correct}
        for trace in traces
    ]  # fmt: skip
    write_atomically(path, save(tensors))
    # written last, and only what it lists is read: a kill between the two leaves the traces of the batch before
    text = json.dumps({**origin, "traces": summary}, indent=1) + "\n"
    write_atomically(path.with_suffix(".json"), text.encode())


class _Facts(BaseModel):
    """What the list of traces says of one."""

    example: Count
    correct: bool | None


class _Listed(BaseModel):
    """The list of traces beside their tensors."""

    task: str
    seed: int
    settings: dict[str, Any]
    traces: list[_Facts]


def _read(path: Path, origin: dict[str, Any], vocabulary: int) -> dict[int, Trace]:
    listed = path.with_suffix(".json")
    if not listed.exists():
        return {}
    advice = "delete it to have its traces made again"
    summary = read_json(listed, _Listed, "a list of traces", ResultsError, advice)
    if any(getattr(summary, name) != value for name, value in origin.items()):
        raise ResultsError(f"{path} holds traces made with other settings; choose another --out folder.")
    try:
        tensors = load_file(path)
        return {one.example: _trace(tensors, one, vocabulary) for one in summary.traces}
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ResultsError(f"{path} is damaged ({' '.join(str(error).split())[:200]}); {advice}.") from None


def _trace(tensors: Mapping[str, Tensor], facts: _Facts, vocabulary: int) -> Trace:
    """Return one trace; raises KeyError or ValueError where its tensors do not fit each other or the vocabulary."""
    names = ("prompt", "output", "logprobs", "rest", "ids")
    found = {name: tensors[f"{facts.example}.{name}"] for name in names if f"{facts.example}.{name}" in tensors}
    prompt_P, output_T, logprobs_Tk, rest_T = (found[name] for name in names[:4])
    ids_Tk, T = found.get("ids"), output_T.numel()
    k = vocabulary if ids_Tk is None else ids_Tk.shape[-1]
    tokens = [prompt_P, output_T] + ([] if ids_Tk is None else [ids_Tk])
    fits = [prompt_P.ndim == output_T.ndim == 1, prompt_P.numel() > 0, T > 0, k > 0]
    fits += [logprobs_Tk.shape == (T, k), rest_T.shape == (T,), ids_Tk is None or ids_Tk.shape == (T, k)]
    fits += [not one.is_floating_point() and not one.is_complex() for one in tokens]
    fits += [logprobs_Tk.dtype == rest_T.dtype == torch.float32]
    if not all(fits) or not all(0 <= int(one.min()) <= int(one.max()) < vocabulary for one in tokens):
        raise ValueError(f"the tensors of example {facts.example} fit neither each other nor {vocabulary} tokens")
    if logprobs_Tk.isnan().any() or rest_T.isnan().any() or max(float(logprobs_Tk.max()), float(rest_T.max())) > 1e-3:
        raise ValueError(f"example {facts.example} has log-probabilities that are none")
    teacher = TeacherLogprobs(None if ids_Tk is None else ids_Tk.long(), logprobs_Tk, rest_T)
    return Trace(facts.example, prompt_P.long(), output_T.long(), teacher, facts.correct)
