"""The trace inspector: a trace's text with the fate of every token in a compressed cache, as data and as a page.

Two kinds. A *replay* feeds the cache full KV's own trace, so every token can be compared with what full KV would have
said. A *generation* is what the compressed run wrote by itself, beside full KV's trace, up to the answer.

Legend: G layers, H KV heads, E events, N tokens (prompt and output), P of them prompt, T of them output.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reasonkv.evaluate.cells import RunConfig
from reasonkv.evaluate.chunks import feed
from reasonkv.evaluate.decoding import Request, decode_batch
from reasonkv.evaluate.fates import EventPlan, PlanRecorder, fates
from reasonkv.evaluate.generate import room, row_seed
from reasonkv.evaluate.job import Sampling
from reasonkv.evaluate.manifest import ResultsError
from reasonkv.evaluate.metrics import TeacherLogprobs
from reasonkv.evaluate.reference import FullAttention
from reasonkv.evaluate.text import first_divergence
from reasonkv.evaluate.traces import Trace, reference_logprobs
from reasonkv.files import write_atomically
from reasonkv.methods import refuse_future
from reasonkv.models import LoadedModel, one_thread_if_small
from reasonkv.report.html import INSPECTOR_SCRIPTS, INSPECTOR_STYLES, render
from reasonkv.report.packing import packed_attention, packed_fates, piece, token_pieces
from reasonkv.report.wording import size_words
from reasonkv.runtimes.transformers import CompressedCache, RowStats
from reasonkv.tasks import TaskOptions, get_task

FORMAT = 1
FOLDER = "inspections"
"""Where a results folder keeps its inspections."""


@dataclass(frozen=True)
class Inspection:
    """An inspection's JSON-ready data, and the plans its fates were computed from."""

    data: dict[str, Any]
    plans: list[EventPlan]


@dataclass(frozen=True)
class _Scores:
    """What a cell said at every output position: float32 NLL of the shown token, int64 most likely token."""

    nll_T: Tensor
    top_T: Tensor
    stats: RowStats


def inspect_replay(
    model: LoadedModel,
    trace: Trace,
    config: RunConfig,
    *,
    task: str,
    seed: int = 0,
    options: TaskOptions | None = None,
) -> Inspection:
    """Feed full KV's trace through a cell and tell what became of every token.

    Args:
        model: the model that wrote the trace.
        trace: full KV's trace.
        cell: method and budget.
        task: the trace's task, with its dials.
        seed: of the problem, and of methods that draw random numbers.
        options: of the task.

    Raises:
        BudgetError, UnsupportedModelError, TaskError: the cell or task cannot be carried out.
    """
    recorder = PlanRecorder()
    with one_thread_if_small(model.model):
        attention = FullAttention.collect(model.model, [trace.row])
        scores = _score(model, trace, config, attention, trace.example, seed, recorder)
        data = inspection_data(
            model, trace, config, scores, recorder.plans, attention,
            kind="replay", task=task, seed=seed, options=options,
        )  # fmt: skip
    return Inspection(data, recorder.plans)


def inspect_generation(
    model: LoadedModel,
    trace: Trace,
    config: RunConfig,
    *,
    task: str,
    seed: int = 0,
    sample: int = 0,
    sampling: Sampling | None = None,
    max_new_tokens: int | None = None,
    options: TaskOptions | None = None,
) -> Inspection:
    """Let a cell write its own answer and tell what became of every token of it, beside full KV's trace.

    Args:
        model: the model that wrote the trace.
        trace: full KV's trace of the same prompt.
        cell: method and budget.
        task: the trace's task, with its dials.
        seed: of the problem, of sampling, and of methods that draw random numbers.
        sample: number of the sample.
        sampling: None for greedy.
        max_new_tokens: most tokens to write; None: 1.25 times full KV's output and 32 more.

    Raises:
        MethodError: a method that needs to know the future.
        BudgetError, UnsupportedModelError, TaskError, DecodingError: the cell or task cannot be carried out.
    """
    refuse_future(config.method)
    recorder, prompt = PlanRecorder(), len(trace.prompt_P)
    most = room(model.model, prompt, max_new_tokens or math.ceil(1.25 * len(trace.output_T)) + 32)
    row = row_seed(trace.example, sample)
    with one_thread_if_small(model.model):
        with _cache(model, config, prompt, prompt + most, row, seed, observer=recorder) as cache:
            request = Request(trace.prompt_P, most, row)
            (wrote,) = decode_batch(model.model, cache, [request], sampling=sampling, seed=seed)
        output_T = torch.tensor(wrote.tokens)
        text = str(model.tokenizer.decode(output_T, skip_special_tokens=True))
        asked = get_task(task, options).for_tokenizer(model.tokenizer)
        right = asked.check(asked.problem(trace.example, seed=seed), text)
        (teacher,) = reference_logprobs(model.model, [trace.prompt_P], [output_T])
        own = Trace(trace.example, trace.prompt_P, output_T, teacher, right)
        attention = FullAttention.collect(model.model, [own.row])
        scores = _score(model, own, config, attention, row, seed, None)
        data = inspection_data(
            model, own, config, scores, recorder.plans, attention,
            kind="generation", task=task, seed=seed, full=trace, truncated=wrote.truncated, options=options,
        )  # fmt: skip
    return Inspection(data, recorder.plans)


