"""`reasonkv train-gate`: train the gate of SeerAttention-R for a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

from reasonkv.calibration.job import CorpusJob
from reasonkv.cli.console import note, print_json, progress_bars, show
from reasonkv.cli.flags import ConfigFile, Json, ModelFlags, Without, command
from reasonkv.cli.mistakes import UsageError

if TYPE_CHECKING:
    from reasonkv.models import LoadedModel
    from reasonkv.seer import Gate, TrainingRow

_CHECKED = 4  # held-out problems of each task, or windows of a text
_PAGES = (4, 8, 16)


@dataclass(frozen=True, kw_only=True)
class TrainGateJob(CorpusJob):
    """Train the gate of a model on a text, or on prompts and reference traces of tasks.

    Args:
        out: File to write (.safetensors); methods look for it in the model's folder.
        page_size: Tokens of a page.
        steps: Optimizer steps.
        rows: Sequences of one step.
        queries: Most queries of a sequence to train on.
        rate: Peak of the learning rate.
    """

    out: Path
    limit: int = 800
    tokens: int = 4_000_000
    page_size: int = 64
    steps: int = 800
    rows: int = 16
    queries: int = 256
    rate: float = 1e-3


@command
def train_gate(
    *,
    job: TrainGateJob,
    model: Annotated[ModelFlags, Without(("calibration",))],
    json: Json = False,
    config: ConfigFile = None,
) -> None:
    """Train the gate that the method seer chooses pages with; the model itself is not changed.

    Example: `reasonkv train-gate --model Qwen/Qwen3-8B --text book.txt --out reasonkv_gate.safetensors`

    The gate learns to expect the model's own attention. Afterwards it is compared with an untrained gate and with
    Quest, on texts it was not trained on, by the share of attention that falls on equally many pages.
    """
    from reasonkv.models import one_thread_if_small
    from reasonkv.seer import GateRecipe, save_gate
    from reasonkv.seer import train_gate as train

    if job.text is not None and not job.text.exists():
        raise UsageError(f"There is no text file {job.text}.")
    loaded = model.load()
    training, held_out, source = _rows(loaded, job)
    note(f"{loaded.name}: {loaded.dtype} on {loaded.device_name}; {source}")
    losses: list[float] = []
    recipe = GateRecipe(
        page_size=job.page_size, steps=job.steps, rows=job.rows, queries=job.queries, rate=job.rate, seed=job.seed
    )
    with one_thread_if_small(loaded.model), progress_bars(1) as progress:

        def on_step(done: int, loss: float) -> None:
            losses.append(loss)
            progress(f"steps, loss {sum(losses[-20:]) / len(losses[-20:]):.3f}", done, job.steps)

        gate = train(loaded.model, training, recipe, source=source, on_step=on_step)
        save_gate(job.out, gate)
        table = _shares(loaded, job, gate, held_out)
    if json:
        facts = {"file": job.out, "page_size": job.page_size, "parameters": gate.parameters, "source": source}
        print_json({**facts, "loss": sum(losses[-20:]) / len(losses[-20:]), "attention_kept": table})
        return
    print(f"Trained {gate.parameters:,} parameters in {job.steps:,} steps: {show(job.out)}")
    for pages, shares in table.items():
        words = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
        print(f"Attention on {pages} pages of {job.page_size} tokens, held-out texts: {words}")


def _rows(loaded: LoadedModel, job: TrainGateJob) -> tuple[Any, list[TrainingRow], str]:
    """Return rows to train on, rows held out, and what they are."""
    from reasonkv.calibration import fitting_window
    from reasonkv.evaluate.generate import context_length
    from reasonkv.seer import task_rows, text_rows
    from reasonkv.tasks import get_task

    if job.text is None:
        settings: dict[str, Any] = {"seed": job.seed, "context": context_length(loaded.model)}
        place = loaded.model, loaded.tokenizer, [get_task(spec) for spec in job.task]
        source = f"reference traces of {job.limit} training problems each (seed {job.seed}): {', '.join(job.task)}"
        held_out = list(task_rows(*place, limit=_CHECKED, split="test", **settings))
        return task_rows(*place, limit=job.limit, **settings), held_out, source
    wide = job.window or fitting_window(loaded.model)
    rows = list(text_rows(loaded.tokenizer, job.text, tokens=job.tokens, window=wide))
    if len(rows) < 2:
        raise UsageError(f"{job.text} fills one window of {wide} tokens; give a longer text, or a smaller --window.")
    kept_back = min(_CHECKED, len(rows) // 2)
    return rows[:-kept_back], rows[-kept_back:], f"text {job.text.name} in windows of {wide} tokens"


def _shares(loaded: LoadedModel, job: TrainGateJob, gate: Gate, rows: list[TrainingRow]) -> dict[int, dict[str, float]]:
    """Return the share of attention on equally many pages, chosen by the gate, an untrained one, and Quest."""
    from reasonkv.methods.quest import Quest
    from reasonkv.methods.seer import SeerAttention
    from reasonkv.seer import GateError, kept_attention, random_gate, save_gate

    shapes = [(*layer["query"].shape[:2], layer["query"].shape[2]) if layer else None for layer in gate.layers]
    found: dict[int, dict[str, float]] = {}
    with TemporaryDirectory() as folder:
        untrained = Path(folder) / "untrained.safetensors"
        save_gate(untrained, random_gate(shapes, gate.page_size, gate.model, seed=job.seed))
        methods = {
            "gate": SeerAttention(gate=str(job.out)),
            "untrained gate": SeerAttention(gate=str(untrained)),
            "quest": Quest(page_size=gate.page_size),
        }
        for pages in _PAGES:
            try:
                found[pages] = {name: kept_attention(loaded.model, rows, one, pages) for name, one in methods.items()}
            except GateError:  # no text has so many pages
                continue
    return found
