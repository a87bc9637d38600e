"""Run the CPU benchmarks of speed one after the other within 20 minutes, and make the pages of performance.

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
from pathlib import Path

import performance
from timing import DECLARED, RESULTS, commit

ROOT = Path(__file__).parent.parent
TOTAL = 20.0
SCRIPTS = {name: one for name, one in DECLARED.items() if "minutes" in one}


def is_done(name: str, results: Path) -> bool:
    """Return whether a script's results are whole, and of the commit that is checked out."""
    path = results / f"{name}.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    return bool(found) and found["environment"]["commit"] == commit() != "" and not found.get("left_out")


def command_of(name: str, given: argparse.Namespace) -> list[str] | None:
    """Return a script's command line; None where its environment is not there."""
    python = ROOT / given.vllm / "bin" / "python" if SCRIPTS[name].get("vllm") else Path(sys.executable)
    if not python.exists():
        return None
    models = ["--model", given.model, "--large", given.large][: 0 if given.small else 2 * SCRIPTS[name]["models"]]
    out = ["--out", str(given.results / f"{name}.json")]
    return [str(python), str(ROOT / "benchmarks" / f"{name}.py"), *models, *out, *["--small"] * given.small]


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


def main(argv: Sequence[str] | None = None) -> None:
    """Run; the exit code is 1 if a script's was not 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"scripts (default: {' '.join(SCRIPTS)})")
    models = DECLARED["decode"]["options"]
    parser.add_argument("--model", default=models["model"], help="hub name or folder of the smaller model")
    parser.add_argument("--large", default=models["large"], help="of the larger one; an empty word leaves it out")
    parser.add_argument("--again", action="store_true", help="measure again what is there")
    parser.add_argument("--small", action="store_true", help="seconds a script: shows that all of them work")
    parser.add_argument("--vllm", default=".venv-vllm", help="the environment with vLLM (make setup-vllm)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    given = parser.parse_args(argv)
    if unknown := set(given.names) - SCRIPTS.keys():
        parser.error(f"there is no script {sorted(unknown)[0]}; there are {', '.join(SCRIPTS)}")
    began, failed = time.monotonic(), list[str]()
    for name in [name for name in SCRIPTS if not given.names or name in given.names]:
        done, command, most = (time.monotonic() - began) / 60, command_of(name, given), SCRIPTS[name]["minutes"]
        if is_done(name, given.results) and not given.again:
            print(f"{name}: measured at this commit already; --again measures it again.", flush=True)
        elif command is None:
            print(f"{name}: left out, since {given.vllm} is not there; make setup-vllm makes it.", flush=True)
        elif done >= TOTAL - 0.5:
            print(f"{name}: left out, since the {TOTAL:.0f} minutes are over.", flush=True)
            failed.append(name)
        else:
            print(f"{name}: begins after {done:.1f} minutes, at most {most:.0f} more.", flush=True)
            if not finishes(command, 60 * min(most, TOTAL - done)):
                failed.append(name)
    if given.results.resolve() in performance.PAGES and not given.small:
        performance.main([])
    print(f"{(time.monotonic() - began) / 60:.1f} minutes in all{', without ' if failed else ''}{', '.join(failed)}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
