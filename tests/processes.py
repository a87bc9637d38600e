"""Processes that a test kills. Each is forked from one server, which has imported what they run: torch takes seconds."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from reasonkv import cli
from reasonkv.evaluate.job import GenerateJob, ReplayJob
from reasonkv.evaluate.run import run
from reasonkv.models import load_model

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    ["reasonkv.evaluate.run", "reasonkv.models", "reasonkv.cli.plan", "transformers.models.qwen3.modeling_qwen3"]
)


def start(function: Callable[..., Any], *arguments: Any) -> BaseProcess:
    """Call a function of this module in a process of its own, which prints nothing."""
    process = _SERVER.Process(target=_quiet, args=(function, *arguments), daemon=True)
    process.start()
    return process


def kill(process: BaseProcess, what: str) -> None:
    """Kill a process, which must not have ended by itself."""
    assert process.pid is not None
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL, f"{what} must not have ended by itself"


def run_job(job: GenerateJob | ReplayJob, model: str, out: Path) -> None:
    """Run a job."""
    run(job, load_model(model), out)


def run_command(arguments: list[str]) -> None:
    """Run a command line."""
    raise SystemExit(cli.run(arguments))


def _quiet(function: Callable[..., Any], *arguments: Any) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    torch.set_num_threads(1)  # as in the process of the tests, so that numbers are the same
    function(*arguments)
