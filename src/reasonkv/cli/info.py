"""`reasonkv methods` and `reasonkv doctor`: what there is, and whether it works here."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any

import typer

from reasonkv.cli import common
from reasonkv.cli.common import FAILED, expected_errors


@expected_errors
def methods(json: common.Json = False) -> None:
    """List the methods: name, what it keeps, options, paper, what it needs.

    Example: [b]reasonkv methods[/b]
    """
    from reasonkv.methods import catalogue

    rows = [_describe(cls) for cls in catalogue()]
    if json:
        common.print_json(rows)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(header_style="bold")
    for heading in ("method", "keeps", "options and defaults", "needs", "paper"):
        table.add_column(heading)
    for row in rows:
        options = ", ".join(f"{name}={value}" for name, value in row["options"].items()) or "-"
        table.add_row(row["name"], row["title"], options, ", ".join(row["needs"]) or "-", row["paper"])
    Console(width=common.width() or None).print(table)
    typer.echo("Give options as METHOD:KEY=VALUE,KEY=VALUE. Runtimes: transformers.")


def _describe(cls: Any) -> dict[str, Any]:
    options = {field.name: field.default for field in fields(cls)}
    needs = cls().needs
    wanted = {
        f"{needs.queries} recent queries": needs.queries,
        f"{needs.recent} newest slots kept": needs.recent,
        f"one choice per {needs.scope}": needs.scope != "head",
        "merges slots": needs.folds,
        "mass on logits (not on flash)": needs.log_mass,
        "calibration": needs.calibration,
        "every query": needs.observes,
        "token ids": needs.token_ids,
        "output projection": needs.output_projection,
        f"state per slot ({', '.join(needs.slot_state)})": needs.slot_state,
        "the future (replay only)": needs.future,
    }
    words = [text for text, is_wanted in wanted.items() if is_wanted]
    return {
        "name": cls.name,
        "title": cls.title,
        "paper": cls.paper,
        "bounded": cls.bounded,
        "options": options,
        "needs": words,
        "runtimes": ["transformers"],
    }


@expected_errors
def doctor(
    model: Annotated[str | None, typer.Option(help="Also say whether this model is supported.")] = None,
    json: common.Json = False,
) -> None:
    """Say which versions and devices there are, and whether a model is supported.

    Exit code 1 when something needs attention.

    Example: [b]reasonkv doctor --model Qwen/Qwen3-8B[/b]
    """
    from reasonkv.doctor import examine

    common.quiet_libraries()
    report = examine(model)
    if json:
        common.print_json(report)
    else:
        for name, value in report.versions.items():
            typer.echo(f"{name:<14}{value}")
        for device in report.devices:
            typer.echo(f"{'device':<14}{device}")
        typer.echo(f"{'testbed':<14}{report.testbed}")
        for name, value in report.model.items():
            typer.echo(f"{name:<14}{value}")
        for problem in report.problems:
            typer.echo(f"problem: {problem}")
        typer.echo(report.advice)
    if report.problems:
        raise typer.Exit(FAILED)
