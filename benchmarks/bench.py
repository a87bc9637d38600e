"""Run the CPU benchmarks of speed one after the other within 20 minutes, and make the tables of docs/performance.md.

A script whose JSON file is of the commit that is checked out is not run again, so an interrupted run resumes; --again
measures all. Models are hub names or folders. What is not there is said in one sentence, and the rest goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import performance
from decoding import LARGE, SMALL
from timing import RESULTS, commit

ROOT = Path(__file__).parent.parent
TOTAL = 20.0


@dataclass(frozen=True)
class Script:
    """One of the scripts.

    Args:
        name: of the file.
        minutes: most it may take.
        models: how many models it is given: `--model`, and `--large` after it.
        vllm: it runs in the environment with vLLM.
    """

    name: str
    minutes: float
    models: int = 1
    vllm: bool = False


SCRIPTS = (
    Script("decode", 10, models=2), Script("against_kvpress", 5, models=2), Script("rates", 3), Script("scaling", 3.5),
    Script("prefill", 2), Script("serving_load", 4, models=0, vllm=True),
)  # fmt: skip


def is_done(script: Script, results: Path) -> bool:
    """Return whether a script's results are whole, and of the commit that is checked out."""
    path = results / f"{script.name}.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    return bool(found) and found["environment"]["commit"] == commit() != "" and not found.get("left_out")


def command_of(script: Script, given: argparse.Namespace) -> list[str] | None:
    """Return a script's command line; None where its environment is not there."""
    python = Path(sys.executable)
    if script.vllm:
        python = ROOT / given.vllm / "bin" / "python"
        if not python.exists():
            return None
    models = ["--model", given.model, "--large", given.large][: 0 if given.small else 2 * script.models]
    out = ["--out", str(given.results / f"{script.name}.json")]
    return [str(python), str(ROOT / "benchmarks" / f"{script.name}.py"), *models, *out, *["--small"] * given.small]


def main(argv: Sequence[str] | None = None) -> None:
    """Run; the exit code is 1 if a script's was not 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"scripts (default: {' '.join(one.name for one in SCRIPTS)})")
    parser.add_argument("--model", default=SMALL, help="hub name or folder of the smaller model")
    parser.add_argument("--large", default=LARGE, help="of the larger one; an empty word leaves it out")
    parser.add_argument("--again", action="store_true", help="measure again what is there")
    parser.add_argument("--small", action="store_true", help="seconds a script: shows that all of them work")
    parser.add_argument("--vllm", default=".venv-vllm", help="the environment with vLLM (make setup-vllm)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    given = parser.parse_args(argv)
    if unknown := set(given.names) - {one.name for one in SCRIPTS}:
        parser.error(f"there is no script {sorted(unknown)[0]}; there are {', '.join(one.name for one in SCRIPTS)}")
    began, failed = time.monotonic(), list[str]()
    for script in SCRIPTS:
        if given.names and script.name not in given.names:
            continue
        done, command = (time.monotonic() - began) / 60, command_of(script, given)
        if is_done(script, given.results) and not given.again:
            print(f"{script.name}: measured at this commit already; --again measures it again.", flush=True)
        elif command is None:
            print(f"{script.name}: left out, since {given.vllm} is not there; make setup-vllm makes it.", flush=True)
        elif done >= TOTAL - 0.5:
            print(f"{script.name}: left out, since the {TOTAL:.0f} minutes are over.", flush=True)
            failed.append(script.name)
        else:
            print(f"{script.name}: begins after {done:.1f} minutes, at most {script.minutes:.0f} more.", flush=True)
            if not finishes(command, 60 * min(script.minutes, TOTAL - done)):
                failed.append(script.name)
    if given.results == RESULTS and not given.small:
        performance.main([])
    print(f"{(time.monotonic() - began) / 60:.1f} minutes in all{', without ' if failed else ''}{', '.join(failed)}")
    sys.exit(bool(failed))


def finishes(command: list[str], seconds: float) -> bool:
    """Run a command; return whether it ended in time and well."""
    env = os.environ | {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    with subprocess.Popen(command, env=env, start_new_session=True) as process:
        try:
            return process.wait(seconds) == 0
        except subprocess.TimeoutExpired:
            print(f"{Path(command[1]).stem}: stopped after {seconds / 60:.1f} minutes.", flush=True)
            return False
        finally:
            if process.poll() is None:
                os.killpg(process.pid, 9)  # with the workers it started


if __name__ == "__main__":
    main()
