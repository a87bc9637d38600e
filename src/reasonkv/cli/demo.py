"""`reasonkv demo`: the whole story on the bundled model, from two tables to a page with a trace to click through."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reasonkv.cli import common
from reasonkv.cli.common import expected_errors, note
from reasonkv.cli.evaluate import evaluate_and_show
from reasonkv.cli.replay import replay_and_show

if TYPE_CHECKING:
    from reasonkv.models import LoadedModel


@expected_errors
def demo(
    out: Annotated[Path, typer.Option(help="Results folder.")] = Path("reasonkv-demo"),
    limit: Annotated[int, typer.Option(help="Problems per family.")] = 8,
    seed: common.Seed = 0,
    batch_size: common.BatchSize = 8,
    device: common.Device = "auto",
    show: Annotated[
        bool | None, typer.Option("--open/--no-open", help="Open the report in a browser [default: in a terminal].")
    ] = None,
    json: common.Json = False,
) -> None:
    """See the main job on the bundled model: what ten methods keep of full KV, and whether the answers stay right.

    Replays full KV's traces (fidelity), then lets every method answer by itself (accuracy), and writes report.html with
    figures, tables and a trace whose every token shows when it was dropped. A few minutes on two CPU cores, no network.

    Example: [b]reasonkv demo[/b]
    """
    from reasonkv.evaluate.demo import WHAT_TO_LOOK_AT, answers_job, replay_job
    from reasonkv.report.report import write_report

    common.check_limit(limit)
    loaded = common.open_model("testbed", "auto", device)
    note(f"{loaded.name}: {loaded.dtype} on {loaded.device_name}; results in {common.show(out)}")
    replays, answers = out / "replay", out / "answers"
    first = replay_and_show(replay_job(limit=limit, seed=seed, batch_size=batch_size), loaded, replays, quiet=json)
    second = evaluate_and_show(answers_job(limit=limit, seed=seed, batch_size=batch_size), loaded, answers, quiet=json)
    _inspect(loaded, replays, answers)
    page = write_report([answers, replays], out / "report.html", title="reasonkv demo")
    if json:
        common.print_json({"replay": first, "answers": second, "report": str(page)})
        return
    typer.echo("\n".join(["What to look at:", *(f"  - {line}" for line in WHAT_TO_LOOK_AT)]))
    typer.echo(f"Report:  {common.show(page)}")
    if show if show is not None else sys.stdout.isatty():
        typer.launch(page.resolve().as_uri())


def _inspect(loaded: LoadedModel, replays: Path, answers: Path) -> None:
    """One replayed and one generated trace for the page, each of a run that went wrong if there is one."""
    from reasonkv.cli.inspect import folder_inspection
    from reasonkv.evaluate.demo import INSPECTED_METHOD, INSPECTED_TASK, INSPECTED_TOKENS
    from reasonkv.report.inspector import save_inspection

    for folder in (answers, replays):
        made = folder_inspection(folder, loaded, task=INSPECTED_TASK, method=INSPECTED_METHOD, budget=INSPECTED_TOKENS)
        save_inspection(folder, made.data)
