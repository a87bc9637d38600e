"""`reasonkv train-gate`: train the gate of SeerAttention-R for a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reasonkv.cli import common
from reasonkv.cli.common import expected_errors, note


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
    from reasonkv.seer.job import TrainGateJob, run
    from reasonkv.tasks import get_task

    tasks = () if task is None else tuple(common.split_tasks(task))
    job = TrainGateJob(
        out=out, text=text, task=tasks, limit=limit, tokens=tokens, window=window, page_size=page_size, steps=steps,
        rows=rows, queries=queries, rate=rate, seed=seed,
    )  # fmt: skip
    families = [get_task(spec) for spec in tasks]
    loaded = common.open_model(model, dtype, device)
    note(f"{loaded.name}: {loaded.dtype} on {loaded.device_name}")
    with one_thread_if_small(loaded.model), common.progress_bars(1) as bar:
        made = run(
            job, loaded.model, loaded.tokenizer, tasks=families,
            progress=lambda step, loss: bar(f"steps, loss {loss:.3f}", step, steps),
        )  # fmt: skip
    parameters = made.gate.parameters
    if json:
        facts = {"file": str(out), "page_size": page_size, "parameters": parameters, "source": made.source}
        common.print_json({**facts, "loss": made.loss, "attention_kept": made.attention_kept})
        return
    typer.echo(f"Trained {parameters:,} parameters in {steps:,} steps: {common.show(out)}")
    for pages, shares in made.attention_kept.items():
        words = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
        typer.echo(f"Attention on {pages} pages of {page_size} tokens, held-out texts: {words}")
