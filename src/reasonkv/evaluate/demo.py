"""The demo's jobs: full KV and the best of every family of methods on the bundled model, all else equal."""

from __future__ import annotations

from reasonkv.evaluate.job import BudgetOptions, GenerateJob, ReplayJob, TraceSettings

TASKS = ("program", "recall")  # at the defaults, which the bundled model solves, so that the traces are right
METHODS = (
    "full", "random", "streaming",  # baselines
    "keydiff",  # by the keys' geometry
    "snapkv:window=16", "rkv",  # by attention
    "triattention", "expected",  # by the queries expected to come
    "vase-dkv:window=16",  # by values as well
    "cask",  # by merging
    "quest",  # keeps everything, and chooses what to read
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


def replay_job(limit: int = 8, seed: int = 0, batch_size: int = 8) -> ReplayJob:
    """Return the fidelity half of `reasonkv demo`."""
    return ReplayJob(
        task=TASKS, methods=METHODS, budget=_budget(TOKENS), traces=TraceSettings(max_new_tokens=LONGEST_TRACE),
        limit=limit, seed=seed, batch_size=batch_size,
    )  # fmt: skip


def answers_job(limit: int = 8, seed: int = 0, batch_size: int = 8) -> GenerateJob:
    """Return the accuracy half: the same methods and problems, each method writing its own trace and answer."""
    budget = _budget(ANSWER_TOKENS)
    return GenerateJob(task=TASKS, methods=METHODS, budget=budget, limit=limit, seed=seed, batch_size=batch_size)


def _budget(tokens: tuple[int, ...]) -> BudgetOptions:
    # the prompt is protected and on top, so the budget is what each method may keep of a trace
    return BudgetOptions(tokens=tokens, interval=32, sinks=4, recent=16, prompt="on_top")
