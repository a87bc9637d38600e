"""The trace inspector: a trace's text with the fate of every token in a compressed cache, as data and as a page.

Two kinds. A *replay* feeds the cache a text, mostly full KV's own trace, so every token can be compared with what full
KV would have predicted. A *generation* is what the compressed run wrote by itself, beside full KV's trace.

Legend: G layers, H KV heads, E compactions, N tokens (prompt and output), P of them prompt, T of them output.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue, TypeAdapter
from torch import Tensor
from torch.nn.functional import pad

from reasonkv.calibration import Calibration
from reasonkv.evaluate.cells import RunConfig
from reasonkv.evaluate.chunks import TraceRow, feed
from reasonkv.evaluate.decoding import Request, TextRules, decode_batch
from reasonkv.evaluate.fates import EventPlan, PlanRecorder, fates, save_plans
from reasonkv.evaluate.generate import first_divergence, room
from reasonkv.evaluate.job import Sampling
from reasonkv.evaluate.manifest import ResultsError
from reasonkv.evaluate.metrics import TeacherLogprobs
from reasonkv.evaluate.reference import FullAttention
from reasonkv.evaluate.traces import file_name, reference_logprobs
from reasonkv.files import write_atomically
from reasonkv.inputs import read_json
from reasonkv.methods import refuse_future
from reasonkv.models import LoadedModel, one_thread_if_small
from reasonkv.report.html import INSPECTOR_SCRIPTS, INSPECTOR_STYLES, render
from reasonkv.report.packing import packed_attention, packed_fates, piece, token_pieces
from reasonkv.report.wording import plural, size_words
from reasonkv.runtimes.transformers import CompressedCache
from reasonkv.tasks import Task
from reasonkv.tasks.given import GivenTraces
from reasonkv.tasks.options import THINK_END

FORMAT = 1
FOLDER = "inspections"
"""Where a results folder keeps its inspections."""
_SAVED = TypeAdapter(dict[str, JsonValue])


@dataclass(frozen=True)
class Inspection:
    """An inspection's JSON-ready data, and the plans its fates were computed from.

    The last expression of a notebook's cell shows it (`_repr_html_`); `page` is the same as a file.
    """

    data: dict[str, Any]
    plans: list[EventPlan]

    def __repr__(self) -> str:
        return f"<Inspection: {title_of(self.data)}, {plural(len(self.data['pieces']), 'token')}>"

    def _repr_html_(self) -> str:
        page = escape(inspector_page(self.data), quote=True)
        return f'<iframe srcdoc="{page}" title="Trace inspector" style="width:100%;height:52rem;border:0"></iframe>'

    def save(self, folder: Path) -> Path:
        """Write data and plans into `folder/inspections`; return the path of the data."""
        path = save_inspection(folder, self.data)
        save_plans(path.with_suffix(".plans.safetensors"), self.plans)
        return path


@dataclass(frozen=True)
class Subject:
    """What a trace is about."""

    task: str  # name of the task with its dials, or of the text
    example: int = 0  # number of the problem, or of the line
    seed: int = 0
    row_seed: int | None = None  # a further one of the sequence; the example unless given
    expected: str | None = None  # the right answer; None where there is none
    check: Callable[[str], bool] | None = None  # returns whether an output is right; None where nobody knows
    source: str = "full KV's trace"  # who wrote the output, for the page
    think_end: str = THINK_END  # text that ends thinking

    @staticmethod
    def of_task(
        task: Task, spec: str, example: int, seed: int = 0, row_seed: int | None = None, think_end: str = THINK_END
    ) -> Subject:
        """Return a problem of a task (`get_task(...).for_tokenizer(...)`); `spec` is the task as the user wrote it."""
        problem = task.problem(example, seed=seed)
        if isinstance(task, GivenTraces):
            return Subject(Path(task.name).name, example, seed, row_seed, source="the output of the file")
        check = lambda output: task.check(problem, output)  # noqa: E731
        return Subject(spec, example, seed, row_seed, problem.answer, check, think_end=think_end)


@dataclass(frozen=True)
class Inspector:
    """A method at a budget on a model, ready to inspect sequences."""

    model: LoadedModel
    config: RunConfig
    calibration: Calibration | None = None  # statistics of the model's queries; looked up beside the model unless given

    def replay(self, row: TraceRow, subject: Subject) -> Inspection:
        """Feed a trace through the cache and return what became of every token.

        Raises:
            BudgetError, UnsupportedModelError, CalibrationError: the method cannot run on this trace.
        """
        with one_thread_if_small(self.model.model):
            recorder = PlanRecorder()
            data = self._data(row, subject, recorder)
            answer = self._answer(row.output_T, subject) if subject.check else None
            return Inspection(data | {"kind": "replay", "answer": {"full": answer}}, recorder.plans)

    def generation(
        self, full: TraceRow, subject: Subject, *, sampling: Sampling | None = None, max_new_tokens: int | None = None
    ) -> Inspection:
        """Let the cache write its own answer and return what became of every token of it, beside full KV's trace.

        Args:
            sampling: None for greedy.
            max_new_tokens: most tokens to write; None: 1.25 times full KV's output and 32 more.

        Raises:
            MethodError: a method that needs to know the future.
            BudgetError, UnsupportedModelError, CalibrationError, DecodingError: the method cannot run on this prompt.
        """
        refuse_future(self.config.method)
        most = max_new_tokens or math.ceil(1.25 * len(full.output_T)) + 32
        prompt_P, recorder = full.prompt_P, PlanRecorder()
        most = room(self.model.model, len(prompt_P), most)
        with one_thread_if_small(self.model.model):
            with self._cache(len(prompt_P), len(prompt_P) + most, subject, recorder) as cache:
                request = Request(prompt_P, most, _row_seed(subject))
                rules = TextRules(self.model.tokenizer, sampling or Sampling(), subject.think_end)
                (wrote,) = decode_batch(
                    self.model.model, cache, [request], sampling=sampling, seed=subject.seed, rules=rules
                )
            shown = TraceRow(prompt_P, torch.tensor(wrote.tokens))
            data = self._data(shown, subject, None, recorder.plans)
        part = first_divergence(shown.output_T.tolist(), full.output_T.tolist())
        return Inspection(data | {
            "kind": "generation", "source": "written by the compressed run", "first_divergence": part,
            "full_pieces": token_pieces(self.model.tokenizer, full.output_T),
            "answer": {"full": self._answer(full.output_T, subject),
                       "shown": self._answer(shown.output_T, subject) | {"truncated": wrote.truncated}},
        }, recorder.plans)  # fmt: skip

    def _cache(self, prompt: int, longest: int, subject: Subject, observer: Any, **options: Any) -> CompressedCache:
        method, budget = self.config.method.for_tokenizer(self.model.tokenizer), self.config.budget
        return CompressedCache(
            self.model.model, method, budget, prompt_lengths=[prompt], seed=subject.seed,
            row_seeds=[_row_seed(subject)], max_length=longest, observer=observer,
            calibration=self.calibration or self.model.calibration_file, dtype=self.model.kv_dtype, **options,
        )  # fmt: skip

    def _answer(self, output_T: Tensor, subject: Subject) -> dict[str, Any]:
        """The end of an output, from where thinking ended last, and whether it is right, if known."""
        text = str(self.model.tokenizer.decode(output_T, skip_special_tokens=True))
        head, mark, tail = text.rpartition(subject.think_end)
        correct = None if subject.check is None else subject.check(text)
        return {"text": (tail if mark else head + tail)[-400:].strip(), "closed": bool(mark), "correct": correct}

    def _data(
        self, row: TraceRow, subject: Subject, recorder: PlanRecorder | None, plans: list[EventPlan] | None = None
    ) -> dict[str, Any]:
        """Return what the page needs of one trace, JSON-ready; arrays are base64 of little-endian integers.

        Args:
            recorder: observes the feeding; None where `plans` are known.
            plans: as carried out while the trace was written.
        """
        model, tokenizer, method, budget = (
            self.model.model, self.model.tokenizer, self.config.method, self.config.budget
        )  # fmt: skip
        attention = FullAttention.collect(model, [row])
        (teacher,) = reference_logprobs(model, [row.prompt_P], [row.output_T])
        future = attention if method.needs.future else None
        nll, top = [], []
        # in chunks that end at the compactions, as replay does
        with self._cache(len(row.prompt_P), row.fed, subject, recorder, reference=future) as cache:
            for scored in feed(model, cache, [row], distances=cache.tokens_to_next_event):
                logprobs_NV = scored.logits_NV.float().log_softmax(-1)
                tokens_N = row.output_T[scored.start : scored.start + len(logprobs_NV)].to(logprobs_NV.device)
                nll.append(-logprobs_NV.gather(1, tokens_N[:, None])[:, 0].cpu())
                top.append(logprobs_NV.argmax(-1).cpu())
            stats = cache.stats().rows[0]
            budget = cache.budget if budget is not None and budget.layer_shares else budget  # shares as numbers
        nll_T, top_T, best_T = torch.cat(nll), torch.cat(top), teacher.best_N()
        ids = torch.cat([row.prompt_P, row.output_T])
        found = fates(recorder.plans if recorder else plans or [], len(ids), layers=attention.layers)
        edges = [0, *found.lengths_E, len(ids) - 1]
        received_GIHN = torch.stack([
            torch.stack([pad(attention.received(layer, 0, start, end), (0, edges[-1] - end))
                         for start, end in pairwise(edges)])
            for layer in attention.layers
        ]).cpu()  # fmt: skip
        differs = (top_T != best_T).nonzero()[:, 0].tolist()
        recent = 0 if budget is None else max(budget.recent, method.needs.recent)
        return {
            "format": FORMAT, "model": self.model.name, "method": method.spec(), "task": subject.task,
            "budget": budget.to_dict() if budget else None, "example": subject.example, "seed": subject.seed,
            "source": subject.source, "expected": subject.expected, "prompt": len(row.prompt_P),
            "pieces": token_pieces(tokenizer, ids), "layers": attention.layers, "heads": received_GIHN.shape[2],
            "events": {"length": found.lengths_E, "before": found.before_E, "after": found.after_E},
            "fates": packed_fates(found, received_GIHN.shape[2]),
            "protected": {"sinks": budget.sinks if budget else 0, "recent": recent,
                          "prompt": budget is not None and budget.prompt != "count"},
            "attention": packed_attention(received_GIHN.transpose(1, 2)),
            "scores": {
                "nll": _rounded(nll_T), "full_nll": _rounded(_logprob_of(teacher, row.output_T)),
                "top": [piece(tokenizer, None, token) for token in top_T.tolist()],
                "full_top": [piece(tokenizer, None, token) for token in best_T.tolist()], "differs": differs,
            },
            "first_mismatch": differs[0] if differs else None, "first_divergence": None, "full_pieces": None,
            "stats": {
                "mean": round(stats.physical_mean, 1), "peak": stats.physical_peak, "held": stats.physical_terminal,
                "agreement": round(1 - len(differs) / len(top_T), 5), "nll": round(float(nll_T.double().mean()), 5),
            },
        }  # fmt: skip


def save_inspection(folder: Path, data: dict[str, Any]) -> Path:
    """Write `folder/inspections/NAME.json`, whole or not at all."""
    tokens = "full" if data["budget"] is None else data["budget"]["tokens"]
    name = file_name(f"{data['kind']}-{data['task']}-{data['method']}-{tokens}-{data['example']}")
    path = folder / FOLDER / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.parent.is_symlink():
        raise ResultsError(f"{path.parent} is a link to another folder; delete it.")
    write_atomically(path, (json.dumps(data, separators=(",", ":"), allow_nan=False) + "\n").encode())
    return path


def load_inspections(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the inspections a results folder holds, by file name.

    Raises:
        ResultsError: one of them is damaged.
    """
    found = {}
    for path in sorted((folder / FOLDER).glob("*.json")):
        advice = "delete it and make it again"
        data = read_json(path, _SAVED, "an inspection", ResultsError, advice)
        if data.get("format") != FORMAT:
            raise ResultsError(f"{path} is not an inspection this version can read; {advice}.")
        found[path.stem] = data
    return found


