"""Reference traces: what full KV wrote, and how sure it was of every token, computed once and kept with the results.

The traces are decoded through our cache with nothing dropped; their log-probabilities come from a
teacher-forced pass of the stock cache over them, so the opinion that methods are measured by is the model's own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from reasonkv.errors import ReasonKVError
from reasonkv.evaluate.decoding import Request, decode_batch
from reasonkv.evaluate.generate import Sampling, context_length, encode, end_tokens
from reasonkv.evaluate.manifest import ResultsError
from reasonkv.evaluate.metrics import Reference
from reasonkv.evaluate.pieces import Row, feed
from reasonkv.files import write_atomically
from reasonkv.runtimes.transformers import CompressedCache
from reasonkv.tasks import Problem, Task
from reasonkv.tasks.base import END_THINK

WHOLE_VOCABULARY = 256
"""Vocabularies up to this size are stored whole."""
TOP_K = 64
"""Tokens stored per position of larger vocabularies."""


class TraceError(ReasonKVError, ValueError):
    """Traces that cannot be made from this task and model."""


@dataclass(frozen=True)
class TraceSettings:
    """How traces are made; part of what a results folder belongs to.

    Args:
        source: "greedy" or "sampled" generation by full KV, or the task's own "reference" text.
        max_new_tokens: most output tokens.
        temperature: of sampling.
        top_p: of sampling.
    """

    source: Literal["greedy", "sampled", "reference"] = "greedy"
    max_new_tokens: int = 2048
    temperature: float = 0.6
    top_p: float = 0.95

    def sampling(self) -> Sampling | None:
        """How `generate_rows` should sample, or None for greedy."""
        return Sampling(self.temperature, self.top_p) if self.source == "sampled" else None


@dataclass(frozen=True)
class Trace:
    """One prompt with its output (end-of-sequence token included if it was reached).

    Args:
        example: number of the problem.
        prompt_P: int64 token ids.
        output_T: int64 token ids.
        reference: full KV's opinion at the T positions that predict `output_T`.
        correct: whether the task's checker accepts the output.
        answer_at: index in `output_T` of the first token after the last `</think>`, or None if there is none.
    """

    example: int
    prompt_P: Tensor
    output_T: Tensor
    reference: Reference
    correct: bool
    answer_at: int | None = None


def trace_path(folder: Path, task: str) -> Path:
    """Where a task's traces lie."""
    return folder / f"traces-{file_name(task)}.safetensors"


def file_name(task: str) -> str:
    """A task's name and dials as part of a file's name: everything but letters and digits becomes a dash."""
    return re.sub(r"[^A-Za-z0-9]+", "-", task).strip("-")


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
) -> list[Trace]:
    """A task's traces, from `folder` where they are and made where they are not; one file per finished batch.

    Args:
        model: the full-KV model, with its stock attention.
        tokenizer: its tokenizer.
        task: where problems come from.
        task_spec: the task as the user wrote it.
        examples: numbers of the problems, in the order wanted.
        seed: of the problems and of sampling.
        settings: how traces are made.
        folder: the results folder; `traces-<task>.safetensors` and `.json` are written there.
        batch_size: rows generated at once.
        on_done: called with a number of traces whenever that many are there.

    Raises:
        TraceError: a prompt that leaves no room for output.
        ResultsError: the folder's traces are damaged or belong to other settings.
    """
    path = trace_path(folder, task_spec)
    origin: dict[str, Any] = {"task": task_spec, "seed": seed, "settings": asdict(settings)}
    found = _read_all(path, origin)
    on_done(len(found.keys() & set(examples)))
    missing = [example for example in examples if example not in found]
    for number in range(0, len(missing), batch_size):
        batch = [task.problem(example, seed=seed) for example in missing[number : number + batch_size]]
        traces = _make(model, tokenizer, task, batch, seed, settings)
        _write(_part(path, batch[0].example), traces, origin)
        found.update({trace.example: trace for trace in traces})
        on_done(len(traces))
    if missing or _parts(path):
        _write(path, [found[example] for example in sorted(found)], origin)
        for part in _parts(path):
            part.unlink()
            part.with_suffix(".json").unlink(missing_ok=True)
    return [replace(found[one], answer_at=answer_start(tokenizer, found[one].output_T)) for one in examples]


def answer_start(tokenizer: PreTrainedTokenizerBase, output_T: Tensor) -> int | None:
    """Index of the first token after the last `</think>` of int64 `output_T`; None if nothing follows one."""
    mark_M = encode(tokenizer, END_THINK)
    if len(mark_M) == 0 or len(output_T) <= len(mark_M):
        return None
    ends = (output_T.unfold(0, len(mark_M), 1) == mark_M).all(-1).nonzero()
    start = int(ends[-1]) + len(mark_M) if len(ends) else len(output_T)
    return start if start < len(output_T) else None


