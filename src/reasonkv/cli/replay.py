"""`reasonkv replay`: full KV's traces through bounded caches, as a table and a figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reasonkv.cli import common
from reasonkv.cli.budgets import make_budgets
from reasonkv.cli.common import UsageError, expected_errors, note

if TYPE_CHECKING:
    from reasonkv.evaluate.runner import ReplayJob
    from reasonkv.evaluate.summary import Row
    from reasonkv.models import LoadedModel

_SOURCES = ("greedy", "sampled", "reference")
FIGURE = "frontier.png"


@expected_errors
def replay(
    task: common.Tasks,
    methods: common.Methods,
    out: common.Out,
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
    traces: Annotated[
        str,
        typer.Option(
            help="Where traces come from: greedy, sampled or reference (the task's).", rich_help_panel="Traces"
        ),
    ] = "greedy",
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Most output tokens of a trace.", rich_help_panel="Traces")
    ] = 2048,
    temperature: Annotated[float, typer.Option(min=0.01, help="Of sampled traces.", rich_help_panel="Traces")] = 0.6,
    top_p: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Of sampled traces.", rich_help_panel="Traces")
    ] = 0.95,
    diagnostics: Annotated[
        bool,
        typer.Option(
            "--diagnostics",
            help="Also measure what was lost, against full KV's attention over the trace; takes about twice as long.",
        ),
    ] = False,
    batch_size: common.BatchSize = 16,
    calibration: common.CalibrationFile = None,
    dtype: common.Dtype = "auto",
    device: common.Device = "auto",
    json: common.Json = False,
) -> None:
    """Replay full KV's traces through bounded caches and score every token.

    Full KV writes each trace once. A method is then fed the same tokens, and every output token is scored against full
    KV's own prediction. Leaves records.jsonl, manifest.json, the traces and frontier.png in --out.

    Example: [b]reasonkv replay --task program --methods full,random,rkv --budgets 128,256 --limit 8 --out results[/b]
    """
    from reasonkv.evaluate.runner import ReplayJob
    from reasonkv.evaluate.traces import TraceSettings

    common.check_limit(limit)
    if traces not in _SOURCES:
        raise UsageError(f"--traces must be one of {', '.join(_SOURCES)}, not {traces!r}.")
    chosen = common.split_methods(methods)
    solved, means = make_budgets(
        budgets, mean_slots, methods=chosen, window=window, window_buffer=window_buffer, retention=retention,
        interval=interval, sinks=sinks, recent=recent, prompt=prompt_policy, trigger=trigger,
        trigger_counts=trigger_counts, cut_prompt=cut_prompt, prefill_chunk=prefill_chunk,
    )  # fmt: skip
    job = ReplayJob(
        tasks=common.split_tasks(task),
        methods=chosen,
        budgets=solved,
        mean_slots=means,
        limit=limit,
        seed=seed,
        traces=TraceSettings(traces, max_new_tokens, temperature, top_p),  # type: ignore[arg-type]
        batch_size=batch_size,
        diagnostics=diagnostics,
    )
    _run(job, (model, dtype, device, calibration), out, json)


def _run(job: ReplayJob, model: common.ModelChoice, out: Path, json: bool) -> None:
    job.cells()  # mistakes in budgets are said before the model takes its time to load
    loaded = common.open_model(*model)
    note(f"{loaded.name}: {loaded.dtype} on {loaded.device_name}; results in {common.show(out)}")
    result = replay_and_show(job, loaded, out, quiet=json)
    if json:
        common.print_json(result)


def replay_and_show(job: ReplayJob, loaded: LoadedModel, out: Path, *, quiet: bool) -> dict[str, Any]:
    """Run a replay into `out` and, unless `quiet`, print its tables; what `--json` prints."""
    from reasonkv.evaluate.records import RECORDS
    from reasonkv.evaluate.runner import run_replay
    from reasonkv.evaluate.summary import summarize
    from reasonkv.report.cohorts import selecting_labels
    from reasonkv.report.tables import caption, diagnostic_tables, figure_note, replay_tables

    with common.progress_bars(job.steps) as progress:
        records = run_replay(job, loaded, out, progress)
    rows = summarize(records)
    # what is read in all is no match for what is held beside the prompt
    on_top = any(budget.prompt == "on_top" for budget in job.budgets)
    drawn = [row for row in rows if not (on_top and row.method in selecting_labels(records))]
    figure = _draw(drawn, out / FIGURE, by_mean=bool(job.mean_slots), under=figure_note(records))
    if not quiet:
        from rich.console import Console

        console = Console(width=common.width() or None)
        for table in [*replay_tables(rows), *diagnostic_tables(rows)]:
            console.print(table)
        console.print(caption(records), style="dim", highlight=False)
        typer.echo(f"Records: {common.show(out / RECORDS)}" + (f"\nFigure:  {common.show(figure)}" if figure else ""))
    return {
        "out": str(out),
        "records": str(out / RECORDS),
        "figure": str(figure) if figure else None,
        "rows": [row.to_dict() for row in rows],
    }


def _draw(rows: Sequence[Row], path: Path, *, by_mean: bool, under: str) -> Path | None:
    """The figure, or None where there is nothing to draw or nothing to draw with."""
    if all(row.tokens is None for row in rows):
        return None
    try:
        from reasonkv.report.figures import frontier
    except ImportError:
        note("No figure without matplotlib; install it with: pip install 'reasonkv[report]'")
        return None
    return frontier(rows, path, x="physical_mean" if by_mean else "tokens", note=under)
