"""`reasonkv train-gate`: train the gate of SeerAttention-R for a model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reasonkv.cli import common
from reasonkv.cli.common import UsageError, expected_errors, note

if TYPE_CHECKING:
    from reasonkv.models import LoadedModel
    from reasonkv.seer import Gate, GateRecipe, TrainingRow

_CHECKED = 4  # held-out problems of each task, or windows of a text
_PAGES = (4, 8, 16)


@expected_errors
def train_gate(
    out: Annotated[Path, typer.Option(help="File to write (.safetensors); methods look for it in the model's folder.")],
    model: Annotated[str, typer.Option(help="The bundled [b]testbed[/b], a model folder, or a hub name.")] = "testbed",
    text: Annotated[Path | None, typer.Option(help="Plain text to train on.")] = None,
    task: Annotated[
        str | None, typer.Option(help="Instead: prompts and reference traces of tasks, from their training split.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Problems of each task.")] = 800,
    tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a text.")] = 4_000_000,
    window: Annotated[int | None, typer.Option(min=1, help="Tokens of a window of a text.")] = None,
    page_size: Annotated[int, typer.Option(min=1, help="Tokens of a page.")] = 64,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 800,
    rows: Annotated[int, typer.Option(min=1, help="Texts of one step.")] = 16,
    queries: Annotated[int, typer.Option(min=1, help="Most queries of a text to train on.")] = 256,
    rate: Annotated[float, typer.Option(help="Peak of the learning rate.")] = 1e-3,
    seed: Annotated[int, typer.Option(help="Seed of the first weights and of the problems.")] = 0,
    dtype: common.Dtype = "auto",
    device: common.Device = "auto",
    json: common.Json = False,
) -> None:
    """Train the gate that the method [b]seer[/b] chooses pages with; the model itself is not changed.

    The gate learns to expect the model's own attention. Afterwards it is held against an untrained gate and against
    Quest, on texts it was not trained on, by the share of attention that falls on equally many pages.

    Example: [b]reasonkv train-gate --model Qwen/Qwen3-8B --text book.txt --out reasonkv_gate.safetensors[/b]
    """
    from reasonkv.models import one_thread_if_small
    from reasonkv.seer import GateRecipe, save_gate
    from reasonkv.seer import train_gate as train

    if (text is None) == (task is None):
        raise UsageError("Give either --text FILE or --task NAME.")
    if text is not None and not text.is_file():
        raise UsageError(f"There is no text file {text}.")
    if out.suffix != ".safetensors":
        raise UsageError(f"--out writes a .safetensors file, not {out.name}.")
    recipe = GateRecipe(page_size=page_size, steps=steps, rows=rows, queries=queries, rate=rate, seed=seed)
    loaded = common.open_model(model, dtype, device)
    training, held_out, source = _rows(loaded, text, task, limit, tokens, window, seed)
    note(f"{loaded.name}: {loaded.dtype} on {loaded.device_name}; {source}")
    with one_thread_if_small(loaded.model), common.progress_bars(1) as progress:
        losses: list[float] = []

        def on_step(done: int, loss: float) -> None:
            losses.append(loss)
            progress(f"steps, loss {sum(losses[-20:]) / len(losses[-20:]):.3f}", done, steps)

        gate = train(loaded.model, training, recipe, source=source, on_step=on_step)
        save_gate(out, gate)
        table = _shares(loaded, out, gate, recipe, held_out)
    if json:
        facts = {"file": str(out), "page_size": page_size, "parameters": gate.parameters, "source": source}
        common.print_json({**facts, "loss": sum(losses[-20:]) / len(losses[-20:]), "attention_kept": table})
        return
    typer.echo(f"Trained {gate.parameters:,} parameters in {steps:,} steps: {common.show(out)}")
    for pages, shares in table.items():
        words = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
        typer.echo(f"Attention on {pages} pages of {page_size} tokens, held-out texts: {words}")


def _rows(
    loaded: LoadedModel, text: Path | None, task: str | None, limit: int, tokens: int, window: int | None, seed: int
) -> tuple[Iterable[TrainingRow], list[TrainingRow], str]:
    """Texts to train on, texts held out, and what they are."""
    from reasonkv.calibration import fitting_window
    from reasonkv.evaluate.generate import context_length
    from reasonkv.seer import task_rows, text_rows
    from reasonkv.tasks import get_task

    if task is not None:
        tasks = common.split_tasks(task)
        families, context = [get_task(spec) for spec in tasks], context_length(loaded.model)
        training = task_rows(loaded.model, loaded.tokenizer, families, limit=limit, seed=seed, context=context)
        held_out = list(
            task_rows(
                loaded.model, loaded.tokenizer, families, limit=_CHECKED, seed=seed, split="test", context=context
            )
        )
        return (
            training,
            held_out,
            f"reference traces of {limit} training problems each (seed {seed}): {', '.join(tasks)}",
        )
    assert text is not None
    wide = window or fitting_window(loaded.model)
    rows = list(text_rows(loaded.tokenizer, text, tokens=tokens, window=wide))
    if len(rows) < 2:
        raise UsageError(f"{text} fills one window of {wide} tokens; give a longer text, or a smaller --window.")
    kept_back = min(_CHECKED, len(rows) // 2)
    return rows[:-kept_back], rows[-kept_back:], f"text {text.name} in windows of {wide} tokens"


def _shares(
    loaded: LoadedModel, path: Path, gate: Gate, recipe: GateRecipe, rows: list[TrainingRow]
) -> dict[int, dict[str, float]]:
    """Share of attention on equally many pages, chosen by the gate, an untrained one, and Quest."""
    from tempfile import TemporaryDirectory

    from reasonkv.methods.quest import Quest
    from reasonkv.methods.seer import SeerAttention
    from reasonkv.seer import GateError, kept_attention, random_gate, save_gate

    shapes = [(*layer["query"].shape[:2], layer["query"].shape[2]) if layer else None for layer in gate.layers]
    found: dict[int, dict[str, float]] = {}
    with TemporaryDirectory() as folder:
        untrained = Path(folder) / "untrained.safetensors"
        save_gate(untrained, random_gate(shapes, gate.page_size, gate.model, seed=recipe.seed))
        methods = {
            "gate": SeerAttention(gate=str(path)),
            "untrained gate": SeerAttention(gate=str(untrained)),
            "quest": Quest(page_size=gate.page_size),
        }
        for pages in _PAGES:
            try:
                found[pages] = {name: kept_attention(loaded.model, rows, one, pages) for name, one in methods.items()}
            except GateError:  # no text has so many pages
                continue
    return found
