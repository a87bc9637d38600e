"""`reasonkv replay`, `evaluate` and `tune`: run a job into a results folder and print its tables."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from reasonkv.cli.console import note, print_json, print_tables, progress_bars, show
from reasonkv.cli.flags import ConfigFile, Json, ModelFlags, Out, Without, command, load
from reasonkv.evaluate.job import GenerateJob, Job, ReplayJob, TuneJob

if TYPE_CHECKING:
    from reasonkv.evaluate.endpoint import Endpoint
    from reasonkv.models import LoadedModel

FIGURE = "frontier.png"
SHOWN = 1200
"""Characters of a first prompt that are shown."""


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
    from reasonkv.evaluate.cells import check_job
    from reasonkv.evaluate.endpoint import Endpoint

    loaded: LoadedModel | Endpoint
    if isinstance(job, GenerateJob) and job.endpoint is not None:
        loaded = Endpoint.connect(job.endpoint, model.model)
        job = loaded.fitted(job)
        note(f"{loaded.name} at {loaded.url}: {', '.join(map(str, job.methods))}; results in {show(out)}")
    else:
        check_job(job)  # what is wrong with it is reported before the model takes its time to load
        loaded = load(model, out)
        _show_first_prompts(job, loaded)
    result = run_and_show(job, loaded, out, quiet=json)
    if json:
        print_json(result)


def _show_first_prompts(job: Job, loaded: LoadedModel) -> None:
    """Note how the first problem of each task from data reaches the model, and what of the data was skipped."""
    from reasonkv.evaluate.generate import render
    from reasonkv.tasks import get_task

    for spec in job.task:
        task = get_task(spec, job.options).for_tokenizer(loaded.tokenizer)
        for sentence in task.skipped:
            note(f"{spec}: skipped, {sentence}")
        if not task.chat:
            continue
        text, _ = render(loaded.tokenizer, task.problem(0, seed=job.seed).prompt, task.prompt_options(job.options))
        shown = text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} ... {text[-SHOWN // 2 :]}"
        note(f"{spec}, the first prompt:\n{shown}")


def run_and_show(
    job: ReplayJob | GenerateJob, loaded: LoadedModel | Endpoint, out: Path, *, quiet: bool, name: str | None = None
) -> dict[str, Any]:
    """Run a job into a folder, recorded under the command `name`; print its tables unless `quiet`.

    Returns what `--json` prints.
    """
    from reasonkv.evaluate.cells import count_steps
    from reasonkv.evaluate.endpoint import Endpoint
    from reasonkv.evaluate.published import with_published
    from reasonkv.evaluate.records import RECORDS
    from reasonkv.evaluate.remote import run_remote
    from reasonkv.evaluate.run import run
    from reasonkv.evaluate.sanity import sanity_warnings
    from reasonkv.evaluate.table import summarize, summary_dicts, to_frame
    from reasonkv.report import terminal
    from reasonkv.report.charts import replay_figure
    from reasonkv.report.wording import selecting

    with progress_bars(count_steps(job)) as progress:
        if isinstance(loaded, Endpoint):
            frame = to_frame(run_remote(cast(GenerateJob, job), loaded, out, progress, command=name))
        else:
            job = with_published(job, loaded)
            frame = to_frame(run(job, loaded, out, progress, command=name))
    summary = summarize(frame)
    found: dict[str, Any] = {"out": str(out), "records": str(out / RECORDS), "rows": summary_dicts(summary)}
    shown = [f"Records: {show(out / RECORDS)}"]
    if isinstance(job, GenerateJob):
        tables = terminal.answers_tables(summary)
        caption = terminal.answers_caption(frame, job.sampling if job.sampling.draws else None)
    else:
        tables = [*terminal.replay_tables(summary), *terminal.diagnostic_tables(summary)]
        caption = terminal.replay_caption(frame)
        # what is read in all is no match for what is held beside the prompt
        read = selecting(frame) if job.budget.prompt == "on_top" else []
        drawn = summary[~summary["method"].isin(read)]
        found["figure"] = None
        if (drawn["tokens"] > 0).any():
            by_mean, note_under = bool(job.budget.mean_slots), terminal.figure_note(frame)
            found["figure"] = str(replay_figure(drawn, out / FIGURE, by_mean=by_mean, note=note_under))
            shown.append(f"Figure:  {show(out / FIGURE)}")
    found["warnings"] = warnings = sanity_warnings(frame)
    if not quiet:
        print_tables(tables, caption, warnings=warnings)
        print("\n".join(shown))
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

    Prints each budget found as a line of Python and a command to serve it. Another --target, --resolution or replay
    --metric reuses what --out holds; `reasonkv frontier` and `report` read it, too.
    """
    from reasonkv.cli.ready import python_line, serve_line
    from reasonkv.evaluate.matching import sized
    from reasonkv.evaluate.tune import check_search, tune
    from reasonkv.report.frontier import SEARCH_SENTENCE, search_tables

    target, rule, methods = check_search(job)
    loaded = load(model, out)

    def tell(point: Any, probe: Any) -> None:
        size = sized(rule, probe.tokens).label
        if point is None:
            note(f"  @ {size}: nothing was compressed")
        else:
            words = "kept" if probe.keeps else "missed"
            note(f"  {point.task}: {point.method} @ {size}: {job.metric} {point.mean:.4g}, {words}")

    with progress_bars(len(job.task) * (1 + 6 * len(methods))) as progress:
        found = tune(job, loaded, out, progress, on_probe=tell)
    lines = [
        [python_line(one.method, job.budget, one.tokens), serve_line(loaded.name, one.method, job.budget, one.tokens)]
        if one.tokens is not None
        else []
        for one in found
    ]
    if json:
        searches = [one.to_dict() | {"use": own} for one, own in zip(found, lines, strict=True)]
        print_json({"out": out, "target": str(target), "resolution": job.resolution, "metric": job.metric,
                    "searches": searches})  # fmt: skip
        return
    print_tables(search_tables(found, job.budget.window), SEARCH_SENTENCE)
    for one, own in zip(found, lines, strict=True):
        if own:
            print("\n".join([f"{one.task}, {one.method}:", *(f"  {line}" for line in own)]))
    print(f"Records: {show(out)}")
