"""`reasonkv calibrate`: statistics of a model's queries, for the methods that score with them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reasonkv.cli import common
from reasonkv.cli.common import UsageError, expected_errors, note

if TYPE_CHECKING:
    from reasonkv.calibration import Calibration

_FILES = "Files"
_FEW = 2048
"""Below so many tokens the averages are rough, and we say so."""


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
    from reasonkv.calibration import CalibrationError

    common.check_limit(limit)
    if import_ is None and (text is None) == (task is None):
        raise UsageError("Give either --text FILE or --task NAME, or --import FILE.")
    if import_ is not None and (text is not None or task is not None):
        raise UsageError("--import reads a file instead of calibrating; leave --text and --task out.")
    for path, option, ending in (
        (out, "--out", ".safetensors"),
        (export, "--export", ".pt"),
        (figure, "--figure", ".png"),
    ):
        if path is not None and path.suffix != ending:
            raise UsageError(f"{option} writes a {ending} file, not {path.name}.")
    try:
        if import_ is not None:
            found = _read(import_, model)
        else:
            wanted = {"text": text, "task": task, "limit": limit, "seed": seed, "tokens": tokens, "window": window}
            wanted["horizon"] = horizon
            found, out = _collect(model or "testbed", dtype, device, wanted, batch_size, out)
        written = _write(found, out, export, figure)
    except CalibrationError as error:
        raise UsageError(str(error)) from None
    except KeyboardInterrupt:
        note("Stopped; nothing was written.")
        raise typer.Exit(130) from None
    if json:
        common.print_json({**_facts(found), "layers_concentration": _rows(found), "files": written})
        return
    _print(found)
    for what, where in written.items():
        typer.echo(f"{what:<12}{common.show(Path(where))}")


def _read(path: Path, model: str | None) -> Calibration:
    """A file, checked against the model's configuration if one is named."""
    from reasonkv.calibration import import_pt, load_calibration

    found = import_pt(path) if path.suffix == ".pt" else load_calibration(path)
    if model is not None:
        from reasonkv.models import load_config

        common.quiet_libraries()
        found.check(load_config(model))
    return found


def _collect(
    model: str, dtype: str, device: str, wanted: dict[str, Any], batch_size: int, out: Path | None
) -> tuple[Calibration, Path]:
    """Load the model and calibrate; also where to write, `out` or the user's cache."""
    from reasonkv.calibration import cached_calibration, collect, fitting_window
    from reasonkv.calibration.corpus import text_batches, trace_batches
    from reasonkv.evaluate.generate import context_length
    from reasonkv.models import one_thread_if_small
    from reasonkv.tasks import get_task

    tasks = None if wanted["task"] is None else common.split_tasks(wanted["task"])
    if wanted["text"] is not None and not wanted["text"].is_file():
        raise UsageError(f"There is no text file {wanted['text']}.")
    loaded = common.open_model(model, dtype, device)
    window, tokens = wanted["window"] or fitting_window(loaded.model, batch_size), wanted["tokens"]
    if tasks is None:
        path = wanted["text"]
        batches = text_batches(loaded.tokenizer, path, tokens=tokens, window=window, batch_size=batch_size)
        source = f"text {path.name} in windows of {window} tokens"
    else:
        # a trace has its own length: only the model's context cuts it, unless --window does
        longest = wanted["window"] or context_length(loaded.model) or window
        families, limit, seed = [get_task(spec) for spec in tasks], wanted["limit"], wanted["seed"]
        batches = trace_batches(
            loaded.model, loaded.tokenizer, families, limit=limit, seed=seed, tokens=tokens, window=longest
        )
        source = f"reference traces of {limit} training problems each (seed {seed}): {', '.join(tasks)}"
    note(f"{loaded.name}: {loaded.dtype} on {loaded.device_name}; {source}")
    done = 0
    with one_thread_if_small(loaded.model), common.progress_bars(1) as progress:

        def advance(new: int) -> None:
            nonlocal done
            done += new
            progress("tokens", min(done, tokens - 1), tokens)

        found = collect(
            loaded.model, batches, horizon=wanted["horizon"], on_done=advance, name=loaded.name, source=source
        )
        progress("tokens", done, done)
    if done < _FEW:
        note(f"Only {done:,} tokens were averaged; some thousands give steadier statistics.")
    return found, out or cached_calibration(loaded.hash)


def _write(found: Calibration, out: Path | None, export: Path | None, figure: Path | None) -> dict[str, str]:
    """Write what was asked for; what and where."""
    from reasonkv.calibration import export_pt, save_calibration

    written = {}
    if out is not None:
        save_calibration(out, found)
        written["calibration"] = str(out)
    if export is not None:
        export_pt(found, export)
        written["export"] = str(export)
    if figure is not None:
        try:
            from reasonkv.calibration.figure import concentration_figure
        except ImportError:
            note("No figure without matplotlib; install it with: pip install 'reasonkv[report]'")
        else:
            figure.parent.mkdir(parents=True, exist_ok=True)
            written["figure"] = str(concentration_figure(found, figure))
    return written


def _facts(found: Calibration) -> dict[str, Any]:
    names = ("name", "model", "layers", "query_heads", "head_dim", "pairs", "rope_type", "tokens", "date", "verified")
    return {**{name: getattr(found, name) for name in names}, "source": found.source}


def _rows(found: Calibration) -> list[dict[str, float]]:
    """Concentration per layer: heads and pairs weighted by |mean of q_f|, and the least and most concentrated head."""
    weight_LHqF, heads_LHq = found.mean_LHqF.abs(), found.head_concentration_LHq()
    total_L = weight_LHqF.sum((1, 2)).clamp(min=1e-30)
    mean_L = (weight_LHqF * found.concentration_LHqF()).sum((1, 2)) / total_L
    columns = (mean_L.tolist(), heads_LHq.amin(1).tolist(), heads_LHq.amax(1).tolist())
    return [{"mean": mean, "min": low, "max": high} for mean, low, high in zip(*columns, strict=True)]


def _print(found: Calibration) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(header_style="bold", title="Concentration R of queries before RoPE")
    for heading in ("layer", "mean", "least concentrated head", "most concentrated head"):
        table.add_column(heading, justify="right")
    for layer, row in enumerate(_rows(found)):
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
