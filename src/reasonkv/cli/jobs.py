"""`reasonkv replay`, `evaluate` and `tune`: run a job into a results folder and print its tables."""

from __future__ import annotations

from typing import Annotated

from reasonkv.cli.flags import ConfigFile, Json, ModelFlags, Out, Without, command
from reasonkv.evaluate.job import GenerateJob, ReplayJob, TuneJob

SIZES = Without(("tokens", "keep", "mean_slots"))


@command
def replay(*, job: ReplayJob, out: Out, model: ModelFlags, json: Json = False, config: ConfigFile = None) -> None:
    """Replay full KV's traces through bounded caches and score every token.

    Example: `reasonkv replay --task program --methods full,random,rkv --budgets 128,256 --limit 8 --out results`

    Full KV writes each trace once. A method is then fed the same tokens, and every output token is scored against full
    KV's own prediction. The results folder holds records, manifest, traces and a figure.
    """
    print(job, out, model, json)


@command
def evaluate(*, job: GenerateJob, out: Out, model: ModelFlags, json: Json = False, config: ConfigFile = None) -> None:
    """Answer a task's problems by generating through bounded caches, and count the right answers.

    Example: `reasonkv evaluate --task program --methods full,random,rkv --budgets 128,256 --limit 8 --out answers`

    Full KV always answers first: accuracies are compared with its own on the same problems. The results folder holds
    records, manifest and full KV's outputs.
    """
    print(job, out, model, json)


@command
def tune(
    *, job: Annotated[TuneJob, SIZES], out: Out, model: ModelFlags, json: Json = False, config: ConfigFile = None
) -> None:
    """Find the smallest budget with which each method keeps a target, by bisection over real runs.

    Example: `reasonkv tune --task program --methods random,rkv --target 0.95x --limit 16 --out search`

    Another --target, --resolution or replay --metric reuses what --out holds; `reasonkv frontier` reads it, too.
    """
    print(job, out, model, json)
