"""`--config run.yaml`: options of a command from a file."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cyclopts import App, ArgumentCollection
from cyclopts.config import Dict

from reasonkv.cli.mistakes import UsageError

STANDARD_INPUT = "/dev/stdin"
"""What `-` stands for: prompts, texts and configuration files are read from there."""


def read_text(name: str | Path) -> str:
    """Return the text of a file, or what standard input has."""
    return sys.stdin.read() if str(name) == STANDARD_INPUT else Path(name).read_text(encoding="utf-8")


def from_file(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Fill in the options that the file of `--config` names and the command line does not.

    Raises:
        UsageError: the file cannot be read, or holds something else than options.
    """
    given = arguments.get("--config", None)
    if given is not None and given.tokens:
        name = given.tokens[-1].value
        Dict({commands[0]: read_options(name)}, source=name)(app, commands[:1], arguments)


def read_options(name: str, what: str = "--config") -> dict[str, Any]:
    """Return the options in a YAML or JSON file.

    Raises:
        UsageError: the file cannot be read, or holds something else than options.
    """
    import yaml

    try:
        options = yaml.safe_load(read_text(name))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise UsageError(f"{what} cannot read {name}: {reason}.") from None
    if not isinstance(options, dict):
        raise UsageError(f"{what} takes a YAML or JSON file of options, as in `task: program`, but {name} has none.")
    return options


def parse_options(app: App, command: str, options: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the arguments that a command would be called with, if its `--config` file held these options.

    Args:
        app: a new application, which is then of no further use.
        command: its name.
        options: as in the file.
        source: where they come from, for errors.

    Raises:
        CycloptsError: an option that the command does not have, or a value that does not fit.
    """
    app.config = (Dict({command: dict(options)}, source=source),)
    _, bound, _ = app.parse_args([command, "--out", "."], exit_on_error=False, print_error=False)
    return dict(bound.arguments)
