"""`reasonkv calibrate`: statistics of a model's queries, for the methods that score with them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from reasonkv.calibration.job import CalibrateJob
from reasonkv.cli.console import note, print_json, print_tables, progress_bars, quiet_libraries, show
from reasonkv.cli.flags import GROUPS, ConfigFile, Json, ModelFlags, Without, command

if TYPE_CHECKING:
    from reasonkv.calibration import Calibration

_FEW_TOKENS = 2048


@command
def calibrate(
    *,
    job: CalibrateJob,
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
    from reasonkv.calibration.run import run, write

    if job.import_ is not None:
        found = _read(job, model)
    else:
        from dataclasses import replace

        from reasonkv.models import one_thread_if_small
        from reasonkv.tasks import get_task

        tasks = [get_task(spec) for spec in job.task]
        loaded = replace(loading, model=model or "testbed").load()
        note(f"{loaded.name}: {loaded.dtype} on {loaded.device_name}")
        with one_thread_if_small(loaded.model), progress_bars(1) as bar:

            def progress(done: int) -> None:
                bar("tokens", min(done, job.tokens), job.tokens)

            found = run(job, loaded.model, loaded.tokenizer, tasks=tasks, name=loaded.name, progress=progress)
            if job.forecast:
                from reasonkv.evaluate.fitting import add_forecast

                found, fitted = add_forecast(job, loaded.model, loaded.tokenizer, found, tasks=tasks, progress=bar)
                note(
                    f"Forecast: {fitted.network.numbers:,} numbers, fitted to {fitted.compactions} compactions. Of the "
                    f"attention that the best choice holds on others, its own holds {fitted.share:.0%}, one by the "
                    f"newest queries' attention {fitted.attention_share:.0%}."
                )
        if (found.tokens or 0) < _FEW_TOKENS:
            note(f"Only {found.tokens:,} tokens were averaged; some thousands give steadier statistics.")
    written = write(job, found)
    if json:
        names = "name model layers query_heads head_dim pairs rope_type tokens date verified source"
        facts = {name: getattr(found, name) for name in names.split()}
        print_json(facts | {"layers_concentration": found.layer_concentrations(), "files": written})
        return
    _print(found)
    for what, where in written.items():
        print(f"{what:<12}{show(where)}")


def _read(job: CalibrateJob, model: str | None) -> Calibration:
    """Read a file, and check it against the model's configuration if one is named."""
    from reasonkv.calibration import import_pt, load_calibration

    assert job.import_ is not None
    found = import_pt(job.import_) if job.import_.suffix == ".pt" else load_calibration(job.import_)
    if model is not None:
        from reasonkv.checkpoints import load_config

        quiet_libraries()
        found.check(load_config(model))
    return found


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
