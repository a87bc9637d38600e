"""Teacher forcing in chunks: feed known tokens through a cache in as few forwards as its schedule allows.

Between two compactions the kept set is constant, so one causal forward of many tokens gives the logits that forwards
of one token would. A chunk therefore ends where the schedule of any sequence compacts, and nowhere else (but for a cap
that bounds the memory of the logits).

The logits at position p - 1 + t predict output token t, so the last output token is never fed.

Legend: B sequences, Q tokens of a chunk, L columns fed so far, N scored tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from reasonkv.offload import input_device

MAX_CHUNK = 512
"""Most tokens of one forward after the prompt."""
LOGIT_BYTES = 512 * 2**20
"""Most bytes one chunk's logits may take; the chunk is shortened to fit."""

Distances = Callable[[], Sequence[int | None]]
"""Return, for each sequence, the tokens until its next compaction, or None."""


@dataclass(frozen=True)
class TraceRow:
    """One trace: int64 ids of its prompt (at least one) and of its output (at least one)."""

    prompt_P: Tensor
    output_T: Tensor

    @property
    def fed(self) -> int:
        """Tokens fed in all: the last output token is only predicted."""
        return len(self.prompt_P) + len(self.output_T) - 1


@dataclass(frozen=True)
class Scored:
    """Logits [N, V] that predict the output tokens `start` to `start + N` of row `row`."""

    row: int
    start: int
    logits_NV: Tensor


def feed(
    model: PreTrainedModel,
    cache: Any,
    rows: Sequence[TraceRow],
    *,
    distances: Distances | None = None,
    max_piece: int = MAX_CHUNK,
    score: bool = True,
) -> Iterator[Scored]:
    """Feed a batch of traces, prompts first, and yield the logits of every output token, in order within a row.

    A row whose trace has ended is fed pads until the longest has. Masked pads may stand anywhere: the cache neither
    stores nor counts them.

    Args:
        distances: asked before every chunk; None: the cache never compacts.
        max_piece: most tokens of one forward after the prompt; 1 feeds token by token.
        score: False only fills the cache: hardly any logits are computed, and none are yielded.
    """
    prompts = [row.prompt_P for row in rows]
    logits, mask_BL = feed_prompts(model, cache, prompts, distances)
    if score:
        yield from (Scored(number, 0, logits_V[None]) for number, logits_V in enumerate(logits))
        vocabulary = int(model.config.get_text_config().vocab_size)
        max_piece = max(1, min(max_piece, LOGIT_BYTES // (model.dtype.itemsize * vocabulary * len(rows))))
    at = [len(prompt) for prompt in prompts]
    ids = [torch.cat([row.prompt_P, row.output_T[:-1]]) for row in rows]
    for fed, logits_BQV, _ in _forwards(model, cache, ids, at, mask_BL, distances, max_piece, keep=0 if score else 1):
        for number, count in enumerate(fed):
            if score and count:
                yield Scored(number, at[number] - count - len(prompts[number]) + 1, logits_BQV[number, :count])


def feed_prompts(
    model: PreTrainedModel, cache: Any, prompts: Sequence[Tensor], distances: Distances | None = None
) -> tuple[list[Tensor], Tensor]:
    """Feed a batch of prompts in chunks, shorter ones after left pads.

    Returns:
        For each row the logits [V] after its last token; and the mask [B, L] of everything fed.
    """
    at = [0] * len(prompts)
    logits = [torch.empty(0)] * len(prompts)
    nothing_B0 = mask_BL = torch.zeros(len(prompts), 0, dtype=torch.long, device=input_device(model))
    for fed, logits_B1V, mask_BL in _forwards(model, cache, prompts, at, nothing_B0, distances, None, keep=1):  # noqa: B007
        for number, count in enumerate(fed):
            if count and at[number] == len(prompts[number]):
                logits[number] = logits_B1V[number, -1]
    return logits, mask_BL


@torch.no_grad()
def _forwards(
    model: PreTrainedModel,
    cache: Any,
    ids: Sequence[Tensor],
    at: list[int],
    mask_BL: Tensor,
    distances: Distances | None,
    limit: int | None,
    keep: int,
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Feed every row from `at`, which is advanced, to its end; yield tokens fed of each row, logits and mask.

    Without a limit, tokens are aligned right, so that the last column predicts the next token of every row.
    """
    while any(here < len(row) for here, row in zip(at, ids, strict=True)):
        left = [len(row) - here for here, row in zip(at, ids, strict=True)]
        far = [None] * len(ids) if distances is None else distances()
        # a compaction at or beyond a row's own end cuts nothing: the row stops there, whatever the width
        cuts = [n for n, rest in zip(far, left, strict=True) if n is not None and n < rest]
        width = min([max(left), *cuts] if limit is None else [max(left), limit, *cuts])
        fed = [min(width, rest) for rest in left]
        ids_BQ, positions_BQ, mask_BQ = torch.zeros(3, len(ids), width, dtype=torch.long)
        for row, (tokens, start, count) in enumerate(zip(ids, at, fed, strict=True)):
            columns = slice(width - count, width) if limit is None else slice(0, count)
            ids_BQ[row, columns] = tokens[start : start + count]
            positions_BQ[row, columns] = torch.arange(start, start + count)  # pads keep 0, which nothing reads
            mask_BQ[row, columns] = 1
            at[row] += count
        mask_BL = torch.cat([mask_BL, mask_BQ.to(input_device(model))], dim=1)
        logits = model(
            ids_BQ.to(input_device(model)),
            attention_mask=mask_BL,
            position_ids=positions_BQ.to(input_device(model)),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=keep,
        ).logits
        yield fed, logits, mask_BL
