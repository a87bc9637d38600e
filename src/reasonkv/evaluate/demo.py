"""The demo's jobs: full KV and the best of every family of methods on the bundled model, all else equal."""

from __future__ import annotations

from reasonkv.budget import Budget
from reasonkv.evaluate.evaluator import EvaluateJob
from reasonkv.evaluate.runner import ReplayJob
from reasonkv.evaluate.traces import TraceSettings
from reasonkv.methods import get_method

TASKS = ("program", "recall")  # at the defaults, which the bundled model solves, so that the traces are right
METHODS = (
    "full", "random", "streaming",  # baselines
    "keydiff",  # by the keys' geometry
    "snapkv:window=16", "rkv",  # by attention
    "triattention", "expected",  # by the queries expected to come
    "vase-dkv:window=16",  # by values as well
    "cask",  # by folding
    "quest",  # holds everything, and chooses what to read
)  # fmt: skip
"""The best known of each family; windows are cut to the recent tokens that every budget here protects."""
TOKENS = (80, 160, 320)
ANSWER_TOKENS = (160, 320)  # a quarter and a half of a trace: below that no answer survives
LONGEST_TRACE = 1200  # right answers take up to 950 tokens
INSPECTED_TASK, INSPECTED_METHOD, INSPECTED_TOKENS = "recall", "cask", 160
WHAT_TO_LOOK_AT = (
    "full KV is the ceiling: it replays its own traces, so its top-1 is 100 % and its KL is 0 up to rounding.",
    "random keeps the prompt like every other method; a method earns its keep by how far it is above random.",
    "high top-1 is not yet a right answer: one wrong digit early, and everything after it is built on it.",
    "mean and peak slots are what is held, and attention reads it all: compare methods at equal slots.",
    "quest holds everything and frees nothing; it reads as many slots (slots read) as the others hold.",
)


def replay_job(*, limit: int = 8, seed: int = 0, batch_size: int = 8) -> ReplayJob:
    """The fidelity half of `reasonkv demo`.

    Every method that drops slots protects the prompt and holds it on top of the budget, so the budget is what each may
    keep of a trace.

    Args:
        limit: problems per family.
        seed: of problems and methods.
        batch_size: rows at once.
    """
    return ReplayJob(
        command="demo",
        tasks=TASKS,
        methods=[get_method(name) for name in METHODS],
        budgets=[_budget(tokens) for tokens in TOKENS],
        limit=limit,
        seed=seed,
        traces=TraceSettings(max_new_tokens=LONGEST_TRACE),
        batch_size=batch_size,
    )


def answers_job(*, limit: int = 8, seed: int = 0, batch_size: int = 8) -> EvaluateJob:
    """The accuracy half: the same methods and problems, each method writing its own trace and answer (greedy).

    Args:
        limit: problems per family.
        seed: of problems and methods.
        batch_size: rows at once.
    """
    return EvaluateJob(
        command="demo",
        tasks=TASKS,
        methods=[get_method(name) for name in METHODS],
        budgets=[_budget(tokens) for tokens in ANSWER_TOKENS],
        limit=limit,
        seed=seed,
        batch_size=batch_size,
    )


def _budget(tokens: int) -> Budget:
    return Budget(tokens, interval=32, sinks=4, recent=16, prompt="on_top")
