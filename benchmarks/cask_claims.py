"""What holds of CASK's and TriAttention's claims on the testbed: replay and generation, every family, five budgets.

    python benchmarks/cask_claims.py run --out results/cask            # resumes where it was stopped
    python benchmarks/cask_claims.py summarize results/cask --to docs/results/cask

`run` leaves one results folder per family, prompt policy and kind. All methods get one and the same budget, so they
hold equally many slots and protect the same ones. `summarize` needs nothing but the folders.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from families import INTERVAL, LEAST, RECENT, SINKS, Part, lengths
from rich.console import Console

from reasonkv.budget import Budget
from reasonkv.evaluate.evaluator import EvaluateJob, run_evaluate
from reasonkv.evaluate.runner import ReplayJob, run_replay
from reasonkv.evaluate.traces import TraceSettings
from reasonkv.methods import get_method
from reasonkv.models import LoadedModel, load_model
from reasonkv.tasks import task_names

BASELINES = ("full", "random", "streaming", "snapkv:window=16", "rkv", "expected")
TRIATTENTION = ("triattention", "triattention:mode=global", "triattention:mode=per_layer_per_head")
CASK = ("cask", "cask:profile=paper")
ABLATIONS = {
    "cask:core_ratio=0,core_least=0,fold=none": "stage 1 only",
    "cask:fold=none": "no folding",
    "cask:core_ratio=0,core_least=0": "no core",
    "cask:mass=none": "no log mass",
    "cask:per_layer=true": "a plan per layer",
}
DEGENERATE = "triattention:profile=paper"
"""The reference's baseline on long prompts: it pins the prompt, or what fits of its beginning."""
SHARES = {"replay": (1 / 8, 1 / 6, 1 / 4, 1 / 3, 1 / 2), "answers": (1 / 4, 1 / 3, 1 / 2)}
GENERATED = ("full", "random", "rkv", "triattention", "triattention:mode=per_layer_per_head", "expected", *CASK)


def parts(tasks: list[str]) -> Iterator[Part]:
    """Every folder, those that tell most first; budgets as in `families.py`."""
    for kind, policy in (("replay", "on_top"), ("replay", "count"), ("answers", "on_top"), ("answers", "count")):
        for task in tasks:
            prompt, trace = lengths(task)
            whole = trace if policy == "on_top" else prompt + trace
            if policy == "on_top" and trace / 4 < LEAST:
                continue
            if kind == "answers" and policy == "count" and task != "longdoc":
                continue  # nothing answers without most of its prompt
            tokens = tuple(dict.fromkeys(max(LEAST, 8 * round(whole * share / 8)) for share in SHARES[kind]))
            yield Part(kind, task, policy, tokens)


def methods_of(part: Part) -> tuple[str, ...]:
    """The methods a folder holds."""
    if part.kind == "answers":
        return GENERATED if part.policy == "on_top" else (*GENERATED, DEGENERATE, "cask:fold=none")
    pinned = (DEGENERATE,) if part.policy == "count" else ()
    return (*BASELINES, *TRIATTENTION, *CASK, *ABLATIONS, *pinned)


def run_part(part: Part, model: LoadedModel, out: Path, limit: int, batch_size: int) -> None:
    """Run or resume one folder."""
    budgets = [Budget(n, interval=INTERVAL, sinks=SINKS, recent=RECENT, prompt=part.policy) for n in part.tokens]  # type: ignore[arg-type]
    methods = [get_method(name) for name in methods_of(part)]
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
        from cask_claims_summary import summarize

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
