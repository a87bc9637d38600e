"""What to calibrate on: windows of a plain text, or task traces."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, zip_longest
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reasonkv.calibration.statistics import CalibrationError
from reasonkv.tasks import Task

_CHARACTERS = 64
"""Characters read per token wanted: more than any tokenizer puts into one on average."""


def text_batches(
    tokenizer: PreTrainedTokenizerBase, path: Path, *, tokens: int, window: int, batch_size: int
) -> Iterator[Tensor]:
    """The first tokens of a text file as windows; the last window may be shorter.

    Each window begins with the token the tokenizer puts before every text (such as `<s>`), if it does so.

    Args:
        tokenizer: the model's.
        path: UTF-8 text.
        tokens: most tokens in all.
        window: tokens of a window.
        batch_size: windows of equal length in one batch.

    Yields:
        int64 [B, T].

    Raises:
        CalibrationError: the file is missing, empty, or not UTF-8.
    """
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(_CHARACTERS * tokens)
    except UnicodeDecodeError:
        raise CalibrationError(f"{path} is not UTF-8 text.") from None
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read: {error.strerror}.") from None
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    begin = [one for one in tokenizer("")["input_ids"] if one == tokenizer.bos_token_id][:1]
    if not ids:
        raise CalibrationError(f"{path} holds no text.")
    inside = max(1, window - len(begin))
    rows = [begin + ids[at : at + inside] for at in range(0, len(ids), inside)]
    return _batches(_first(rows, tokens), batch_size)


def trace_batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    *,
    limit: int,
    seed: int,
    tokens: int,
    window: int,
) -> Iterator[Tensor]:
    """Prompts with their reference traces, one row each, cut to `window`; tasks take turns.

    They are of the training split, so that nothing is calibrated on what it is tested with.

    Args:
        model: for its end-of-sequence token.
        tokenizer: the model's.
        tasks: task families.
        limit: problems of each.
        seed: of the problems.
        tokens: most tokens in all.
        window: most tokens of a row.

    Yields:
        int64 [1, T].
    """
    # imported here because the evaluation imports the runtimes, which import this package
    from reasonkv.evaluate.generate import encode, end_tokens

    end = end_tokens(model)[:1]

    def of(task: Task) -> Iterator[list[int]]:
        for example in range(limit):
            problem = task.problem(example, seed=seed, split="train")
            yield (encode(tokenizer, f"{problem.prompt} {problem.trace}").tolist() + end)[:window]

    turns = chain.from_iterable(zip_longest(*(of(task) for task in tasks)))
    return _batches(_first((row for row in turns if row), tokens), 1)


def _first(rows: Iterable[list[int]], tokens: int) -> Iterator[list[int]]:
    for row in rows:
        if tokens <= 0:
            return
        yield row[:tokens]
        tokens -= len(row)


def _batches(rows: Iterable[list[int]], size: int) -> Iterator[Tensor]:
    held: list[list[int]] = []
    for row in rows:
        if held and (len(held) == size or len(held[0]) != len(row)):
            yield torch.tensor(held)
            held = []
        held.append(row)
    if held:
        yield torch.tensor(held)
