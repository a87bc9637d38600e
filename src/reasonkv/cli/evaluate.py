"""`reasonkv evaluate`: answers by real generation through bounded caches, and how many of them are right."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reasonkv.cli import common
from reasonkv.cli.budgets import make_budgets
from reasonkv.cli.common import expected_errors, note

if TYPE_CHECKING:
    from reasonkv.evaluate.evaluator import EvaluateJob
    from reasonkv.models import LoadedModel

_GENERATION = "Generation"
DEFAULT_METHODS = "full,random,streaming,snapkv,rkv,keydiff"


@expected_errors
def evaluate(
    task: common.Tasks,
    out: common.Out,
    methods: common.Methods = DEFAULT_METHODS,
    budgets: common.Budgets = None,
    mean_slots: common.MeanSlots = None,
    window: common.WindowSize = None,
    window_buffer: common.WindowBuffer = 64,
    retention: common.Retention = "0.3",
    model: common.Model = "testbed",
    limit: common.Limit = 16,
    seed: common.Seed = 0,
    interval: common.Interval = 128,
    sinks: common.Sinks = 4,
    recent: common.Recent = 64,
    prompt_policy: common.PromptPolicy = "count",
    trigger: common.Trigger = "occupancy",
    trigger_counts: common.TriggerCounts = "all",
    cut_prompt: common.CutPrompt = "prefill",
    prefill_chunk: common.PrefillChunk = None,
    samples: Annotated[
        int, typer.Option(min=1, help="Answers per problem, with a temperature.", rich_help_panel=_GENERATION)
    ] = 1,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.", rich_help_panel=_GENERATION)] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Nucleus, with a temperature.", rich_help_panel=_GENERATION)
    ] = 0.95,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Most tokens of an answer. Unless given, 2,048 for full KV, and for the others 1.25 times its longest "
            "output of the task and 32 more.",
            rich_help_panel=_GENERATION,
        ),
    ] = None,
    batch_size: common.BatchSize = 16,
    calibration: common.CalibrationFile = None,
    dtype: common.Dtype = "auto",
    device: common.Device = "auto",
    json: common.Json = False,
) -> None:
    """Answer a task's problems by generating through bounded caches, and count the right answers.

    Full KV always answers first: accuracies are compared with its own on the same problems. Leaves records.jsonl,
    manifest.json and full KV's outputs in --out.

    Example: [b]reasonkv evaluate --task program --methods full,random,rkv --budgets 128,256 --limit 8 --out answers[/b]
    """
    from reasonkv.evaluate.evaluator import EvaluateJob
    from reasonkv.evaluate.generate import Sampling

    common.check_limit(limit)
    chosen = common.split_methods(methods)
    needed = (
        any(method.bounded for method in chosen) or budgets is not None or mean_slots is not None or window is not None
    )
    solved, means = ([], []) if not needed else make_budgets(
        budgets, mean_slots, methods=chosen, window=window, window_buffer=window_buffer, retention=retention,
        interval=interval, sinks=sinks, recent=recent, prompt=prompt_policy, trigger=trigger,
        trigger_counts=trigger_counts, cut_prompt=cut_prompt, prefill_chunk=prefill_chunk,
    )  # fmt: skip
    job = EvaluateJob(
        tasks=common.split_tasks(task),
        methods=chosen,
        budgets=solved,
        mean_slots=means,
        limit=limit,
        seed=seed,
        samples=samples,
        sampling=Sampling(temperature, top_p) if temperature > 0 else None,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )
    _run(job, (model, dtype, device, calibration), out, json)


def _run(job: EvaluateJob, model: common.ModelChoice, out: Path, json: bool) -> None:
    job.cells()  # mistakes in budgets are said before the model takes its time to load
    loaded = common.open_model(*model)
    note(f"{loaded.name}: {loaded.dtype} on {loaded.device_name}; results in {common.show(out)}")
    result = evaluate_and_show(job, loaded, out, quiet=json)
    if json:
        common.print_json(result)


def evaluate_and_show(job: EvaluateJob, loaded: LoadedModel, out: Path, *, quiet: bool) -> dict[str, Any]:
    """Run an evaluation into `out` and, unless `quiet`, print its tables; what `--json` prints."""
    from reasonkv.evaluate.accuracy import summarize_answers
    from reasonkv.evaluate.evaluator import run_evaluate
    from reasonkv.evaluate.records import RECORDS
    from reasonkv.report.answers_table import answers_caption, answers_tables
    from reasonkv.report.cohorts import what_was_read

    with common.progress_bars(job.steps) as progress:
        answers = run_evaluate(job, loaded, out, progress)
    rows = summarize_answers(answers)
    if not quiet:
        from rich.console import Console

        console = Console(width=common.width() or None)
        for table in answers_tables(rows, answers):
            console.print(table)
        console.print(answers_caption(answers, job.sampling), style="dim", highlight=False)
        typer.echo(f"Records: {common.show(out / RECORDS)}")
    read = what_was_read(answers)
    data = [
        row.to_dict() | {name: vars(one) for name, one in read.get((row.task, row.method, row.tokens), {}).items()}
        for row in rows
    ]
    return {"out": str(out), "records": str(out / RECORDS), "rows": data}
