"""Train the bundled testbed model by its recipe; a stopped run continues from its last checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter
from rich.console import Console

from tools.testbed.recipe import Recipe
from tools.testbed.training import TrainingError, train

app = App(name="python -m tools.testbed", help=__doc__, version_flags=[])


@app.default
def run(
    *,
    out: Path = Path("testbed-run"),
    recipe: Literal["bundled", "smoke"] = "bundled",
    minutes: float | None = None,
    resume: Annotated[bool, Parameter(negative="--no-resume")] = True,
) -> int:
    """Train the bundled testbed model by its recipe; a stopped run continues from its last checkpoint.

    Args:
        out: folder of the run: checkpoints, log, curve, and model/ at the end.
        recipe: `smoke` trains a tiny model in seconds, to test the machinery.
        minutes: end after so much training time.
        resume: continue the run found in `out`.
    """
    chosen = Recipe.bundled() if recipe == "bundled" else Recipe.smoke()
    try:
        result = train(chosen, out, resume=resume, minutes=minutes, console=Console(stderr=True))
    except TrainingError as error:
        print(error, file=sys.stderr)
        return 1
    done = result.progress
    print(f"Trained on {done.tokens:,} tokens in {done.seconds:,.0f} s ({done.step:,} steps).")
    print(f"Model: {result.model_path}\nCurve: {result.curve_path}")
    return 0


if __name__ == "__main__":
    sys.exit(app())
