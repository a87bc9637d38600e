"""`reasonkv replay`, `evaluate` and `tune`: run a job into a results folder and print its tables."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from reasonkv.cli.console import note, print_json, print_tables, progress_bars, show
from reasonkv.cli.flags import ConfigFile, Json, ModelFlags, Out, Without, command
from reasonkv.evaluate.job import GenerateJob, Job, ReplayJob, TuneJob

if TYPE_CHECKING:
    from reasonkv.models import LoadedModel


@command
def replay(*, job: ReplayJob, out: Out, model: ModelFlags, json: Json = False, config: ConfigFile = None) -> None:
    """Replay full KV's traces through bounded caches and score every token.

    Example: `reasonkv replay --task program --methods full,random,rkv --budgets 128,256 --limit 8 --out results`

    Full KV writes each trace once. A method is then fed the same tokens, and every output token is scored against full
    KV's own prediction. The results folder holds records, manifest, traces and a figure.
    """
    _run(job, out, model, json)


@command
def evaluate(*, job: GenerateJob, out: Out, model: ModelFlags, json: Json = False, config: ConfigFile = None) -> None:
    """Answer a task's problems by generating through bounded caches, and count the right answers.

    Example: `reasonkv evaluate --task program --methods full,random,rkv --budgets 128,256 --limit 8 --out answers`

    Full KV always answers first: accuracies are compared with its own on the same problems. The results folder holds
    records, manifest and full KV's outputs.
    """
    _run(job, out, model, json)


def _run(job: ReplayJob | GenerateJob, out: Path, model: ModelFlags, json: bool) -> None:
    loaded = load_for(job, out, model)
    result = run_and_show(job, loaded, out, quiet=json)
    if json:
        print_json(result)


def load_for(job: Job, out: Path, model: ModelFlags) -> LoadedModel:
    """Check everything that can be checked without a model, then load it."""
    from reasonkv.evaluate.cells import check_job

    check_job(job)
    loaded = model.load()
    note(f"{loaded.name}: {loaded.dtype} on {loaded.device_name}; results in {show(out)}")
    return loaded


def run_and_show(
    job: ReplayJob | GenerateJob, loaded: LoadedModel, out: Path, *, quiet: bool, name: str | None = None
) -> dict[str, Any]:
    """Run a job into a folder and, unless `quiet`, print its tables; return what `--json` prints.

    Args:
        job, loaded, out: what to run, on which model, into which folder.
        quiet: print nothing on stdout.
        name: the command that the folder is recorded under, if not the job's own.
    """
    from reasonkv.evaluate.cells import count_steps
    from reasonkv.evaluate.records import RECORDS
    from reasonkv.evaluate.run import run
    from reasonkv.evaluate.table import summarize, summary_dicts, to_frame
    from reasonkv.report import terminal

    with progress_bars(count_steps(job)) as progress:
        frame = to_frame(run(job, loaded, out, progress, command=name))
    summary = summarize(frame)
    found = {"out": str(out), "records": str(out / RECORDS), "rows": summary_dicts(summary)}
    if isinstance(job, GenerateJob):
        tables = terminal.answers_tables(summary)
        caption = terminal.answers_caption(frame, job.sampling if job.sampling.temperature else None)
    else:
        tables = [*terminal.replay_tables(summary), *terminal.diagnostic_tables(summary)]
        caption = terminal.replay_caption(frame)
    if not quiet:
        print_tables(tables, caption)
        print(f"Records: {show(out / RECORDS)}")
    return found


@command
def tune(
    *,
    job: Annotated[TuneJob, Without(("tokens", "keep", "mean_slots"))],
    out: Out,
    model: ModelFlags,
    json: Json = False,
    config: ConfigFile = None,
) -> None:
    """Find the smallest budget with which each method keeps a target, by bisection over real runs.

    Example: `reasonkv tune --task program --methods random,rkv --target 0.95x --limit 16 --out search`

    Another --target, --resolution or replay --metric reuses what --out holds; `reasonkv frontier` reads it, too.
    """
