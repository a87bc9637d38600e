"""Which family of the testbed separates which methods: replay and generation of every method on every family.

    python benchmarks/families.py run --out results/families      # resumes where it was stopped
    python benchmarks/families.py summarize results/families --to docs/results/families

`run` leaves one results folder per family, prompt policy and kind (replay or answers), and those of `recall` against
distance. `summarize` needs nothing but them; it writes tables, figures and the records without their texts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from reasonkv.budget import Budget
from reasonkv.evaluate.evaluator import EvaluateJob, run_evaluate
from reasonkv.evaluate.runner import ReplayJob, run_replay
from reasonkv.evaluate.traces import TraceSettings
from reasonkv.methods import get_method
from reasonkv.models import LoadedModel, load_model
from reasonkv.tasks import get_task, task_names

METHODS = ("full", "random", "streaming", "knorm", "snapkv:window=16", "rkv", "keydiff")
REPLAY_ONLY = ("random:redraw=false", "oracle", "oracle:reduce=max")
SHARES = {
    "replay": (1 / 8, 1 / 4, 1 / 2),
    "answers": (1 / 4, 1 / 2),
}  # at 1/8 no answer survives, and generation is slow
POLICIES = ("count", "on_top")
DISTANCES = (250, 500, 1000, 1500)
DISTANCE_TOKENS = 160
INTERVAL, SINKS, RECENT = 32, 4, 16
LEAST = 24  # slots: sinks, recent and a few to choose


@dataclass(frozen=True)
class Part:
    """One results folder: a task, its budgets, and whether traces are replayed or answers generated."""

    kind: str
    task: str
    policy: str
    tokens: tuple[int, ...]

    @property
    def folder(self) -> str:
        """Its name."""
        dials = self.task.partition(":")[2].replace("=", "").replace(",", "-")
        return "-".join(filter(None, (self.kind, self.task.partition(":")[0], dials, self.policy)))


def lengths(task: str, count: int = 64) -> tuple[float, float]:
    """Mean tokens of prompt and reference trace (a word is a token of the bundled model)."""
    problems = [get_task(task).problem(example) for example in range(count)]
    prompt = sum(len(problem.prompt.split()) for problem in problems) / count
    return prompt, sum(len(problem.trace.split()) + 1 for problem in problems) / count


def parts(tasks: list[str]) -> Iterator[Part]:
    """Every folder, those that tell most first.

    Budgets are shares of the mean length: of prompt and trace together where the prompt may be compressed, of the trace
    where the prompt is held on top. `longdoc` answers in about 40 tokens, so with its prompt kept nothing is left to
    compress: that part does not exist.
    """
    for kind in ("replay", "answers"):
        for policy in POLICIES:
            for task in tasks:
                prompt, trace = lengths(task)
                whole = trace if policy == "on_top" else prompt + trace
                if policy == "on_top" and trace / 4 < LEAST:
                    continue
                tokens = tuple(max(LEAST, 8 * round(whole * share / 8)) for share in SHARES[kind])
                yield Part(kind, task, policy, tokens)
        if "recall" in tasks:
            for distance in DISTANCES:
                yield Part(kind, f"recall:distance={distance}", "on_top", (DISTANCE_TOKENS,))


def run_part(part: Part, model: LoadedModel, out: Path, limit: int, batch_size: int) -> None:
    """Run or resume one folder."""
    budgets = [Budget(n, interval=INTERVAL, sinks=SINKS, recent=RECENT, prompt=part.policy) for n in part.tokens]  # type: ignore[arg-type]
    names = METHODS + (REPLAY_ONLY if part.kind == "replay" else ())
    methods = [get_method(name) for name in names]
    folder = out / part.folder
    if part.kind == "replay":
        settings = TraceSettings(max_new_tokens=2048)
        run_replay(
            ReplayJob([part.task], methods, budgets, limit, traces=settings, batch_size=batch_size), model, folder
        )
    else:
        run_evaluate(EvaluateJob([part.task], methods, budgets, limit, batch_size=batch_size), model, folder)


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("--out", type=Path, required=True)
    run.add_argument("--model", default="testbed")
    run.add_argument("--tasks", default=",".join(task_names()))
    run.add_argument("--limit", type=int, default=64)
    run.add_argument("--batch-size", type=int, default=64)
    run.add_argument("--part", help="only folders whose name starts with this")
    show = commands.add_parser("summarize")
    show.add_argument("folder", type=Path)
    show.add_argument("--to", type=Path, required=True)
    chosen = parser.parse_args()
    if chosen.command == "summarize":
        from families_summary import summarize

        summarize(chosen.folder, chosen.to)
        return
    console = Console(stderr=True)
    model = load_model(chosen.model)
    for part in parts(chosen.tasks.split(",")):
        if chosen.part and not part.folder.startswith(chosen.part):
            continue
        console.print(f"{part.folder}: {', '.join(map(str, part.tokens))} slots")
        run_part(part, model, chosen.out, chosen.limit, chosen.batch_size)


if __name__ == "__main__":
    sys.exit(main())
