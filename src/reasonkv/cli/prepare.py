"""`reasonkv calibrate` and `train-gate`: what some methods have to know of a model beforehand."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from reasonkv.calibration.job import CalibrateJob
from reasonkv.cli.console import note, print_json, print_tables, progress_bars, quiet_libraries, show
from reasonkv.cli.flags import GROUPS, ConfigFile, Json, ModelFlags, Without, command, load
from reasonkv.cli.mistakes import UsageError
from reasonkv.seer.job import TrainGateJob
from reasonkv.tasks.options import TaskOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from reasonkv.calibration import Calibration
    from reasonkv.evaluate.progress import Progress
    from reasonkv.models import LoadedModel
    from reasonkv.tasks import Task

_FEW_TOKENS = 2048


@command
def calibrate(
    *,
    job: CalibrateJob,
    options: TaskOptions,
    model: Annotated[str | None, Parameter(group=GROUPS["ModelFlags"])] = None,
    loading: Annotated[ModelFlags, Without(("model", "calibration", "kv_dtype"))],
    json: Json = False,
    config: ConfigFile = None,
) -> None:
    """Average a model's queries before RoPE, for the methods that score keys with them (triattention, cask).

    Example: `reasonkv calibrate --model Qwen/Qwen3-8B --text book.txt --out stats.safetensors`

    With --import, a file is read, converted and shown instead.

    Args:
        model: The bundled testbed, a model folder, or a hub name; with --import, the model that the file must fit.
    """
    from reasonkv.calibration import import_pt, load_calibration
    from reasonkv.calibration.run import run, write

    if job.import_ is not None:
        if job.forecast or job.horizon or job.layer_shares:
            raise UsageError("--import takes a file as it is; leave --forecast, --horizon and --layer-shares out.")
        found = import_pt(job.import_) if job.import_.suffix == ".pt" else load_calibration(job.import_)
        if model is not None:
            from reasonkv.checkpoints import load_config

            quiet_libraries()
            found.check(load_config(model))
    else:
        from reasonkv.models import one_thread_if_small
        from reasonkv.tasks import get_task

        tasks = [get_task(spec, options) for spec in job.task]
        loaded = load(replace(loading, model=model or "testbed"))
        with one_thread_if_small(loaded.model), progress_bars(1) as bar:

            def progress(done: int) -> None:
                bar("tokens", min(done, job.tokens), job.tokens)

            found = run(job, loaded.model, loaded.tokenizer, tasks=tasks, name=loaded.name, progress=progress)
            found = _with_known(job, loaded.model, found)
            if job.forecast or job.layer_shares:
                found = _fit(job, loaded, found, tasks, options, bar)
        if (found.tokens or 0) < _FEW_TOKENS:
            note(f"Only {found.tokens:,} tokens were averaged; some thousands give steadier statistics.")
    written = write(job, found)
    if json:
        names = "name model layers query_heads head_dim pairs rope_type tokens date verified source layer_shares"
        facts = {name: getattr(found, name) for name in names.split()}
        print_json(facts | {"layers_concentration": found.layer_concentrations(), "files": written})
        return
    _print(found)
    for what, where in written.items():
        print(f"{what:<12}{show(where)}")


def _fit(
    job: CalibrateJob, loaded: LoadedModel, found: Calibration, tasks: list[Task], options: TaskOptions, bar: Progress
) -> Calibration:
    """Return the statistics with the networks and the shares that a job asks for, and note how well they do."""
    from reasonkv.calibration.chosen import method_for
    from reasonkv.evaluate.fitting import add_forecast, texts_of
    from reasonkv.evaluate.sharing import add_shares, long_enough

    rows = texts_of(job, loaded.model, loaded.tokenizer, tasks=tasks, options=options, progress=bar)
    if job.layer_shares:
        long_enough(rows)  # said before the networks are fitted
    if job.forecast:
        found, fitted = add_forecast(job, loaded.model, rows, found, progress=bar)
        note(f"Forecast: {fitted.network.numbers:,} numbers, fitted to {fitted.compactions} compactions.")
        note(
            "Of fewer than 8 texts none is left over to measure it on."
            if fitted.share is None or fitted.attention_share is None
            else f"On other texts its choice holds {fitted.share:.0%} of the attention that the best holds, a "
            f"choice by the newest queries' attention {fitted.attention_share:.0%}."
        )
    if job.layer_shares:
        found = add_shares(loaded.model, rows, found, progress=bar)
        note(f"Shares of the layers, measured with {method_for(found).spec()}: {found.layer_shares}.")
    return found


def _with_known(job: CalibrateJob, model: PreTrainedModel, found: Calibration) -> Calibration:
    """Return new statistics with the networks and shares that they would overwrite or hide: the model's so far."""
    from reasonkv.calibration import CalibrationError, find_calibration

    try:
        known = find_calibration(model, job.out if job.out is not None and job.out.is_file() else None)
    except CalibrationError:
        return found
    anew = {"forecast": job.forecast, "layer_shares": job.layer_shares}
    parts = {name: getattr(known, name) for name, is_made in anew.items() if not is_made}
    is_same = found.model == known.model or known.is_of(found.norms)
    if not is_same or not any(parts.values()):
        return found
    note(f"Kept of the calibration so far: {' and '.join(name for name, part in parts.items() if part)}.")
    return replace(found, **parts)