def _make(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    problems: Sequence[Problem],
    seed: int,
    settings: TraceSettings,
) -> list[Trace]:
    prompts = encode_prompts(model, tokenizer, task, problems)
    limit, longest = context_length(model), max(len(prompt) for prompt in prompts)
    room = settings.max_new_tokens if limit is None else min(settings.max_new_tokens, limit - longest)
    if settings.source == "reference":
        tail = torch.tensor(end_tokens(model)[:1], dtype=torch.long)
        outputs = [torch.cat([encode(tokenizer, problem.trace), tail])[:room] for problem in problems]
    else:
        requests = [Request(prompt, room, problem.example) for prompt, problem in zip(prompts, problems, strict=True)]
        # with nothing dropped it writes what the stock cache writes, several times faster in large batches
        with CompressedCache(model, "full", prompt_lengths=[len(prompt) for prompt in prompts]) as cache:
            written = decode_batch(model, cache, requests, sampling=settings.sampling(), seed=seed)
        outputs = [torch.tensor(one.tokens) for one in written]
    references = reference_logprobs(model, prompts, outputs)
    traces = []
    for problem, prompt, output, reference in zip(problems, prompts, outputs, references, strict=True):
        text = tokenizer.decode(output, skip_special_tokens=True)
        traces.append(Trace(problem.example, prompt, output, reference, task.check(problem, str(text))))
    return traces


def encode_prompts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, problems: Sequence[Problem]
) -> list[Tensor]:
    """Prompts as int64 ids [P], each with room for at least one output token.

    Raises:
        TraceError: a prompt without tokens, or one that fills the model's context.
    """
    prompts = [encode(tokenizer, problem.prompt) for problem in problems]
    limit = context_length(model)
    longest = max(len(prompt) for prompt in prompts)
    if min(len(prompt) for prompt in prompts) == 0:
        raise TraceError(
            f"The tokenizer turns a prompt of {task.name} into no tokens; give a model with its own tokenizer."
        )
    if limit is not None and longest >= limit:
        raise TraceError(
            f"A prompt of {task.name} has {longest} tokens, but the model's context is {limit}; "
            f"choose easier dials for the task or another model."
        )
    return prompts


def reference_logprobs(model: PreTrainedModel, prompts: Sequence[Tensor], outputs: Sequence[Tensor]) -> list[Reference]:
    """Full KV's log-probabilities at every position that predicts an output token, with the stock cache.

    Returns:
        One reference of T positions per row.
    """
    vocabulary = int(model.config.get_text_config().vocab_size)
    k = vocabulary if vocabulary <= WHOLE_VOCABULARY else TOP_K
    rows = [Row(prompt, output) for prompt, output in zip(prompts, outputs, strict=True)]
    pieces: list[list[Reference]] = [[] for _ in rows]
    cache = DynamicCache(config=model.config)
    for scored in feed(model, cache, rows):
        pieces[scored.row].append(Reference.from_logits(scored.logits_NV, k).to(torch.device("cpu")))
    return [_concatenate(parts) for parts in pieces]


def _concatenate(parts: Sequence[Reference]) -> Reference:
    ids = [part.ids_Nk for part in parts if part.ids_Nk is not None]
    return Reference(
        torch.cat(ids) if ids else None,
        torch.cat([part.logprobs_Nk for part in parts]),
        torch.cat([part.rest_N for part in parts]),
    )


def _part(path: Path, first: int) -> Path:
    return path.with_name(f"{path.stem}.part{first:06d}.safetensors")


def _parts(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{path.stem}.part*.safetensors"))


def _write(path: Path, traces: Sequence[Trace], origin: dict[str, Any]) -> None:
    tensors: dict[str, Tensor] = {}
    for trace in traces:
        name = str(trace.example)
        tensors[f"{name}.prompt"] = trace.prompt_P.to(torch.int32)
        tensors[f"{name}.output"] = trace.output_T.to(torch.int32)
        tensors[f"{name}.logprobs"] = trace.reference.logprobs_Nk.contiguous()
        tensors[f"{name}.rest"] = trace.reference.rest_N.contiguous()
        if trace.reference.ids_Nk is not None:
            tensors[f"{name}.ids"] = trace.reference.ids_Nk.to(torch.int32).contiguous()
    write_atomically(path, save(tensors))
    summary = {
        **origin,
        "traces": [
            {
                "example": trace.example,
                "prompt_tokens": len(trace.prompt_P),
                "output_tokens": len(trace.output_T),
                "correct": trace.correct,
            }
            for trace in traces
        ],
    }
    write_atomically(path.with_suffix(".json"), (json.dumps(summary, indent=1) + "\n").encode())


def _read_all(path: Path, origin: dict[str, Any]) -> dict[int, Trace]:
    found: dict[int, Trace] = {}
    for one in [path, *_parts(path)]:
        # the JSON file is written last, so a tensor file without one was cut short by a kill
        if one.exists() and one.with_suffix(".json").exists():
            found.update({trace.example: trace for trace in _read(one, origin)})
    return found


def _read(path: Path, origin: dict[str, Any]) -> Iterator[Trace]:
    try:
        summary = json.loads(path.with_suffix(".json").read_text())
        if any(summary[name] != value for name, value in origin.items()):
            raise ResultsError(f"{path} holds traces made with other settings; choose another --out folder.")
        with safe_open(path, "pt") as file:
            names = set(file.keys())
            for row in summary["traces"]:
                name = row["example"]
                ids = file.get_tensor(f"{name}.ids").long() if f"{name}.ids" in names else None
                reference = Reference(ids, file.get_tensor(f"{name}.logprobs"), file.get_tensor(f"{name}.rest"))
                yield Trace(
                    name,
                    file.get_tensor(f"{name}.prompt").long(),
                    file.get_tensor(f"{name}.output").long(),
                    reference,
                    bool(row["correct"]),
                )
    except (OSError, SafetensorError, KeyError, TypeError, json.JSONDecodeError):
        raise ResultsError(f"{path} is damaged; delete it to have its traces made again.") from None
