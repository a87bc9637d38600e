"""What the experiments on the testbed share: results folders of one family each, budgets, and the command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console

from reasonkv.budget import Budget
from reasonkv.evaluate.answers import AnswerRecord
from reasonkv.evaluate.evaluator import EvaluateJob, run_evaluate
from reasonkv.evaluate.records import Record
from reasonkv.evaluate.runner import ReplayJob, run_replay
from reasonkv.evaluate.traces import TraceSettings
from reasonkv.methods import get_method
from reasonkv.models import LoadedModel, load_model
from reasonkv.tasks import get_task, task_names

INTERVAL, SINKS, RECENT = 32, 4, 16
LEAST = 24  # slots: sinks, recent and a few to choose
POLICIES = {"count": "prompt compressible", "on_top": "prompt kept"}
Line = Record | AnswerRecord
Kind = Literal["replay", "answers", "low", "lost"]


@dataclass(frozen=True)
class Part:
    """One results folder: a task, its budgets, and whether traces are replayed or answers generated.

    "low" generates answers at budgets where few are right; "lost" is a replay with diagnostics.
    """

    kind: Kind
    task: str
    policy: Literal["count", "on_top"]
    tokens: tuple[int, ...]

    @property
    def generates(self) -> bool:
        """Whether answers are generated; otherwise traces are replayed."""
        return self.kind in ("answers", "low")

    @property
    def folder(self) -> str:
        """Its name."""
        dials = self.task.partition(":")[2].replace("=", "").replace(",", "-")
        return "-".join(filter(None, (self.kind, self.task.partition(":")[0], dials, self.policy)))

    def budgets(self) -> list[Budget]:
        """Its budgets."""
        return [Budget(n, interval=INTERVAL, sinks=SINKS, recent=RECENT, prompt=self.policy) for n in self.tokens]


def policy_of(folder: Path) -> str:
    """The prompt policy in a folder's name."""
    return folder.name.rsplit("-", 1)[1]


def lengths(task: str, count: int = 64) -> tuple[float, float]:
    """Mean tokens of prompt and reference trace (a word is a token of the bundled model)."""
    problems = [get_task(task).problem(example) for example in range(count)]
    prompt = sum(len(problem.prompt.split()) for problem in problems) / count
    return prompt, sum(len(problem.trace.split()) + 1 for problem in problems) / count


def part_of(kind: Kind, task: str, policy: Literal["count", "on_top"], shares: Sequence[float]) -> Part | None:
    """A folder whose budgets are shares of the mean length: of prompt and trace together where the prompt may be
    compressed, of the trace where it is held on top.

    None where so little is left to compress that the budgets say nothing: `longdoc` answers in about 40 tokens.
    """
    prompt, trace = lengths(task)
    if policy == "on_top" and trace / 4 < LEAST:
        return None
    whole = trace if policy == "on_top" else prompt + trace
    tokens = dict.fromkeys(max(LEAST, 8 * round(whole * share / 8)) for share in shares)
    return Part(kind, task, policy, tuple(tokens))


def run_part(part: Part, specs: Sequence[str], model: LoadedModel, out: Path, limit: int, batch_size: int) -> None:
    """Run or resume one folder."""
    budgets = part.budgets()
    methods = [get_method(spec) for spec in specs]
    if not part.generates:
        traces, lost = TraceSettings(max_new_tokens=2048), part.kind == "lost"
        job = ReplayJob([part.task], methods, budgets, limit, traces=traces, batch_size=batch_size, diagnostics=lost)
        run_replay(job, model, out / part.folder)
    else:
        run_evaluate(EvaluateJob([part.task], methods, budgets, limit, batch_size=batch_size), model, out / part.folder)


def by_example(lines: dict[int, Line], metric: str) -> dict[int, float]:
    """A metric by example, where it exists."""
    found = {example: getattr(line, metric) for example, line in lines.items()}
    return {example: float(value) for example, value in found.items() if value is not None}


def main(
    description: str | None,
    parts: Callable[[list[str]], Iterable[Part]],
    methods_of: Callable[[Part], Sequence[str]],
    summarize: Callable[[Sequence[Path], Path], None],
) -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("--out", type=Path, required=True)
    run.add_argument("--model", default="testbed")
    run.add_argument("--tasks", default=",".join(task_names()))
    run.add_argument("--limit", type=int, default=64)
    run.add_argument("--batch-size", type=int, default=64)
    run.add_argument("--part", help="only folders whose name starts with this")
    run.add_argument("--methods", help="only these of a folder's methods, separated by spaces")
    show = commands.add_parser("summarize")
    show.add_argument(
        "folders", type=Path, nargs="+", help="what `run --out` wrote, or kept records; later ones replace earlier"
    )
    show.add_argument("--to", type=Path, required=True)
    chosen = parser.parse_args()
    if chosen.command == "summarize":
        summarize(chosen.folders, chosen.to)
        return
    console, model = Console(stderr=True), load_model(chosen.model)
    for part in parts(chosen.tasks.split(",")):
        if not chosen.part or part.folder.startswith(chosen.part):
            console.print(f"{part.folder}: {', '.join(budget.label for budget in part.budgets())} slots")
            every = methods_of(part)
            chosen_ones = every if chosen.methods is None else [one for one in every if one in chosen.methods.split()]
            run_part(part, chosen_ones, model, chosen.out, chosen.limit, chosen.batch_size)
