"""`reasonkv frontier`: usable budgets and crossings, from results folders or by a search over real runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reasonkv.cli import common
from reasonkv.cli.budgets import make_budget, make_windows
from reasonkv.cli.common import UsageError, expected_errors, note

if TYPE_CHECKING:
    from reasonkv.evaluate.bisection import Probe
    from reasonkv.evaluate.evaluator import EvaluateJob
    from reasonkv.evaluate.frontier import Axis, Point, Target
    from reasonkv.evaluate.runner import ReplayJob

_AXES = ("tokens", "physical_mean", "bytes_held")
_TARGETS = {"top1": "0.95x", "accuracy": "0.95x", "nll": "1.05x", "kl": "0.05"}
_SEARCH = "Search by bisection, instead of DIR"


@expected_errors
def frontier(
    folders: Annotated[
        list[Path] | None, typer.Argument(metavar="[DIR...]", help="Results folders of replay or of evaluate.")
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(help="top1, nll, kl (replay) or accuracy (evaluate). Unless given, top1 or accuracy."),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="What has to be kept: 0.95 absolute, 0.95x relative to full KV. Unless given, 0.95x "
            "(nll: 1.05x, kl: 0.05)."
        ),
    ] = None,
    axis: Annotated[str, typer.Option(help="Budgets in tokens, physical_mean or bytes_held.")] = "tokens",
    between: Annotated[
        str | None,
        typer.Option(
            help="Two methods, 'cask > triattention': compare just these, at equal budgets and at smaller ones of the "
            "first."
        ),
    ] = None,
    figure: Annotated[Path | None, typer.Option(help="Draw the frontier into this PNG.")] = None,
    task: Annotated[
        str | None, typer.Option(help="Tasks, with dials: program,recall:distance=900.", rich_help_panel=_SEARCH)
    ] = None,
    methods: Annotated[
        str | None, typer.Option(help="Methods, with options: rkv,snapkv:KEY=VALUE.", rich_help_panel=_SEARCH)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Results folder of all probes; another --target or --metric reuses them.", rich_help_panel=_SEARCH
        ),
    ] = None,
    model: common.Model = "testbed",
    limit: common.Limit = 16,
    resolution: Annotated[
        float, typer.Option(help="Stop when the bracket is this narrow, as a ratio.", rich_help_panel=_SEARCH)
    ] = 1.1,
    seed: common.Seed = 0,
    window: common.SearchedWindow = None,
    window_buffer: common.WindowBuffer = 64,
    interval: common.Interval = 128,
    sinks: common.Sinks = 4,
    recent: common.Recent = 64,
    prompt_policy: common.PromptPolicy = "count",
    trigger: common.Trigger = "occupancy",
    trigger_counts: common.TriggerCounts = "all",
    cut_prompt: common.CutPrompt = "prefill",
    prefill_chunk: common.PrefillChunk = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Most output tokens, as in replay and evaluate.", rich_help_panel=_SEARCH),
    ] = None,
    batch_size: common.BatchSize = 16,
    calibration: common.CalibrationFile = None,
    dtype: common.Dtype = "auto",
    device: common.Device = "auto",
    json: common.Json = False,
) -> None:
    """Say which budget each method needs, and where a smaller budget of one beats a larger of another.

    The usable budget is the smallest from which on every measured budget keeps the target. Only records whose decoding
    went on compressing count (decode-active). With DIR, it is read off finished results; with --task and --methods, the
    budgets to run are found by bisection.

    Example: [b]reasonkv frontier results --target 0.95x --figure frontier.png[/b]

    Example: [b]reasonkv frontier --task program --methods random,rkv --prompt-policy on_top --out search[/b]
    """
    if axis not in _AXES:
        raise UsageError(f"--axis must be one of {', '.join(_AXES)}, not {axis!r}.")
    if figure is not None and figure.is_dir():
        raise UsageError(f"{figure} is a folder; give --figure a file name, as in {figure / 'frontier.png'}.")
    searching = {"--task": task, "--methods": methods, "--out": out}
    given = [name for name, value in searching.items() if value is not None]
    if folders:
        if given:
            raise UsageError(f"Give either results folders or a search ({given[0]}), not both.")
        _read(folders, metric, target, axis, _pair(between), figure, json)  # type: ignore[arg-type]
        return
    if between is not None:
        raise UsageError("--between reads finished results; give their folders.")
    missing = [name for name in searching if name not in given]
    if not given:
        raise UsageError("Give results folders, or --task, --methods and --out for a search.")
    if missing:
        raise UsageError(f"A search needs {' and '.join(missing)} as well.")
    if axis != "tokens":
        raise UsageError(f"A search is over tokens; read its folder afterwards with --axis {axis}.")
    assert task is not None
    assert methods is not None
    assert out is not None
    common.check_limit(limit)
    wanted = _target(metric or "top1", target)
    if window is not None:
        (rule,) = make_windows(window, window_buffer, "0.5")  # the search finds the retention
    else:
        rule = make_budget(
            max(1, sinks + recent), interval=interval, sinks=sinks, recent=recent, prompt=prompt_policy,
            trigger=trigger, trigger_counts=trigger_counts, cut_prompt=cut_prompt, prefill_chunk=prefill_chunk,
        )  # fmt: skip
    settings: dict[str, Any] = {
        "tasks": common.split_tasks(task), "methods": common.split_methods(methods), "budgets": [rule],
        "limit": limit, "seed": seed, "batch_size": batch_size,
    }  # fmt: skip
    job = _job(wanted, max_new_tokens, settings)
    _search(job, wanted, resolution, figure, out, json, (model, dtype, device, calibration))


def _pair(text: str | None) -> tuple[str, str] | None:
    """The labels of two methods in 'A > B'."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(">")]
    if len(parts) != 2 or not all(parts):
        raise UsageError(f"--between takes two methods, as in 'cask > triattention', not {text!r}.")
    from reasonkv.methods import get_method

    ours, theirs = (get_method(part).spec() for part in parts)
    return ours, theirs


