"""`reasonkv calibrate`: statistics of a model's queries, for the methods that score with them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reasonkv.cli import common
from reasonkv.cli.common import UsageError, expected_errors, note

if TYPE_CHECKING:
    from reasonkv.calibration import Calibration

_FILES = "Files"


@expected_errors
def calibrate(
    model: Annotated[
        str | None, typer.Option(help="The bundled [b]testbed[/b], a model folder, or a hub name.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="Plain text to calibrate on; any long one will do.")] = None,
    task: Annotated[
        str | None, typer.Option(help="Instead: prompts and reference traces of tasks, from their training split.")
    ] = None,
    limit: common.Limit = 16,
    seed: Annotated[int, typer.Option(help="Seed of the problems.")] = 0,
    tokens: Annotated[int, typer.Option(min=1, help="Most tokens in all.")] = 32768,
    window: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a window; unless given, as many as 1 GB of work memory holds.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows at once.")] = 1,
    horizon: Annotated[
        bool,
        typer.Option("--horizon", help="Also fit weights of the future distances (triattention:horizon=variational)."),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="File to write; unless given, the user's cache, where methods find it.", rich_help_panel=_FILES
        ),
    ] = None,
    import_: Annotated[
        Path | None,
        typer.Option("--import", help="Read this file (.safetensors or public .pt) instead.", rich_help_panel=_FILES),
    ] = None,
    export: Annotated[
        Path | None, typer.Option(help="Also write the public code's .pt format.", rich_help_panel=_FILES)
    ] = None,
    figure: Annotated[Path | None, typer.Option(help="PNG of the concentration.", rich_help_panel=_FILES)] = None,
    dtype: common.Dtype = "auto",
    device: common.Device = "auto",
    json: common.Json = False,
) -> None:
    """Average a model's queries before RoPE, per layer, query head and rotary pair.

    TriAttention and CASK score cached keys with these averages. With --import, files are read, converted and shown
    instead; --model then says which model they must fit.

    Example: [b]reasonkv calibrate --model Qwen/Qwen3-8B --text book.txt --out stats.safetensors[/b]
    """
    from reasonkv.calibration.job import FEW_TOKENS, CalibrateJob, run, write
    from reasonkv.errors import ReasonKVError

    tasks = () if task is None else tuple(common.split_tasks(task))
    try:
        job = CalibrateJob(
            text=text, task=tasks, limit=limit, seed=seed, tokens=tokens, window=window, batch_size=batch_size,
            horizon=horizon, out=out, import_=import_, export=export, figure=figure,
        )  # fmt: skip
        if job.import_ is not None:
            found = _read(job.import_, model)
        else:
            from reasonkv.models import one_thread_if_small
            from reasonkv.tasks import get_task

            families = [get_task(spec) for spec in tasks]
            loaded = common.open_model(model or "testbed", dtype, device)
            note(f"{loaded.name}: {loaded.dtype} on {loaded.device_name}")
            with one_thread_if_small(loaded.model), common.progress_bars(1) as bar:
                found = run(
                    job, loaded.model, loaded.tokenizer, tasks=families, name=loaded.name,
                    progress=lambda done: bar("tokens", min(done, tokens), tokens),
                )  # fmt: skip
            if (found.tokens or 0) < FEW_TOKENS:
                note(f"Only {found.tokens:,} tokens were averaged; some thousands give steadier statistics.")
        written = write(job, found)
    except ReasonKVError as error:
        raise UsageError(str(error)) from None
    except KeyboardInterrupt:
        note("Stopped; nothing was written.")
        raise typer.Exit(130) from None
    if json:
        names = (
            "name", "model", "layers", "query_heads", "head_dim", "pairs", "rope_type", "tokens", "date", "verified",
            "source",
        )  # fmt: skip
        facts = {name: getattr(found, name) for name in names}
        files = {what: str(path) for what, path in written.items()}
        common.print_json({**facts, "layers_concentration": found.layer_concentrations(), "files": files})
        return
    _print(found)
    for what, where in written.items():
        typer.echo(f"{what:<12}{common.show(where)}")


def _read(path: Path, model: str | None) -> Calibration:
    """A file, checked against the model's configuration if one is named."""
    from reasonkv.calibration import import_pt, load_calibration

    found = import_pt(path) if path.suffix == ".pt" else load_calibration(path)
    if model is not None:
        from reasonkv.models import load_config

        common.quiet_libraries()
        found.check(load_config(model))
    return found


def _print(found: Calibration) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(header_style="bold", title="Concentration R of queries before RoPE")
    for heading in ("layer", "mean", "least concentrated head", "most concentrated head"):
        table.add_column(heading, justify="right")
    for layer, row in enumerate(found.layer_concentrations()):
        table.add_row(str(layer), f"{row['mean']:.3f}", f"{row['min']:.3f}", f"{row['max']:.3f}")
    console = Console(width=common.width() or None)
    console.print(table)
    tokens = "an unknown number of" if found.tokens is None else f"{found.tokens:,}"
    state = "" if found.verified else ", unverified (imported)"
    console.print(
        f"{found.name or 'unnamed model'}: {found.layers} layers x {found.query_heads} query heads x {found.pairs} "
        f"rotary pairs, {tokens} tokens{state}. R = |mean of q| / mean of |q|; 1: all queries point one way. Means are "
        "weighted by |mean of q|.",
        style="dim", highlight=False,
    )  # fmt: skip
