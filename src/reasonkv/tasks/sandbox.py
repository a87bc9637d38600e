"""Run code that nobody has read: a process of its own with limits on time, memory, processes and files, and no network.

Where the system allows it (Linux namespaces by `unshare`), the process sees no network and takes its children with it
when it ends. Elsewhere sockets are refused inside Python, and the process group is killed.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import IO, Any

from reasonkv.tasks.base import TaskError

_NAMESPACES = ("unshare", "--user", "--map-root-user", "--net", "--pid", "--fork", "--kill-child")
_NO_SOCKETS = """import socket as _s
def _refuse(*_, **__): raise OSError("no network here")
_s.socket = _s.create_connection = _refuse
"""
_CALL = """import importlib.util as _i, json as _j, sys as _y
_given = _j.load(_y.stdin)
_spec = _i.spec_from_file_location("grader", _given["path"])
_module = _i.module_from_spec(_spec)
_spec.loader.exec_module(_module)
_found = getattr(_module, _given["function"])(*_given["arguments"])
print("\\n" + _j.dumps(_found))
"""
_MEGABYTE = 2**20
_PROCESSES = 32
_NOBODY = 65534


@dataclass(frozen=True)
class Finished:
    """Whether a process ended by itself without an error; 1 MB of its output; its last error, or why it was stopped."""

    ok: bool
    output: str
    error: str


def run_python(code: str, stdin: str = "", *, seconds: float = 20.0, megabytes: int = 1024) -> Finished:
    """Run Python code in an empty folder, with limits on wall-clock and CPU time and on address space."""
    prefix, user = _confinement()
    # files and not pipes: a limit holds for them, and children that outlive the process do not keep them open for us
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        if user is not None:
            os.chown(folder, user, -1)

        def limit() -> None:
            cpu = int(seconds) + 1
            for what, most in (
                (resource.RLIMIT_CPU, cpu),
                (resource.RLIMIT_AS, megabytes * _MEGABYTE),
                (resource.RLIMIT_FSIZE, 16 * _MEGABYTE),
                (resource.RLIMIT_NPROC, _PROCESSES),  # the kernel does not hold root to it
                (resource.RLIMIT_CORE, 0),
            ):
                resource.setrlimit(what, (most, most))

        process = subprocess.Popen(
            [*prefix, sys.executable, "-I", "-c", code if prefix else _NO_SOCKETS + code],
            cwd=folder,
            env={"PATH": os.environ.get("PATH", ""), "HOME": folder, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=errors,
            user=user,
            preexec_fn=limit,  # no threads of ours run in the child: it becomes Python at once
            start_new_session=True,
        )
        try:
            process.communicate(stdin.encode(), timeout=seconds)
        except subprocess.TimeoutExpired:
            return Finished(False, "", f"stopped after {seconds:g} s")
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        written, last = _read(out), _read(errors).strip().splitlines()[-1:] or [f"exit code {process.returncode}"]
        return Finished(process.returncode == 0, written, "" if process.returncode == 0 else last[0][:300])


def call_function(path: str, function: str, arguments: Sequence[Any], *, seconds: float = 20.0) -> Any:
    """Call a function of a Python file in a process with limits; arguments and result travel as JSON.

    Raises:
        TaskError: it failed, took too long, or returned what JSON cannot hold.
    """
    given = json.dumps({"path": path, "function": function, "arguments": list(arguments)}, default=str)
    finished = run_python(_CALL, given, seconds=seconds)
    if not finished.ok:
        raise TaskError(f"The grader {path}:{function} failed ({finished.error}).")
    return json.loads(finished.output.strip().splitlines()[-1])


@cache
def _confinement() -> tuple[tuple[str, ...], int | None]:
    """Return the command that gives a process namespaces of its own, and the user it runs as; the strictest that works.

    Root is not held to a number of processes, so it gives the code to nobody where that user can run this Python.
    """
    users: list[int | None] = [_NOBODY, None] if os.geteuid() == 0 else [None]
    for prefix, user in product([_NAMESPACES, ()] if shutil.which("unshare") else [()], users):
        with suppress(OSError):
            command = [*prefix, sys.executable, "-I", "-c", "pass"]
            if subprocess.run(command, capture_output=True, check=False, cwd="/", user=user).returncode == 0:
                return prefix, user
    return (), None


def _read(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read(_MEGABYTE).decode(errors="replace")
