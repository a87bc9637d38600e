"""`--config run.yaml`: options of a command from a file."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cyclopts import App, ArgumentCollection
from cyclopts.config import Dict

from reasonkv.cli.mistakes import UsageError
from reasonkv.files import finite

STANDARD_INPUT = "/dev/stdin"
"""What `-` stands for: prompts, texts and configuration files are read from there."""


def read_text(name: str | Path) -> str:
    """Return the text of a file, or what standard input has."""
    return sys.stdin.read() if str(name) == STANDARD_INPUT else finite(Path(name)).read_text(encoding="utf-8")


def from_file(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Fill in the options that the file of `--config` names and the command line does not.

    Raises:
        UsageError: the file cannot be read, or holds something else than options.
    """
    given = arguments.get("--config", None)
    if given is not None and given.tokens:
        name = given.tokens[-1].value
        Dict({commands[0]: check_flat(read_options(name), name)}, source=name)(app, commands[:1], arguments)


def read_options(name: str, what: str = "--config") -> dict[str, Any]:
    """Return the options in a YAML or JSON file.

    Raises:
        UsageError: the file cannot be read, or holds something else than options.
    """
    from reasonkv.inputs import parse_yaml

    try:
        options = parse_yaml(read_text(name))
    except (OSError, ValueError) as error:
        why = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise UsageError(f"{what} cannot read {name}: {why}.") from None
    if not isinstance(options, dict):
        raise UsageError(f"{what} takes a YAML or JSON file of options, as in `task: program`, but {name} has none.")
    return options


def check_flat(options: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return options, each of which must have a value or a list of values.

    Raises:
        UsageError: one is empty, or holds something else.
    """
    for name, given in options.items():
        values = given if isinstance(given, list) else [given]
        if not values or not all(isinstance(one, (str, int, float)) for one in values):
            raise UsageError(f"The option {name} in {source} takes a value or a list of values.")
    return dict(options)


def parse_options(app: App, command: str, options: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the arguments that a command would be called with, if its `--config` file held these options.

    `app` is a new application, which is then of no further use; `source` is named in errors.

    Raises:
        CycloptsError: an option that the command does not have, or a value that does not fit.
    """
    app.config = (Dict({command: check_flat(options, source)}, source=source),)
    _, bound, _ = app.parse_args([command, "--out", "."], exit_on_error=False, print_error=False)
    return dict(bound.arguments)
