"""`gym:NAME`: the generators of the `reasoning-gym` package, graded by their own scorers; several problems a prompt."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from reasonkv.tasks.base import UNREAD, Grade, Problem, Task, TaskError, check_example
from reasonkv.tasks.grade import boxes, final_line, last_number
from reasonkv.tasks.options import THINK_END

# Small models answer at once where a prompt shows an answer line, and reason where it asks for a box.
_ONE = "{question}\n\nReason step by step, and put the final answer in \\boxed{{}}."
_MANY = (
    "Solve the following {count} problems one after another. For each problem, write its number, reason step by step, "
    "and put its final answer in \\boxed{{}}. At the end, repeat all {count} boxed answers in order.\n\n{questions}"
)

TRAIN = 1 << 24
"""Added to the seed of problems to calibrate or train with, so that none of them is asked in a test."""


@dataclass(frozen=True)
class GymTask(Task):
    """Problems of a generator."""

    name: str  # the task as the user wrote it
    dataset: str  # the generator's name
    per_prompt: int  # problems in one prompt
    config: Mapping[str, Any]  # options of the generator
    think_end: str = THINK_END  # what ends thinking

    chat = True

    def problem(self, example: int, *, seed: int = 0, split: str = "test") -> Problem:
        """Return problem number `example`: items `per_prompt * example` and on of the generator with this seed."""
        check_example(example)
        items = self._items(example, seed, split)
        if self.per_prompt == 1:
            prompt = _ONE.format(question=items[0]["question"].strip())
        else:
            questions = "\n\n".join(f"Problem {n}: {item['question'].strip()}" for n, item in enumerate(items, 1))
            prompt = _MANY.format(count=self.per_prompt, questions=questions)
        answer = "\n".join(str(item["answer"]) for item in items)
        return Problem(self.name, example, seed, split, prompt, "", answer)

    def grade_answer(self, problem: Problem, answer: str) -> Grade:
        """Return the mean of the generator's own scores; of several problems, the last whole round of boxes."""
        items = self._items(problem.example, problem.seed, problem.split)
        if self.per_prompt == 1:
            found: list[str | None] = [final_line(answer)]
        else:
            boxed = boxes(answer)
            start = max(0, len(boxed) // self.per_prompt - 1) * self.per_prompt
            found = [*boxed[start:], *[None] * self.per_prompt][: self.per_prompt]
        if all(one is None for one in found):
            return UNREAD
        scores = [self._score(item, text) for item, text in zip(items, found, strict=True)]
        return Grade(sum(scores) / len(scores), "; ".join("?" if one is None else one for one in found))

    def _items(self, example: int, seed: int, split: str) -> list[dict[str, Any]]:
        seed += TRAIN if split == "train" else 0
        # item i comes from seed + i whatever the size, but some generators prepare all items at once
        size = (example + 1) * self.per_prompt
        made = _create(self.dataset, {**self.config, "seed": seed, "size": size})
        return [made[example * self.per_prompt + offset] for offset in range(self.per_prompt)]

    def _score(self, item: dict[str, Any], text: str | None) -> float:
        if text is None:
            return 0.0
        dataset = _create(self.dataset, {**self.config, "seed": 0, "size": 1})
        number = last_number(text) if _is_number(item["answer"]) else None  # "17 pencils" is 17
        score = max(float(dataset.score_answer(one, item)) for one in (text, number) if one is not None)
        return min(score, 1.0) if score >= 0.1 else 0.0  # most scorers give 0.01 to a wrong answer in the right form


def gym_task(spec: str, options: Mapping[str, str], think_end: str = THINK_END) -> GymTask:
    """Make the task of `gym:NAME,per_prompt=4,option=value`; numbers and true/false are read as such.

    Raises:
        TaskError: no such generator or option, or the package is missing.
    """
    dataset = spec.partition(":")[2].partition(",")[0].strip()
    config = {key: _value(text) for key, text in options.items()}
    per_prompt = config.pop("per_prompt", 1)
    if not isinstance(per_prompt, int) or isinstance(per_prompt, bool) or not 1 <= per_prompt <= 64:
        raise TaskError(f"per_prompt must be a whole number from 1 to 64, not {per_prompt!r}.")
    task = GymTask(spec, dataset, per_prompt, config, think_end)
    task.problem(0)
    return task


def gym_names() -> list[str]:
    """Return the names of all generators; none where the package is missing."""
    try:
        import reasoning_gym  # noqa: F401
        from reasoning_gym.factory import DATASETS
    except ImportError:
        return []
    return sorted(DATASETS)


def _create(name: str, config: Mapping[str, Any]) -> Any:
    known = gym_names()
    if not known:
        raise TaskError('Tasks gym:NAME need the package reasoning-gym; run pip install "reasonkv[tasks]".')
    if name not in known:
        raise TaskError(f"reasoning-gym has no generator {name!r}; `reasonkv tasks` lists them.")
    import reasoning_gym

    try:
        return reasoning_gym.create_dataset(name, **config)
    except (TypeError, ValueError, AssertionError) as error:
        raise TaskError(f"The generator {name} does not take these options ({error}).") from None


def _value(text: str) -> Any:
    if text.lower() in {"true", "false"}:
        return text.lower() == "true"
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def _is_number(answer: Any) -> bool:
    with suppress(TypeError, ValueError):
        return math.isfinite(float(answer))
    return False
