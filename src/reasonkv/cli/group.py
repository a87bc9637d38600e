"""The command group: a mistake on the command line is one sentence here too, not a box."""

from __future__ import annotations

import sys
from typing import Any

import typer
from typer.core import TyperGroup

from reasonkv.cli.common import USAGE


class OneSentenceGroup(TyperGroup):
    """Prints what is wrong with options and command names as one sentence, like every other expected error."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run; with `standalone_mode` (the default) end the process with the right exit code."""
        if not kwargs.get("standalone_mode", True):
            return super().main(*args, **kwargs)
        kwargs["standalone_mode"] = False
        try:
            code = super().main(*args, **kwargs)
        except typer.Abort:
            sys.exit(130)
        except Exception as error:
            # typer has its own copy of click, or click itself, depending on its version: the shape tells
            if type(error).__name__ == "NoArgsIsHelpError":
                error.show()  # type: ignore[attr-defined]
                sys.exit(USAGE)
            if not hasattr(error, "format_message"):
                raise
            context = getattr(error, "ctx", None)
            command = context.command_path if context is not None else "reasonkv"
            message = " ".join(error.format_message().split()).rstrip(".")
            typer.echo(f"Error: {message}; see `{command} --help`.", err=True)
            sys.exit(getattr(error, "exit_code", USAGE))
        sys.exit(code if isinstance(code, int) else 0)
