"""The sequences that a model is calibrated or trained on: windows of a text file, or prompts with reference traces."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reasonkv.calibration.job import CorpusError, CorpusJob
from reasonkv.resolve import context_length
from reasonkv.tasks import Task

_CHARACTERS = 64
"""Characters read per token wanted: more than any tokenizer puts into one on average."""


class Passage(NamedTuple):
    """One sequence, int64 ids [L], and how many of its first tokens are prompt."""

    ids_L: Tensor
    prompt: int


def read_corpus(
    job: CorpusJob,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task] = (),
) -> tuple[Iterator[Passage], str]:
    """Return the sequences of a job, and a line for the record that says what they are.

    The windows of a text are 4,096 tokens long, or 1,024 where eager attention writes all its logits out; never longer
    than the model's context.

    Raises:
        CorpusError: the text is missing, empty, or not UTF-8 (when the first passage is asked for).
    """
    if job.text is not None:
        is_eager = model.config.get_text_config()._attn_implementation == "eager"
        window = job.window or min(1024 if is_eager else 4096, context_length(model) or 4096)
        return _text_passages(tokenizer, job, window), f"text {job.text.name} in windows of {window} tokens"
    found = task_passages(
        model, tokenizer, tasks, limit=job.limit, seed=job.seed, tokens=job.tokens, longest=job.window
    )
    names = ", ".join(job.task)
    return found, f"reference traces of {job.limit} training problems each (seed {job.seed}): {names}"


def _text_passages(tokenizer: PreTrainedTokenizerBase, job: CorpusJob, window: int) -> Iterator[Passage]:
    """Yield the first tokens of a text file as windows; the last window may be shorter.

    Each window begins with the token that the tokenizer puts before every text (such as `<s>`), if there is one. The
    first half of a window counts as prompt (SeerAttention-R).
    """
    path, tokens = job.text, job.tokens
    assert path is not None
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(_CHARACTERS * tokens)
    except UnicodeDecodeError:
        raise CorpusError(f"{path} is not UTF-8 text.") from None
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror}.") from None
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise CorpusError(f"{path} holds no text.")
    begin = [one for one in tokenizer("")["input_ids"] if one == tokenizer.bos_token_id][:1]
    step = max(1, window - len(begin))
    for start in range(0, len(ids), step):
        row = [*begin, *ids[start : start + step]][:tokens]
        tokens -= len(row)
        if row:
            yield Passage(torch.tensor(row), len(row) // 2)


def task_passages(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    *,
    limit: int,
    seed: int = 0,
    split: str = "train",
    tokens: int | None = None,
    longest: int | None = None,
) -> Iterator[Passage]:
    """Yield prompts with their reference traces; tasks take turns.

    Args:
        model: gives the end-of-sequence token and the context.
        tasks: task families.
        limit: problems of each.
        split: "train", so that nothing is fitted to what it is tested with.
        tokens: most tokens in all.
        longest: most tokens of a sequence; the model's context unless given.
    """
    own = model.generation_config.eos_token_id if model.generation_config is not None else None
    end = [] if own is None else [own] if isinstance(own, int) else list(own[:1])
    longest = longest or context_length(model)
    for example, task in product(range(limit), tasks):
        problem = task.problem(example, seed=seed, split=split)
        prompt = len(tokenizer(problem.prompt, add_special_tokens=False)["input_ids"])
        text = f"{problem.prompt} {problem.trace}"
        ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], *end][:longest][:tokens]
        if not ids:
            return
        if tokens is not None:
            tokens -= len(ids)
        yield Passage(torch.tensor(ids), prompt)


def batches(passages: Iterable[Passage], size: int) -> Iterator[Tensor]:
    """Yield int64 ids [B, T] of up to `size` neighbouring sequences of equal length."""
    waiting: list[Tensor] = []
    for ids_L, _ in passages:
        if waiting and (len(waiting) == size or len(waiting[0]) != len(ids_L)):
            yield torch.stack(waiting)
            waiting = []
        waiting.append(ids_L)
    if waiting:
        yield torch.stack(waiting)
