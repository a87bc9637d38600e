"""Text in and out of a model, and sampling that does not depend on the batch.

Sampling is greedy decoding of noisy scores: the largest of (logit / temperature + Gumbel noise) is an exact sample of
the softmax. The noise is a hash of (seed, row seed, step, token id), so a sequence's text depends on its own numbers
alone: not on the batch, its order, or any generator's state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reasonkv import noise
from reasonkv.evaluate.job import Sampling
from reasonkv.tasks.base import Problem, Task, TaskError
from reasonkv.tasks.options import THINK, TaskOptions

_SAMPLING = -1  # stands where methods put their layer, so that no method draws the same numbers


def noisy_scores(sampling: Sampling, logits_BV: Tensor, step: int, *, seed: int, row_seed_B: Tensor) -> Tensor:
    """Return scores whose largest entry is the next token of every row.

    Args:
        sampling: temperature and nucleus; with a temperature of 0 the scores are the logits.
        logits_BV: the model's logits, any float dtype.
        step: number of the output token, from 0.
        seed: the run's seed.
        row_seed_B: int64, see `row_seed`.

    Returns:
        float32 [B, V], -inf outside the nucleus: the most likely tokens up to the first whose predecessors hold a share
        `top_p` between them.
    """
    if sampling.temperature == 0:
        return logits_BV.float()
    scaled_BV = logits_BV.float() / sampling.temperature
    if sampling.top_p < 1:
        ordered = scaled_BV.sort(dim=-1, descending=True, stable=True)
        share_BV = ordered.values.softmax(-1)
        outside_BV = share_BV.cumsum(-1) - share_BV >= sampling.top_p
        scaled_BV = scaled_BV.masked_fill(outside_BV.scatter(1, ordered.indices, outside_BV), -torch.inf)
    tokens_V = torch.arange(logits_BV.shape[-1], device=logits_BV.device)
    row_seed_B1 = row_seed_B.to(logits_BV.device)[:, None]
    drawn_BV = noise.uniform(tokens_V, seed=seed, row_seed=row_seed_B1, layer=_SAMPLING, head=0, event=step)
    return scaled_BV + noise.gumbel(drawn_BV)


def row_seed(example: int, sample: int = 0) -> int:
    """Return the seed of one sequence: the example below 2 ** 32, the sample above; sample 0 is the example."""
    return example + (sample << 32)


def encode(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = False) -> Tensor:
    """Return the int64 token ids [P] of a text; with `special`, what the tokenizer adds around a text, too."""
    return torch.tensor(tokenizer(text, add_special_tokens=special)["input_ids"], dtype=torch.long)


def render(
    tokenizer: PreTrainedTokenizerBase, text: str, options: TaskOptions | None = None, *, from_data: bool = True
) -> tuple[str, bool]:
    """Return a prompt as the model reads it, and whether the tokenizer's special tokens are still to be added.

    Args:
        tokenizer: the model's.
        text: the user's message.
        options: chat, system and thinking.
        from_data: the text is a question in words; else it is in the bundled model's own form.

    Raises:
        TaskError: a chat is asked for and the tokenizer has no template, or the template refuses the messages.
    """
    options = options or TaskOptions()
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if options.chat == "off" or (options.chat == "auto" and not (from_data and has_template)):
        return text, from_data
    if not has_template:
        raise TaskError("This model's tokenizer has no chat template; use --chat off.")
    system = [] if options.system is None else [{"role": "system", "content": options.system}]
    thinking = {} if options.thinking is None else {"enable_thinking": options.thinking == "on"}
    messages = [*system, {"role": "user", "content": text}]
    try:
        found = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **thinking)
    except Exception as error:  # a template raises what its author chose
        raise TaskError(f"The model's chat template refuses these messages ({error}).") from None
    return str(found), False


def thinking_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], think_end: str) -> int:
    """Return how many tokens of an output belong to thinking: up to its last end mark, or all if it never ends."""
    text = str(tokenizer.decode(tokens, skip_special_tokens=False))
    head, mark, _ = text.rpartition(think_end)
    if not mark:
        return len(tokens) if THINK in text else 0
    return min(len(tokens), len(encode(tokenizer, head + mark)))


def end_tokens(model: PreTrainedModel) -> list[int]:
    """Return the ids that end a generation, most usual first; empty when the model names none."""
    own = model.generation_config
    found = own.eos_token_id if own is not None else None
    if found is None:
        return []
    return list(found) if isinstance(found, list) else [found]


def context_length(model: PreTrainedModel) -> int | None:
    """Return the most positions the model was made for, or None if its configuration does not say."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return None if limit is None else int(limit)


def room(model: PreTrainedModel, prompt: int, limit: int) -> int:
    """Return how many tokens may follow a prompt of so many tokens: at most the limit, inside the context."""
    context = context_length(model)
    return limit if context is None else min(limit, context - prompt)


def graded(
    task: Task, problem: Problem, tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase, options: TaskOptions
) -> dict[str, Any]:
    """Return the fields of an answer's record that its text decides: the text, its grade, its tokens of thinking."""
    text = str(tokenizer.decode(tokens, skip_special_tokens=True))
    grade = task.grade(problem, text)
    return {
        "output": text,
        "correct": grade.score == 1,
        "score": grade.score,
        "extracted": grade.extracted,
        "grader_error": grade.error,
        "thinking_tokens": thinking_tokens(tokenizer, tokens, options.think_end),
    }
