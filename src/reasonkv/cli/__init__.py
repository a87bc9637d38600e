"""The command line: every command parses, calls the API, and renders. Heavy imports wait until a command runs."""

from __future__ import annotations

import typer

from reasonkv.cli.calibrate import calibrate
from reasonkv.cli.demo import demo
from reasonkv.cli.evaluate import evaluate
from reasonkv.cli.frontier import frontier
from reasonkv.cli.generate import generate
from reasonkv.cli.group import OneSentenceGroup
from reasonkv.cli.info import doctor, methods
from reasonkv.cli.inspect import inspect
from reasonkv.cli.replay import replay
from reasonkv.cli.report import report
from reasonkv.cli.serve import PASSED_ON, serve
from reasonkv.cli.train_gate import train_gate

__all__ = ["app", "main"]

app = typer.Typer(
    name="reasonkv",
    cls=OneSentenceGroup,
    help="A bounded KV cache for models that reason: compare compression methods with full KV, and use them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS = (
    demo, methods, doctor, generate, replay, evaluate, frontier, report, inspect, calibrate, train_gate
)  # fmt: skip
for command in COMMANDS:
    app.command(name=command.__name__.replace("_", "-"))(command)
app.command(context_settings=PASSED_ON)(serve)


def main() -> None:
    """Entry point of the `reasonkv` script."""
    app()
