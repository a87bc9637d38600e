"""Run an experiment on the testbed, as a file in `benchmarks/experiments` describes it; resumes where it was stopped.

    python benchmarks/run.py families --out results/families
    python benchmarks/results.py keep families results/families    # then: python benchmarks/results.py

An experiment has `methods`, and `parts` of a `kind` (replay; lost, a replay with diagnostics; answers and low, real
generation) with prompt `policies` and, unless given, every task. Budgets are `shares` of the mean length (of prompt and
trace together where the prompt may be compressed, of the trace where it is kept on top), `tokens`, or a `budget` of
other fields. One results folder a part, policy and task. A part may add `methods` of its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from tables import EXPERIMENTS

from reasonkv.evaluate.job import BudgetOptions, GenerateJob, ReplayJob
from reasonkv.evaluate.run import run
from reasonkv.models import load_model
from reasonkv.tasks import get_task, task_names

RULE = {"interval": 32, "sinks": 4, "recent": 16}
LEAST = 24  # slots: sinks, recent and a few to choose


@dataclass(frozen=True)
class Part:
    """One results folder: its name, and the job that fills it."""

    folder: str
    job: ReplayJob | GenerateJob


def lengths(task: str, count: int = 64) -> tuple[float, float]:
    """Return the mean tokens of prompts and reference traces (a word is a token of the bundled model)."""
    problems = [get_task(task).problem(example) for example in range(count)]
    prompt = sum(len(problem.prompt.split()) for problem in problems) / count
    return prompt, sum(len(problem.trace.split()) + 1 for problem in problems) / count


def budget_of(part: dict[str, Any], task: str, policy: str) -> BudgetOptions | None:
    """Return a part's budgets on a task; None where so little is left to compress that they would say nothing."""
    prompt, trace = lengths(task)
    if policy == "on_top" and trace / 4 < LEAST and "tokens" not in part:
        return None
    if "budget" in part:
        return BudgetOptions(**part["budget"])
    whole = trace if policy == "on_top" else prompt + trace
    shares = [float(Fraction(str(share))) for share in part.get("shares", ())]
    tokens = part.get("tokens") or [max(LEAST, 8 * round(whole * share / 8)) for share in shares]
    return BudgetOptions(tokens=tuple(tokens), prompt=policy, **RULE)  # type: ignore[arg-type]


def parts(experiment: dict[str, Any], limit: int | None = None, batch_size: int = 64) -> Iterator[Part]:
    """Yield every folder of an experiment, those that tell most first."""
    for part in experiment["parts"]:
        for policy in part["policies"]:
            for task in part.get("tasks") or [name for name in task_names()]:
                budget = budget_of(part, task, policy)
                if budget is None:
                    continue
                name, _, dials = task.partition(":")
                words = (part.get("name", ""), part["kind"], name, dials.replace("=", "").replace(",", "-"), policy)
                own = (each if isinstance(each, list) else [each] for each in part.get("methods", ()))
                every = tuple(dict.fromkeys([*experiment["methods"], *(one for each in own for one in each)]))
                shared: dict[str, Any] = {
                    "task": (task,), "methods": every, "budget": budget,
                    "limit": limit or experiment.get("limit", 64), "seed": experiment.get("seed", 0),
                    "batch_size": batch_size,
                }  # fmt: skip
                generates = part["kind"] in {"answers", "low"}
                job = GenerateJob(**shared) if generates else ReplayJob(**shared, diagnostics=part["kind"] == "lost")
                yield Part("-".join(filter(None, words)), job)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ", ".join(sorted(path.stem for path in EXPERIMENTS.glob("*.yaml")))
    parser.add_argument("experiment", help=f"a file, or one of {known}")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="testbed")
    parser.add_argument("--limit", type=int, help="problems a folder, if not the experiment's own")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--part", default="", help="only folders whose name starts with this")
    chosen = parser.parse_args(argv)
    path = EXPERIMENTS / f"{chosen.experiment}.yaml"
    experiment = yaml.safe_load((path if path.exists() else Path(chosen.experiment)).read_text())
    console, model = Console(stderr=True), load_model(chosen.model)
    for part in parts(experiment, chosen.limit, chosen.batch_size):
        if part.folder.startswith(chosen.part):
            console.print(f"{part.folder}: {', '.join(map(str, part.job.budget.tokens)) or 'windows'} slots")
            run(part.job, model, chosen.out / part.folder)


if __name__ == "__main__":
    main()
