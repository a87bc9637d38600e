"""`reasonkv inspect`: one trace's text with the fate of every token, as a page that needs no network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from reasonkv.cli.flags import GROUPS, ConfigFile, ModelFlags, Without, command
from reasonkv.cli.mistakes import UsageError
from reasonkv.evaluate.job import BudgetOptions, TraceSettings

if TYPE_CHECKING:
    pass

FILES = Parameter(group=GROUPS["output"])


@command
def inspect(
    folder: Path | None = None,
    /,
    *,
    task: str | None = None,
    example: int | None = None,
    method: str | None = None,
    budget: Annotated[BudgetOptions, Without(("mean_slots",))],
    traces: TraceSettings,
    generate: bool = False,
    seed: int = 0,
    model: str | None = None,
    loading: Annotated[ModelFlags, Without(("model",))],
    out: Annotated[Path, FILES] = Path("reasonkv-inspect.html"),
    save: Annotated[Path | None, FILES] = None,
    config: ConfigFile = None,
) -> None:
    """See which tokens a method kept while the model reasoned, and what that did to the answer.

    Example: `reasonkv inspect --task program --example 3 --method rkv --budget 128 --generate`

    Of a results folder without further choices: the first bounded method and budget, and the example that went wrong
    first.

    Args:
        folder: A results folder, whose traces and settings are used.
        task: A task, with dials; unless given, the folder's first, or program.
        example: Number of the problem.
        method: Method, with options; unless given, the folder's first, or rkv.
        generate: Let the compressed run write its own answer.
        seed: Seed of problems and methods.
        model: Unless given, the folder's, or the bundled testbed.
        out: The page to write.
        save: Also keep the data and the plans in this folder.
    """
    raise UsageError("later")
