"""How much of the budget CASK's first stage should leave to a compressible prompt: KL by share, on other problems.

    python benchmarks/prompt_share.py --out results/prompt_share --to docs/results/cask/prompt_share.md

Apart from `cask_claims.py`, and on problems (seed 1) that it does not contain, so that a default may be chosen here.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cells import budgets, load_cells, mean, methods
from experiment import INTERVAL, RECENT, SINKS, lengths
from kept_records import result_paths

from reasonkv.budget import Budget
from reasonkv.evaluate.runner import ReplayJob, run_replay
from reasonkv.evaluate.traces import TraceSettings
from reasonkv.methods import get_method
from reasonkv.models import load_model

SHARES, OF_LENGTH = (0.35, 0.5, 0.65, 0.8, 0.9), (1 / 8, 1 / 4, 1 / 2)
METHODS = (*(f"cask:prompt_share={share}" for share in SHARES), "cask:profile=paper", "random")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--tasks", default="program,recall,search,arithmetic")
    parser.add_argument("--limit", type=int, default=32)
    parser.add_argument("--table-only", action="store_true", help="run nothing; write the table from what is there")
    chosen = parser.parse_args()
    model = load_model("testbed")
    for task in [] if chosen.table_only else chosen.tasks.split(","):
        tokens = [8 * round(sum(lengths(task)) * share / 8) for share in OF_LENGTH]
        sizes = [Budget(n, interval=INTERVAL, sinks=SINKS, recent=RECENT, prompt="count") for n in tokens]
        every = [get_method(spec) for spec in METHODS]
        job = ReplayJob([task], every, sizes, chosen.limit, seed=1, traces=TraceSettings(max_new_tokens=2048))
        run_replay(job, model, chosen.out / f"replay-{task}-count")
    found = load_cells(result_paths([chosen.out]), chosen.out / "records")
    out = ["Made by `python benchmarks/prompt_share.py`: KL in nats with standard errors, prompt compressible, seed 1,"]
    out += [f"n = {chosen.limit}. Columns: budget in slots, at 1/8, 1/4 and 1/2 of the mean length.", ""]
    for group, cells in found.replays.items():
        labels = budgets(cells)
        out += [f"**{group.task}**", "", "| method | " + " | ".join(labels) + " |", "|---" * (1 + len(labels)) + "|"]
        for method in methods(cells):
            row = [mean(cells[method, label], "kl") for label in labels]
            out.append(f"| {method} | " + " | ".join(f"{one.mean:.3f} +- {one.se or 0:.3f}" for one in row) + " |")
        out.append("")
    chosen.to.write_text("\n".join(out))


if __name__ == "__main__":
    main()