def inspection_data(
    model: LoadedModel,
    shown: Trace,
    config: RunConfig,
    scores: _Scores,
    plans: Sequence[EventPlan],
    attention: FullAttention,
    *,
    kind: str,
    task: str,
    seed: int,
    full: Trace | None = None,
    truncated: bool = False,
    options: TaskOptions | None = None,
) -> dict[str, Any]:
    """Everything the page needs, JSON-ready; arrays are base64 of little-endian integers.

    Args:
        model: whose tokens they are.
        shown: the trace whose tokens have fates, with full KV's opinion of them.
        cell: method and budget.
        scores: the cell's opinion of the same tokens.
        plans: as carried out on these tokens.
        attention: full KV's attention over these tokens (row 0).
        kind: "replay" or "generation".
        task: with its dials.
        seed: of the problem.
        full: full KV's trace, where it is not the one that is shown.
        truncated: the shown output met a limit on its length.
    """
    ids = torch.cat([shown.prompt_P, shown.output_T])
    found = fates(plans, len(ids), layers=attention.layers)
    edges = [0, *found.lengths_E, len(ids) - 1]
    received = torch.stack([attention.received_by_event(layer, 0, edges) for layer in attention.layers]).cpu()
    heads = received.shape[2]
    tokenizer = model.tokenizer
    problem = get_task(task, options).for_tokenizer(tokenizer).problem(shown.example, seed=seed)
    best_T, told_T = shown.teacher.best_N(), _logprob_of(shown.teacher, shown.output_T)
    mismatch = _first(scores.top_T != best_T)
    trace = full or shown
    texts = {name: str(tokenizer.decode(one.output_T, skip_special_tokens=True)) for name, one in
             {"full": trace, "shown": shown}.items()}  # fmt: skip
    return {
        "format": FORMAT,
        "kind": kind,
        "model": model.name,
        "method": config.method.spec(),
        "budget": config.budget.to_dict() if config.budget else None,
        "task": task,
        "example": shown.example,
        "seed": seed,
        "prompt": len(shown.prompt_P),
        "pieces": token_pieces(tokenizer, ids),
        "layers": attention.layers,
        "heads": heads,
        "events": {"length": found.lengths_E, "before": found.before_E, "after": found.after_E},
        "fates": packed_fates(found, heads),
        "protected": _protected(config),
        "attention": packed_attention(received.transpose(1, 2)),
        "scores": {
            "nll": _rounded(scores.nll_T),
            "full_nll": _rounded(-told_T),
            "top": [piece(tokenizer, None, token) for token in scores.top_T.tolist()],
            "full_top": [piece(tokenizer, None, token) for token in best_T.tolist()],
            "differs": (scores.top_T != best_T).nonzero()[:, 0].tolist(),
        },
        "first_mismatch": mismatch,
        "first_divergence": None if full is None else first_divergence(shown.output_T.tolist(), full.output_T.tolist()),
        "full_pieces": None if full is None else token_pieces(tokenizer, full.output_T),
        "expected": problem.answer,
        "answer": {"full": _answer(texts["full"], trace.correct)}
        | ({} if full is None else {"shown": _answer(texts["shown"], shown.correct) | {"truncated": truncated}}),
        "stats": {
            "mean": round(scores.stats.physical_mean, 1),
            "peak": scores.stats.physical_peak,
            "held": scores.stats.physical_terminal,
            "agreement": round(float((scores.top_T == best_T).double().mean()), 5),
            "nll": round(float(scores.nll_T.double().mean()), 5),
        },
    }


