"""Text in and out of a model: chat templates, token ids, limits, grades, loops, and where outputs part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reasonkv.resolve import context_length
from reasonkv.tasks.base import Problem, Task, TaskError
from reasonkv.tasks.given import GivenTrace
from reasonkv.tasks.options import THINK, TaskOptions

LONGEST_PERIOD = 64
"""Longest n-gram whose repetition counts as a loop, tokens."""
REPEATS = 3
"""How often an n-gram must stand back to back to count as one."""


def row_seed(example: int, sample: int = 0) -> int:
    """Return the seed of one sequence: the example below 2 ** 32, the sample above; sample 0 is the example."""
    return example + (sample << 32)


def encode(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = False) -> Tensor:
    """Return the int64 token ids [P] of a text; with `special`, what the tokenizer adds around a text, too."""
    return torch.tensor(tokenizer(text, add_special_tokens=special)["input_ids"], dtype=torch.long)


def decode(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], stop: Sequence[str] = ()) -> str:
    """Return an output as text, without special tokens, up to the first of the stop texts."""
    text = str(tokenizer.decode(tokens, skip_special_tokens=True))
    for one in stop:
        text = text.partition(one)[0]
    return text


def render(
    tokenizer: PreTrainedTokenizerBase, text: str, options: TaskOptions | None = None, *, from_data: bool = True
) -> tuple[str, bool]:
    """Return a prompt as the model reads it, and whether the tokenizer's special tokens are still to be added.

    Args:
        from_data: the text is a question in words; else it is in the bundled model's own form.

    Raises:
        TaskError: a chat is asked for and the tokenizer has no template, or the template refuses the messages.
    """
    options = options or TaskOptions()
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if options.chat == "off" or (options.chat == "auto" and not (from_data and has_template)):
        return text, from_data
    system = [] if options.system is None else [{"role": "system", "content": options.system}]
    return render_chat(tokenizer, [*system, {"role": "user", "content": text}], options), False


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], options: TaskOptions) -> str:
    """Return messages in the tokenizer's chat template, up to where the model's answer begins.

    Raises:
        TaskError: the tokenizer has no template, or it refuses the messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise TaskError("This model's tokenizer has no chat template; use --chat off.")
    thinking = {} if options.thinking is None else {"enable_thinking": options.thinking == "on"}
    try:
        found = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True, **thinking)
    except Exception as error:  # a template raises what its author chose
        raise TaskError(f"The model's chat template refuses these messages ({error}).") from None
    return str(found)


def opens_thinking(tokenizer: PreTrainedTokenizerBase, prompt_P: Tensor, think_end: str) -> bool:
    """Return whether an output begins inside of thinking, because its prompt ends with thinking under way."""
    prompt = str(tokenizer.decode(prompt_P, skip_special_tokens=False))
    return prompt.rfind(THINK) > prompt.rfind(think_end)


def thinking_tokens(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], think_end: str, opened: bool = False
) -> int:
    """Return how many tokens of an output belong to thinking: up to its last end mark, or all if it never ends."""
    text = str(tokenizer.decode(tokens, skip_special_tokens=False))
    head, mark, _ = text.rpartition(think_end)
    if not mark:
        return len(tokens) if opened or THINK in text else 0
    return min(len(tokens), len(encode(tokenizer, head + mark)))


def encode_given(tokenizer: PreTrainedTokenizerBase, trace: GivenTrace, options: TaskOptions) -> tuple[Tensor, Tensor]:
    """Return the int64 token ids of a trace from elsewhere: prompt [P] and output [T].

    Text is tokenized once as a whole, so that the boundary is the one the engine saw; where that changes the tokens of
    the prompt, the output is tokenized alone. Text holds no end-of-sequence token, so none is scored.
    """
    if trace.messages is None and not isinstance(trace.prompt, str):
        prompt_P, prompt, special = torch.tensor(trace.prompt, dtype=torch.long), None, False
    else:
        chat = trace.messages
        prompt = str(trace.prompt) if chat is None else render_chat(tokenizer, chat, options)
        special = chat is None and not prompt.startswith(str(tokenizer.bos_token))
        prompt_P = encode(tokenizer, prompt, special=special)
    if not isinstance(trace.output, str):
        return prompt_P, torch.tensor(trace.output, dtype=torch.long)
    output = trace.output_text(prompt or "", options.think_end)
    if prompt is not None:
        whole_L = encode(tokenizer, prompt + output, special=special)
        if torch.equal(whole_L[: len(prompt_P)], prompt_P):
            return prompt_P, whole_L[len(prompt_P) :]
    return prompt_P, encode(tokenizer, output)


def end_tokens(model: PreTrainedModel) -> list[int]:
    """Return the ids that end a generation, most usual first; empty when the model names none."""
    own = model.generation_config
    found = own.eos_token_id if own is not None else None
    if found is None:
        return []
    return list(found) if isinstance(found, list) else [found]


def room(model: PreTrainedModel, prompt: int, limit: int) -> int:
    """Return how many tokens may follow a prompt of so many tokens: at most the limit, inside the context."""
    context = context_length(model)
    return limit if context is None else min(limit, context - prompt)


def graded(task: Task, problem: Problem, text: str, opened: bool = False) -> dict[str, Any]:
    """Return the fields of an answer's record that its text decides: the text and its grade.

    With `opened`, the output continues the thinking of its prompt; if that never ends, there is no answer.
    """
    grade = task.grade(problem, THINK + text if opened else text)
    return {
        "output": text,
        "correct": grade.score == 1,
        "score": grade.score,
        "extracted": grade.extracted,
        "grader_error": grade.error,
    }


def repetition(tokens: Sequence[int]) -> float:
    """Share of tokens that lie in a loop: a run in which one n-gram of 1 to 64 tokens stands at least 3 times in a row.

    Only exact, immediate periodicity counts; text that comes back to the same words after others is no loop. The run
    ends with its last token that still follows the period, so that a last, unfinished repeat counts as well.

    Returns:
        0 to 1; 0 for no tokens.
    """
    ids_T = np.asarray(tokens, dtype=np.int64)
    total = len(ids_T)
    change = np.zeros(total + 1, dtype=np.int64)  # +1 where a run of any period begins, -1 after it ends
    for period in range(1, min(LONGEST_PERIOD, total // REPEATS) + 1):
        edges = np.diff(ids_T[period:] == ids_T[:-period], prepend=False, append=False).nonzero()[0]
        starts, stops = edges[::2], edges[1::2]  # of every run of matches
        long = stops - starts >= (REPEATS - 1) * period
        # a match at place i is between tokens i and i + period, so a run of matches covers `period` more tokens
        np.add.at(change, starts[long], 1)
        np.add.at(change, stops[long] + period, -1)
    return float((change.cumsum()[:total] > 0).mean()) if total else 0.0


def first_divergence(tokens: Sequence[int], reference: Sequence[int]) -> int | None:
    """Index of the first token in which an output differs from another, or None if they are equal.

    Where one is the beginning of the other, they differ where it ends.
    """
    shared = min(len(tokens), len(reference))
    different = np.asarray(tokens[:shared], dtype=np.int64) != np.asarray(reference[:shared], dtype=np.int64)
    if different.any():
        return int(different.argmax())
    return None if len(tokens) == len(reference) else shared
