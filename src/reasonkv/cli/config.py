"""`--config run.yaml`: options of a command from a file."""

from __future__ import annotations

import sys
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
        Dict({commands[0]: _read_options(name)}, source=name)(app, commands[:1], arguments)


def _read_options(name: str) -> dict[str, Any]:
    import yaml

    try:
        options = yaml.safe_load(read_text(name))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"--config cannot read {name}: {getattr(error, 'strerror', None) or error}.") from None
    if not isinstance(options, dict):
        raise UsageError(f"--config takes a YAML or JSON file of options, as in `task: program`, but {name} has none.")
    return options