def save_inspection(folder: Path, data: dict[str, Any]) -> Path:
    """Write `folder/inspections/NAME.json`, whole or not at all."""
    tokens = "full" if data["budget"] is None else data["budget"]["tokens"]
    name = f"{data['kind']}-{data['task']}-{data['method']}-{tokens}-{data['example']}"
    path = folder / FOLDER / f"{re.sub(r'[^A-Za-z0-9]+', '-', name).strip('-')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(data, separators=(",", ":"), allow_nan=False) + "\n").encode())
    return path


def load_inspections(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the inspections a results folder holds, by file name.

    Raises:
        ResultsError: one of them is damaged.
    """
    found = {}
    for path in sorted((folder / FOLDER).glob("*.json")):
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            data = None
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ResultsError(f"{path} is not an inspection this version can read; delete it and make it again.")
        found[path.stem] = data
    return found


def inspector_page(data: dict[str, Any]) -> str:
    """The inspector alone, as one self-contained HTML page."""
    slots = "" if data["budget"] is None else f" at {size_words(data['budget'])}"
    title = f"{data['method']}{slots} on {data['task']}, example {data['example']}"
    return render(
        "inspector.html.j2", styles=INSPECTOR_STYLES, scripts=INSPECTOR_SCRIPTS, data={"inspection": data},
        title=f"{title} - reasonkv", heading=title,
    )  # fmt: skip


def _cache(
    model: LoadedModel, config: RunConfig, prompt: int, longest: int, row: int, seed: int, **options: Any
) -> CompressedCache:
    return CompressedCache(
        model.model, config.method.for_tokenizer(model.tokenizer), config.budget,
        prompt_lengths=[prompt], seed=seed, row_seeds=[row], max_length=longest,
        calibration=model.calibration_file, **options,
    )  # fmt: skip


def _score(
    model: LoadedModel,
    trace: Trace,
    config: RunConfig,
    attention: FullAttention,
    row: int,
    seed: int,
    observer: PlanRecorder | None,
) -> _Scores:
    """Feed a trace through a cell in pieces that end at its events, as replay does."""
    rows = [trace.row]
    future = attention if config.method.needs.future else None
    nll, top = [], []
    with _cache(
        model, config, len(trace.prompt_P), rows[0].fed, row, seed, observer=observer, reference=future
    ) as cache:
        for scored in feed(model.model, cache, rows, distances=cache.tokens_to_next_event):
            logprobs_NV = scored.logits_NV.float().log_softmax(-1)
            tokens_N = trace.output_T[scored.start : scored.start + len(logprobs_NV)].to(logprobs_NV.device)
            nll.append(-logprobs_NV.gather(1, tokens_N[:, None])[:, 0].cpu())
            top.append(logprobs_NV.argmax(-1).cpu())
        stats = cache.stats().rows[0]
    return _Scores(torch.cat(nll), torch.cat(top), stats)


def _logprob_of(teacher: TeacherLogprobs, tokens_T: Tensor) -> Tensor:
    """float32 [T], full KV's log-probability of tokens; that of all others together where a token is not stored."""
    if teacher.ids_Nk is None:
        return teacher.logprobs_Nk.gather(1, tokens_T[:, None])[:, 0]
    is_it_Tk = teacher.ids_Nk == tokens_T[:, None]
    stored_T = teacher.logprobs_Nk.masked_fill(~is_it_Tk, -torch.inf).amax(-1)
    return torch.where(is_it_Tk.any(-1), stored_T, teacher.rest_N)


def _protected(config: RunConfig) -> dict[str, Any]:
    if config.budget is None:
        return {"sinks": 0, "recent": 0, "prompt": False}
    recent = max(config.budget.recent, config.method.needs.recent)
    return {"sinks": config.budget.sinks, "recent": recent, "prompt": config.budget.prompt != "count"}


def _answer(text: str, correct: bool) -> dict[str, Any]:
    """The end of an output, from its last `</think>` where there is one."""
    head, mark, tail = text.rpartition("</think>")
    return {"text": (tail if mark else head + tail)[-400:].strip(), "closed": bool(mark), "correct": correct}


def _rounded(values_T: Tensor) -> list[float]:
    return [round(min(value, 99.0), 3) for value in values_T.double().abs().tolist()]


def _first(flags_T: Tensor) -> int | None:
    where = flags_T.nonzero()
    return int(where[0]) if len(where) else None