def title_of(data: Mapping[str, Any]) -> str:
    """Return what was inspected, as in `rkv at 128 slots on program, example 3`."""
    method = "full KV" if data["budget"] is None else f"{data['method']} at {size_words(data['budget'])}"
    return f"{method} on {data['task']}, example {data['example']}"


def inspector_page(data: dict[str, Any]) -> str:
    """Return the inspector alone, as one self-contained HTML page."""
    return render(
        "inspector.html.j2", styles=INSPECTOR_STYLES, scripts=INSPECTOR_SCRIPTS, data={"inspection": data},
        title=f"{title_of(data)} - reasonkv", heading=title_of(data),
    )  # fmt: skip


def _row_seed(subject: Subject) -> int:
    return subject.example if subject.row_seed is None else subject.row_seed


def _logprob_of(teacher: TeacherLogprobs, tokens_T: Tensor) -> Tensor:
    """float32 [T], full KV's log-probability of tokens; that of all others together where a token is not stored."""
    if teacher.ids_Nk is None:
        return teacher.logprobs_Nk.gather(1, tokens_T[:, None])[:, 0]
    is_it_Tk = teacher.ids_Nk == tokens_T[:, None]
    stored_T = teacher.logprobs_Nk.masked_fill(~is_it_Tk, -torch.inf).amax(-1)
    return torch.where(is_it_Tk.any(-1), stored_T, teacher.rest_N)


def _rounded(values_T: Tensor) -> list[float]:
    return [round(min(value, 99.0), 3) for value in values_T.double().abs().tolist()]