def _print(found: Calibration) -> None:
    from rich.table import Table

    table = Table(header_style="bold", title="Concentration R of queries before RoPE")
    for heading in ("layer", "mean", "least concentrated head", "most concentrated head"):
        table.add_column(heading, justify="right")
    for layer, row in enumerate(found.layer_concentrations()):
        table.add_row(str(layer), f"{row['mean']:.3f}", f"{row['min']:.3f}", f"{row['max']:.3f}")
    tokens = "an unknown number of" if found.tokens is None else f"{found.tokens:,}"
    print_tables(
        [table],
        f"{found.name or 'unnamed model'}: {found.layers} layers x {found.query_heads} query heads x {found.pairs} "
        f"rotary pairs, {tokens} tokens{'' if found.verified else ', unverified (imported)'}. R = |mean of q| / mean "
        "of |q|; 1: all queries point one way. Means are weighted by |mean of q|.",
    )


@command
def train_gate(
    *,
    job: TrainGateJob,
    model: Annotated[ModelFlags, Without(("calibration", "kv_dtype"))],
    json: Json = False,
    config: ConfigFile = None,
) -> None:
    """Train the gate that the method seer chooses pages with; the model itself is not changed.

    Example: `reasonkv train-gate --model Qwen/Qwen3-8B --text book.txt --out reasonkv_gate.safetensors`

    The gate learns to predict the model's own attention. Afterwards it is compared with an untrained gate and with
    Quest on held-out text, by the share of attention that falls on equally many pages.
    """
    from reasonkv.models import one_thread_if_small
    from reasonkv.seer.training import run
    from reasonkv.tasks import get_task

    tasks = [get_task(spec) for spec in job.task]
    loaded = load(model)
    with one_thread_if_small(loaded.model), progress_bars(1) as bar:

        def progress(step: int, loss: float) -> None:
            bar(f"steps, loss {loss:.3f}", step, job.steps)

        made = run(job, loaded.model, loaded.tokenizer, tasks=tasks, progress=progress)
    parameters = made.gate.parameters
    if json:
        facts = {"file": job.out, "page_size": job.page_size, "parameters": parameters, "source": made.source}
        print_json({**facts, "loss": made.loss, "attention_kept": made.attention_kept})
        return
    print(f"Trained {parameters:,} parameters in {job.steps:,} steps on {made.source}: {show(job.out)}")
    for pages, shares in made.attention_kept.items():
        words = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
        print(f"Attention on {pages} pages of {job.page_size} tokens, held-out text: {words}")
