"""What the commands share: options, lists of specs, errors as one sentence, progress on stderr."""

from __future__ import annotations

import functools
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec

import typer

from reasonkv.errors import ReasonKVError

if TYPE_CHECKING:
    from reasonkv.methods import Method
    from reasonkv.models import LoadedModel

P = ParamSpec("P")

FAILED, USAGE = 1, 2
"""Exit codes: the job failed; the command was used wrongly."""

Model = Annotated[str, typer.Option(help="The bundled [b]testbed[/b], a model folder, or a hub name.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16 or float64.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
CalibrationFile = Annotated[
    Path | None,
    typer.Option("--calibration", help="Query statistics, made by [b]reasonkv calibrate[/b]; looked up by default."),
]
ModelChoice = tuple[str, str, str, Path | None]
"""Model, dtype, device and calibration file as given, for `open_model(*choice)`."""
Seed = Annotated[int, typer.Option(help="Seed of problems, sampling and methods.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Rows at once.")]
Tasks = Annotated[str, typer.Option("--task", help="Tasks, with dials: program,recall:distance=900.")]
Methods = Annotated[str, typer.Option(help="Methods, with options: full,snapkv,rkv:KEY=VALUE.")]
Out = Annotated[Path, typer.Option(help="Results folder; the same command continues where it stopped.")]
Limit = Annotated[int, typer.Option(help="Problems per task.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 is greedy.")]
TopP = Annotated[float, typer.Option(min=0.01, max=1.0, help="Nucleus, with a temperature.")]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output on stdout.")]
_BUDGET = "Budget"
Interval = Annotated[int, typer.Option(help="Tokens between two compactions.", rich_help_panel=_BUDGET)]
Sinks = Annotated[int, typer.Option(help="First tokens that are never dropped.", rich_help_panel=_BUDGET)]
Recent = Annotated[int, typer.Option(help="Newest tokens that are never dropped.", rich_help_panel=_BUDGET)]
PromptPolicy = Annotated[
    str,
    typer.Option(
        help="[b]count[/b]: the prompt is inside the budget and may be dropped; [b]keep[/b]: inside and never dropped; "
        "[b]on_top[/b]: never dropped and not counted.",
        rich_help_panel=_BUDGET,
    ),
]
Trigger = Annotated[
    str,
    typer.Option(
        help="[b]occupancy[/b]: compact at budget + interval slots; [b]grid[/b]: at multiples of the interval.",
        rich_help_panel=_BUDGET,
    ),
]
TriggerCounts = Annotated[
    str, typer.Option(help="What the grid trigger counts: all or decode.", rich_help_panel=_BUDGET)
]
CutPrompt = Annotated[
    str, typer.Option(help="When a long prompt is cut: prefill or first_event.", rich_help_panel=_BUDGET)
]
PrefillChunk = Annotated[
    int | None, typer.Option(help="Also cut inside the prompt, every so many tokens.", rich_help_panel=_BUDGET)
]
Budgets = Annotated[
    str | None,
    typer.Option(help="Slots per KV head and layer after a compaction: 128,256,512.", rich_help_panel=_BUDGET),
]
MeanSlots = Annotated[
    str | None,
    typer.Option(
        help="Instead of --budgets: mean slots attended per output token; the budget is solved for each.",
        rich_help_panel=_BUDGET,
    ),
]

WindowSize = Annotated[
    int | None,
    typer.Option(
        "--window",
        help="Instead of --budgets: cut every window of so many decoded tokens once, as Kara does; prompt and newest "
        "tokens stay, and the other options of a budget do not apply.",
        rich_help_panel=_BUDGET,
    ),
]
SearchedWindow = Annotated[
    int | None,
    typer.Option(
        "--window",
        help="Search windows instead: of every so many decoded tokens, how many slots have to stay.",
        rich_help_panel=_BUDGET,
    ),
]
WindowBuffer = Annotated[int, typer.Option(help="With --window: newest tokens that stay raw.", rich_help_panel=_BUDGET)]
Retention = Annotated[
    str, typer.Option(help="With --window: shares of a window that stay: 0.2,0.3.", rich_help_panel=_BUDGET)
]


class UsageError(ReasonKVError, ValueError):
    """Arguments that no command can carry out; the message is one sentence."""


def expected_errors(function: Callable[P, None]) -> Callable[P, None]:
    """Turn every error a user can cause into one sentence on stderr and the right exit code.

    Other errors keep their traceback, since they are defects.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            function(*args, **kwargs)
        except (typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt:
            typer.echo("Stopped; the same command continues where it stopped.", err=True)
            raise typer.Exit(130) from None
        except Exception as error:
            code = _exit_code(error)
            if code is None:
                raise
            typer.echo("Error: " + " ".join(_message(error).split()), err=True)
            raise typer.Exit(code) from None

    return run


def _exit_code(error: Exception) -> int | None:
    import torch

    from reasonkv.budget import BudgetError
    from reasonkv.calibration import CalibrationError
    from reasonkv.evaluate.decoding import DecodingError
    from reasonkv.evaluate.evaluator import EvaluateError
    from reasonkv.evaluate.frontier import FrontierError
    from reasonkv.evaluate.manifest import ResultsError
    from reasonkv.evaluate.records import RecordError
    from reasonkv.evaluate.replay import ReplayError
    from reasonkv.evaluate.traces import TraceError
    from reasonkv.methods import MethodError
    from reasonkv.models import ModelError
    from reasonkv.runtimes.transformers import UnsupportedModelError
    from reasonkv.tasks import TaskError

    used_wrongly = (
        UsageError, BudgetError, MethodError, TaskError, ModelError, ResultsError, TraceError, UnsupportedModelError,
        EvaluateError, FrontierError, CalibrationError,
    )  # fmt: skip
    if isinstance(error, used_wrongly):
        return USAGE
    if isinstance(error, (RecordError, ReplayError, DecodingError, OSError, torch.OutOfMemoryError)):
        return FAILED
    return None


def _message(error: Exception) -> str:
    if type(error).__name__ == "OutOfMemoryError":
        return "The device ran out of memory; lower --batch-size, or use --dtype bfloat16."
    return str(error)


def split_specs(text: str) -> list[str]:
    """Split `a,b:key=1,other=2,c` into `a`, `b:key=1,other=2` and `c`: a part `key=value` belongs to the spec before.

    Raises:
        UsageError: nothing is named.
    """
    specs: list[str] = []
    for part in (piece.strip() for piece in text.split(",")):
        if not part:
            continue
        key, equals, _ = part.partition("=")
        if specs and equals and ":" not in key:
            specs[-1] += "," + part
        else:
            specs.append(part)
    if not specs:
        raise UsageError(f"{text!r} names nothing; separate names with commas.")
    return list(dict.fromkeys(specs))


def whole_numbers(text: str, option: str) -> list[int]:
    """Whole numbers separated by commas, each once, as given.

    Raises:
        UsageError: something else.
    """
    try:
        numbers = [int(part) for part in text.replace("_", "").split(",") if part.strip()]
    except ValueError:
        numbers = []
    if not numbers:
        raise UsageError(f"{option} takes whole numbers separated by commas, as in 128,256,512, not {text!r}.")
    return list(dict.fromkeys(numbers))


def split_tasks(text: str) -> list[str]:
    """The task specs of `--task`.

    Raises:
        UsageError, TaskError: one of them does not exist.
    """
    from reasonkv.tasks import get_task

    specs = split_specs(text)
    for spec in specs:
        get_task(spec)
    return specs


def split_methods(text: str) -> list[Method]:
    """The methods of `--methods`.

    Raises:
        UsageError, MethodError: one of them does not exist.
    """
    from reasonkv.methods import get_method

    return [get_method(spec) for spec in split_specs(text)]


def quiet_libraries() -> None:
    """Keep the libraries that load models from writing over our own progress and errors."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def open_model(model: str, dtype: str, device: str, calibration: Path | None = None) -> LoadedModel:
    """Load a model without the noise its libraries make on the way."""
    from reasonkv.models import load_model

    quiet_libraries()
    return load_model(model, dtype, device, calibration)


def print_json(data: Any) -> None:
    """One JSON document on stdout; dataclasses become objects."""
    if is_dataclass(data) and not isinstance(data, type):
        data = asdict(data)
    typer.echo(json.dumps(data, indent=2, default=str))


def note(text: str) -> None:
    """One line for people, on stderr."""
    typer.echo(text, err=True)


@contextmanager
def progress_bars(total: int) -> Iterator[Callable[[str, int, int], None]]:
    """Progress on stderr: bars on a terminal, one line per finished step elsewhere.

    Args:
        total: steps in all.

    Yields:
        A function of (what, done, of how many), called as a step advances.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        began = time.perf_counter()

        def line(what: str, done: int, of: int) -> None:
            nonlocal began
            if done >= of:
                now = time.perf_counter()
                note(f"{what}: {of} in {now - began:.1f} s")
                began = now

        yield line
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        overall = bars.add_task("all steps", total=total)
        current = bars.add_task("", total=None)

        def bar(what: str, done: int, of: int) -> None:
            bars.update(current, description=what, completed=done, total=of)
            if done >= of:
                bars.advance(overall)

        yield bar


def check_limit(limit: int) -> None:
    """Refuse a limit that leaves nothing to do.

    Raises:
        UsageError: below 1.
    """
    if limit < 1:
        raise UsageError(f"--limit must be at least 1, not {limit}.")


def width() -> int:
    """Columns for tables where stdout is no terminal: wide enough for every column of ours."""
    return 0 if sys.stdout.isatty() else 150


def show(path: Path) -> str:
    """A path as a person would type it from here."""
    try:
        return str(path.resolve().relative_to(Path.cwd().resolve()))
    except ValueError:
        return str(path)
