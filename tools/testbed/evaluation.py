"""Whole-answer accuracy of a model on a task family: plain greedy `generate`, nothing clever."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from reasonkv.tasks import Problem, Task

_CONTEXT = 4096


def evaluate_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    task: Task,
    *,
    limit: int = 200,
    seed: int = 0,
    batch_size: int = 50,
    on_answer: Callable[[Problem, str, bool], None] | None = None,
) -> tuple[int, int, float]:
    """Solve the first `limit` test problems of `seed` under full KV; (right, asked, SE).

    Greedy decoding in left-padded batches until the end of sequence, the context's end, or 32
    tokens more than the batch's longest reference trace (an answer that late is wrong anyway).
    SE is the binomial standard error of the share that is right. `on_answer` is called with every
    problem, its decoded output and whether it is right.
    """
    problems = [task.problem(example, seed=seed) for example in range(limit)]
    right = 0
    for start in range(0, limit, batch_size):
        batch = problems[start : start + batch_size]
        for problem, output in zip(batch, generate(model, tokenizer, batch), strict=True):
            correct = task.check(problem, output)
            right += correct
            if on_answer:
                on_answer(problem, output, correct)
    share = right / limit
    return right, limit, math.sqrt(share * (1 - share) / limit)


@torch.no_grad()
def generate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, problems: list[Problem]) -> list[str]:
    """Greedy outputs for the problems as one batch, decoded with special tokens."""
    prompts = tokenizer(
        [problem.prompt for problem in problems],
        add_special_tokens=False,
        padding=True,
        return_tensors="pt",
    ).to(model.device)
    longest = max(len(problem.trace.split()) for problem in problems)
    width = prompts["input_ids"].shape[1]
    output = model.generate(
        input_ids=prompts["input_ids"],
        attention_mask=prompts["attention_mask"],
        do_sample=False,
        max_new_tokens=min(longest + 32, _CONTEXT - width),
    )
    return [str(text) for text in tokenizer.batch_decode(output[:, width:])]
