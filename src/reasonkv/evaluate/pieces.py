"""Teacher forcing in pieces: feed known tokens through a cache in as few forwards as its schedule allows.

Between two events the kept set is constant, so one causal forward of many tokens gives the logits that forwards of one
token would. A piece therefore ends where the schedule of any row puts an event, and nowhere else (but for a cap that
bounds the memory of the logits).

The logits at sequence position p - 1 + t predict output token t, so the last output token is never fed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

MAX_PIECE = 512
"""Most tokens of one forward after the prompt."""
LOGIT_BYTES = 512 * 2**20
"""Most bytes one piece's float32 logits may take; the piece is shortened to fit."""

Distances = Callable[[], Sequence[int | None]]


@dataclass(frozen=True)
class Row:
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
    rows: Sequence[Row],
    *,
    distances: Distances | None = None,
    max_piece: int = MAX_PIECE,
    score: bool = True,
) -> Iterator[Scored]:
    """Feed a batch of traces, prompts first.

    Prompts end together at the end of a piece, shorter ones after left pads; a row whose trace has ended is fed pads
    until the longest has. Masked pads may stand anywhere: the cache neither stores nor counts them.

    Args:
        model: a causal language model.
        cache: its `past_key_values`.
        rows: the traces.
        distances: for each row, tokens until its next event or None; asked before every piece. None: no events.
        max_piece: most tokens of one forward after the prompt; 1 feeds token by token.
        score: False for the sake of what the cache sees alone: hardly any logits are computed, and none yielded.

    Yields:
        Logits of every output token, in order within a row.
    """
    device = model.device
    vocabulary = int(model.config.get_text_config().vocab_size)
    cap = max(1, min(max_piece, LOGIT_BYTES // (4 * vocabulary * len(rows)))) if score else max_piece
    ids = [torch.cat([row.prompt_P, row.output_T[:-1]]) for row in rows]
    at = [0] * len(rows)
    mask_BL = torch.zeros(len(rows), 0, dtype=torch.long, device=device)
    for ends, limit, aligned in (
        ([len(row.prompt_P) for row in rows], None, "right"),
        ([row.fed for row in rows], cap, "left"),
    ):
        while any(here < end for here, end in zip(at, ends, strict=True)):
            width = _width(at, ends, limit, [None] * len(rows) if distances is None else distances())
            ids_BQ, positions_BQ, new_BQ = _piece(ids, at, ends, width, aligned)
            mask_BL = torch.cat([mask_BL, new_BQ.to(device)], dim=1)
            with torch.no_grad():
                logits_BQV = model(
                    ids_BQ.to(device),
                    attention_mask=mask_BL,
                    position_ids=positions_BQ.to(device),
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1 if limit is None or not score else 0,
                ).logits
            for number, row in enumerate(rows):
                fed = int(new_BQ[number].sum())
                at[number] += fed
                prompt = len(row.prompt_P)
                if not score:
                    continue
                if limit is None and fed and at[number] == prompt:
                    yield Scored(number, 0, logits_BQV[number, -1:])
                elif limit is not None and fed:
                    yield Scored(number, at[number] - fed - prompt + 1, logits_BQV[number, :fed])


def _width(at: Sequence[int], ends: Sequence[int], limit: int | None, distances: Sequence[int | None]) -> int:
    """Columns of the next piece: to the nearest event of a row that still has tokens, at most to the longest end."""
    left = [end - here for here, end in zip(at, ends, strict=True)]
    # an event at or beyond a row's own end cuts nothing: the row stops there, whatever the width
    events = [far for far, rest in zip(distances, left, strict=True) if far is not None and far < rest]
    width = min([max(left), *events])
    return width if limit is None else min(width, limit)


def _piece(
    ids: Sequence[Tensor], at: Sequence[int], ends: Sequence[int], width: int, aligned: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, positions and mask [B, width] of the next piece; positions of pads are 0, which nothing reads."""
    ids_BQ = torch.zeros(len(ids), width, dtype=torch.long)
    positions_BQ, mask_BQ = torch.zeros_like(ids_BQ), torch.zeros_like(ids_BQ)
    for row, (tokens, here, end) in enumerate(zip(ids, at, ends, strict=True)):
        count = min(width, end - here)
        # prompts are aligned right, so that the last column predicts the first output token of every row
        columns = slice(width - count, width) if aligned == "right" else slice(0, count)
        ids_BQ[row, columns] = tokens[here : here + count]
        positions_BQ[row, columns] = torch.arange(here, here + count)
        mask_BQ[row, columns] = 1
    return ids_BQ, positions_BQ, mask_BQ
