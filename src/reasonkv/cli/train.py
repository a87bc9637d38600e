"""`reasonkv train-testbed`: train the bundled model again."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from reasonkv.cli import common
from reasonkv.cli.common import UsageError, expected_errors


@expected_errors
def train_testbed(
    out: Annotated[Path, typer.Option(help="Folder of the run: checkpoints, log, curve, and model/ at the end.")] = (
        Path("testbed-run")
    ),
    recipe: Annotated[str, typer.Option(help="[b]bundled[/b], or [b]smoke[/b]: seconds, to test the machinery.")] = (
        "bundled"
    ),
    minutes: Annotated[float | None, typer.Option(min=0.01, help="End after so much training time.")] = None,
    resume: Annotated[bool, typer.Option(help="Continue the run found in --out.")] = True,
    json: common.Json = False,
) -> None:
    """Train the bundled testbed model by its recipe; a run that was stopped continues from its last checkpoint.

    Example: [b]reasonkv train-testbed --out testbed-run --minutes 60[/b]
    """
    from rich.console import Console

    from reasonkv.testbed import Recipe, train

    recipes = {"bundled": Recipe.bundled, "smoke": Recipe.smoke}
    if recipe not in recipes:
        raise UsageError(f"--recipe must be one of {', '.join(recipes)}, not {recipe!r}.")
    result = train(recipes[recipe](), out, resume=resume, minutes=minutes, console=Console(stderr=True))
    if json:
        common.print_json(
            {"model": str(result.model_path), "curve": str(result.curve_path), "progress": asdict(result.progress)}
        )
        return
    done = result.progress
    typer.echo(f"Trained on {done.tokens:,} tokens in {done.seconds:,.0f} s ({done.step:,} steps).")
    typer.echo(f"Model: {common.show(result.model_path)}\nCurve: {common.show(result.curve_path)}")
