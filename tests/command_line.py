"""The command line called in this process: exit code, stdout and stderr of `reasonkv ARGUMENTS`."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

from tiny import TASK

from reasonkv import cli

SMALL = ["--interval", "12", "--sinks", "2", "--recent", "8", "--prompt-policy", "on_top", "--max-new-tokens", "40"]


class Result(NamedTuple):
    exit_code: int
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        return self.stdout + self.stderr


def run(*arguments: object, env: Mapping[str, str] | None = None, stdin: str = "") -> Result:
    """Run one command line; a defect raises its own exception."""
    out, err = io.StringIO(), io.StringIO()
    given = patch.dict(os.environ, env) if env else nullcontext()
    with given, patch("sys.stdin", io.StringIO(stdin)), redirect_stdout(out), redirect_stderr(err):
        code = cli.run([str(one) for one in arguments])
    return Result(code, out.getvalue(), err.getvalue())


def sentence(result: Result, code: int = 2) -> str:
    """The one line that says what is wrong, after checking that it is one and that nothing else was printed."""
    assert (result.exit_code, result.stdout) == (code, ""), result.output
    lines = [line for line in result.stderr.splitlines() if line]
    assert lines[-1].startswith("Error: ") and lines[-1].endswith((".", "?"))
    assert [line for line in lines if line.startswith("Error")] == lines[-1:]
    assert "Traceback" not in result.stderr
    return lines[-1]


def replay(model: str, out: Path, /, **changes: object) -> Result:
    """Run a small replay with some options changed."""
    options = {"model": model, "task": TASK, "methods": "full,random,rkv", "budgets": 24, "limit": 2, "batch-size": 2}
    options |= {name.replace("_", "-"): value for name, value in changes.items()}
    given = [word for name, value in options.items() for word in ([f"--{name}"] + [value] * (value is not True))]
    return run("replay", *SMALL, *given, "--out", out)
