"""What to train a gate on, and how: frozen dataclasses for Python, a configuration file and the command line.

Nothing here imports torch before a job runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from reasonkv.calibration.job import CorpusError, CorpusJob

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from reasonkv.calibration.corpus import ProblemSource
    from reasonkv.seer.gate import Gate

_HELD_OUT = 4  # problems of each task, or windows of a text
_PAGES = (4, 8, 16)


@dataclass(frozen=True, kw_only=True)
class GateRecipe:
    """How a gate is trained; the defaults are the paper's, except for `queries` and what a sequence is.

    Args:
        page_size: Tokens of a page.
        steps: Optimizer steps.
        rows: Sequences of one step.
        queries: Most queries of a sequence that are trained on, spread evenly over those after its prompt.
        rate: Peak of the learning rate, reached after the warmup and followed by a cosine down to a hundredth.
        warmup: Steps of the warmup.
        seed: Seed of the first weights, and of the problems of tasks.
    """

    page_size: int = 64
    steps: int = 800
    rows: int = 16
    queries: int = 256
    rate: float = 1e-3
    warmup: int = 20
    seed: int = 0

    def rate_at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


@dataclass(frozen=True, kw_only=True)
class TrainGateJob(GateRecipe, CorpusJob):
    """Train the gate that the method `seer` chooses pages with; the model itself is not changed.

    Args:
        limit: Problems per task.
        tokens: Most tokens of a text.
        out: File to write (.safetensors); `reasonkv_gate.safetensors` in the model's folder is found by itself.

    Raises:
        CorpusError: a number below 1, a wrong file ending, or not exactly one of text and task.
    """

    out: Path
    limit: int = 800
    tokens: int = 4_000_000


class TrainedGate(NamedTuple):
    """What a job made: the gate, what it was trained on, its loss (mean of the last 20 steps), and `attention_kept`.

    `attention_kept` has, by number of pages, the share of attention on the pages that "gate", "untrained gate" and
    "quest" choose; numbers of pages that no held-out sequence has are left out.
    """

    gate: Gate
    source: str
    loss: float
    attention_kept: dict[int, dict[str, float]]


def run(
    job: TrainGateJob,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tasks: Sequence[ProblemSource] = (),
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> TrainedGate:
    """Train a gate, write it, and measure it.

    Args:
        job: what to train on, and how.
        model: a causal language model.
        tokenizer: its tokenizer.
        tasks: the tasks that `job.task` names.
        progress: called with the steps done and the mean loss of the last 20 of them.

    Raises:
        CorpusError: the text cannot be read, or fills no two windows.
        GateError, UnsupportedModelError, RotaryError: see `train_gate`.
        OSError: the file cannot be written.
    """
    from reasonkv.calibration.corpus import read_corpus, task_passages
    from reasonkv.methods.quest import Quest
    from reasonkv.methods.seer import SeerAttention
    from reasonkv.seer.gate import GateError, random_gate, save_gate
    from reasonkv.seer.training import kept_attention, train_gate

    passages, source = read_corpus(job, model, tokenizer, tasks)
    rows = list(passages)
    if job.text is None:
        held_out = list(task_passages(model, tokenizer, tasks, limit=_HELD_OUT, seed=job.seed, split="test"))
    elif len(rows) < 2:
        raise CorpusError(f"{job.text} fills one window; give a longer text, or a smaller window.")
    else:
        kept_back = min(_HELD_OUT, len(rows) // 2)
        rows, held_out = rows[:-kept_back], rows[-kept_back:]
    losses: list[float] = []

    def on_step(step: int, loss: float) -> None:
        losses[:] = [*losses[-19:], loss]
        progress(step, sum(losses) / len(losses))

    gate = train_gate(model, rows, job, source=source, on_step=on_step)
    save_gate(job.out, gate)
    untrained = random_gate(gate.shapes, gate.page_size, gate.model, seed=job.seed)
    kept: dict[int, dict[str, float]] = {}
    for pages in _PAGES:
        with suppress(GateError):  # no sequence has so many pages
            kept[pages] = {
                "gate": kept_attention(model, held_out, SeerAttention(), pages, gate=gate),
                "untrained gate": kept_attention(model, held_out, SeerAttention(), pages, gate=untrained),
                "quest": kept_attention(model, held_out, Quest(page_size=gate.page_size), pages),
            }
    return TrainedGate(gate, source, sum(losses) / len(losses), kept)