def _target(metric: str, text: str | None) -> Target:
    from reasonkv.evaluate.frontier import Target

    return Target.parse(text if text is not None else _TARGETS.get(metric, ""), metric)


def _job(wanted: Target, max_new_tokens: int | None, settings: dict[str, Any]) -> ReplayJob | EvaluateJob:
    if wanted.metric == "accuracy":
        from reasonkv.evaluate.evaluator import EvaluateJob

        return EvaluateJob(max_new_tokens=max_new_tokens, **settings)
    from reasonkv.evaluate.runner import ReplayJob
    from reasonkv.evaluate.traces import TraceSettings

    traces = TraceSettings() if max_new_tokens is None else TraceSettings(max_new_tokens=max_new_tokens)
    return ReplayJob(traces=traces, **settings)


def _read(
    folders: list[Path],
    metric: str | None,
    target: str | None,
    axis: Axis,
    pair: tuple[str, str] | None,
    figure: Path | None,
    json: bool,
) -> None:
    """Usable budgets and crossings of finished results."""
    from reasonkv.evaluate.frontier import FrontierError, joined
    from reasonkv.evaluate.results import load_results
    from reasonkv.report.frontier_summary import summarize_frontier

    results = [load_results(folder) for folder in folders]
    wanted = _target(metric or ("accuracy" if results[0].answers else "top1"), target)
    records = joined(results)
    if all(record.budget is None for record in records):
        raise FrontierError("These results hold full KV alone; a frontier needs bounded methods.")
    found = summarize_frontier(records, wanted, axis, pair=pair)
    drawn = _draw(found.points, figure, wanted, found.left_out)
    if json:
        common.print_json(
            {"folders": [str(one) for one in folders], "figure": str(drawn) if drawn else None, **found.to_dict()}
        )
        return
    from rich.console import Console

    console = Console(width=common.width() or None)
    for table in found.tables():
        console.print(table)
    for sentence in found.sentences():
        console.print(sentence, style="dim", highlight=False)
    if drawn:
        typer.echo(f"Figure:  {common.show(drawn)}")


def _draw(points: list[Point], path: Path | None, wanted: Target, left_out: str) -> Path | None:
    if path is None:
        return None
    try:
        from reasonkv.report.frontier_figures import draw_frontier
    except ImportError:
        note("No figure without matplotlib; install it with: pip install 'reasonkv[report]'")
        return None
    words = f"Band: one standard error over examples. Target: {wanted}. {left_out}"
    return draw_frontier(points, path, wanted.metric, target=wanted, note=words)


def _search(
    job: ReplayJob | EvaluateJob,
    wanted: Target,
    resolution: float,
    figure: Path | None,
    out: Path,
    json: bool,
    model: common.ModelChoice,
) -> None:
    """Bisect, then say what was found."""
    from reasonkv.evaluate.bisection import check_search, search_budgets
    from reasonkv.evaluate.frontier import joined
    from reasonkv.evaluate.matching import sized
    from reasonkv.evaluate.results import load_results
    from reasonkv.report.frontier_summary import summarize_frontier
    from reasonkv.report.frontier_tables import search_sentences, search_tables

    check_search(job, wanted, resolution)  # said before the model takes its time to load
    loaded = common.open_model(*model)
    note(f"{loaded.name}: {loaded.dtype} on {loaded.device_name}; results in {common.show(out)}")

    def tell(point: Point | None, probe: Probe) -> None:
        size = sized(job.budgets[0], probe.tokens).label
        if point is None:
            note(f"  @ {size}: no decode-active record")
            return
        verdict = "kept" if probe.keeps else "missed"
        note(f"  {point.task}: {point.method} @ {size}: {wanted.metric} {point.mean:.4g}, {verdict}")

    with common.progress_bars(len(job.tasks) * (1 + 6 * len(job.methods))) as progress:
        searches = search_budgets(job, loaded, out, wanted, resolution=resolution, progress=progress, on_probe=tell)
    # the folder may hold probes of other targets as well: the figure shows them all
    found = summarize_frontier(joined([load_results(out)]), wanted)
    drawn = _draw(found.points, figure, wanted, found.left_out)
    if json:
        data = {"out": str(out), "target": str(wanted), "resolution": resolution, "metric": wanted.metric}
        searched = [one.to_dict() for one in searches]
        common.print_json(data | {"figure": str(drawn) if drawn else None, "searches": searched})
        return
    from rich.console import Console

    console = Console(width=common.width() or None)
    for table in search_tables(searches, getattr(job.budgets[0], "size", None)):
        console.print(table)
    for sentence in search_sentences(found.left_out):
        console.print(sentence, style="dim", highlight=False)
    typer.echo(f"Records: {common.show(out)}" + (f"\nFigure:  {common.show(drawn)}" if drawn else ""))
