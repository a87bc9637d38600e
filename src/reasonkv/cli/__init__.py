"""The command line: commands parse, call the Python API and print. A command's module is imported when it is named."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from cyclopts import App, Group, Parameter

from reasonkv import __version__
from reasonkv.cli.config import STANDARD_INPUT, from_file
from reasonkv.cli.mistakes import INTERRUPTED, UsageError, explain
from reasonkv.numbers import misfit

__all__ = ["main", "make_app", "run"]

COMMANDS = {
    "Start here": ("results:demo", "info:methods", "info:tasks", "info:doctor"),
    "Use a model": (
        "generate:generate",
        "serve:serve",
        "capacity:plan_capacity",
        "prepare:calibrate",
        "prepare:train_gate",
    ),
    "Measure": ("jobs:replay", "jobs:evaluate", "jobs:tune", "plan:run"),
    "Read results": ("results:report", "results:frontier", "inspect:inspect", "results:compare"),
}


def make_app() -> App:
    """Return the `reasonkv` application."""
    app = App(
        name="reasonkv",
        help="Bound the KV cache of a language model, and measure what that costs.",
        version=__version__,
        config=from_file,
        default_parameter=Parameter(negative=(), allow_repeating=True),
        group_commands=Group("Options", sort_key=len(COMMANDS)),
        suppress_keyboard_interrupt=False,
    )
    for place, (title, commands) in enumerate(COMMANDS.items()):
        group = Group(title, sort_key=place)
        for order, command in enumerate(commands):
            app.command(f"reasonkv.cli.{command}", group=group, sort_key=order)
    app.register_install_completion_command(help="Install completion for this shell; --shell names another.")
    return app


def run(arguments: Sequence[str]) -> int:
    """Run one command line.

    Returns:
        The exit code: 0 done, 1 the job failed, 2 the command was used wrongly, 130 interrupted.
    """
    tokens = [STANDARD_INPUT if one == "-" else one for one in arguments]
    try:
        for token in tokens:
            if (wrong := misfit(token)) is not None:
                raise UsageError(f"An argument of the command line cannot be used: {wrong}.")
        app = make_app()
        if not tokens or tokens[0] in app.help_flags:
            app.resolved_commands()  # the list shows the first line of each
        code = app(tokens, exit_on_error=False, print_error=False, result_action="return_value")
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("Stopped; the same command continues where it stopped.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        sentence, code = explain(error, tokens)
        print(f"Error: {sentence}", file=sys.stderr)
    return code if isinstance(code, int) else 0


def main() -> None:
    """Run the `reasonkv` script."""
    sys.exit(run(sys.argv[1:]))
