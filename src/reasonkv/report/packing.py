"""Token texts, fates and attention as JSON-ready data for the inspector's page.

Legend: G layers, H KV heads, I intervals between compactions, N tokens.
"""

from __future__ import annotations

import base64
import math
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from reasonkv.evaluate.fates import Fates

LEAST_ATTENTION, MOST_ATTENTION = 1e-4, 1e4
"""Range of the 8-bit logarithmic scale; what is below is written as 0."""
MOST_ATTENTION_BYTES = 2_000_000
"""Attention of models with many layers and heads is averaged over heads, then over layers, to stay below this."""


def token_pieces(tokenizer: PreTrainedTokenizerBase, ids_N: Tensor) -> list[str]:
    """The text each token adds to the ones before it, leading spaces and newlines included; never empty.

    A token that is only part of a character, or adds nothing, appears under its name in the vocabulary.
    """
    ids = ids_N.tolist()
    seen: dict[tuple[int | None, int], str] = {}
    pieces = []
    for before, token in zip([None, *ids[:-1]], ids, strict=True):
        if (before, token) not in seen:
            seen[before, token] = piece(tokenizer, before, token)
        pieces.append(seen[before, token])
    return pieces


def piece(tokenizer: PreTrainedTokenizerBase, before: int | None, token: int) -> str:
    """Return the text of one token after another; None: at the start."""

    def decoded(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    alone = decoded([token])
    if before is not None:
        first, both = decoded([before]), decoded([before, token])
        alone = both[len(first) :] if both.startswith(first) and len(both) > len(first) else alone
    if alone and "\ufffd" not in alone:
        return alone
    return str(tokenizer.convert_ids_to_tokens(token) or f"<{token}>")


def packed_fates(found: Fates, heads: int) -> dict[str, Any]:
    """Return fates as int16 and int32 in base64; without merges only what was evicted."""
    shape = [len(found.layers), heads, found.dropped_GHN.shape[-1]]
    dropped, folded, into = (one.expand(shape) for one in (found.dropped_GHN, found.folded_GHN, found.into_GHN))
    folds = bool((folded >= 0).any())
    return {
        "dropped": base64_of(dropped.to(torch.int16)),
        "folded": base64_of(folded.to(torch.int16)) if folds else None,
        "into": base64_of(into.to(torch.int32)) if folds else None,
    }


def packed_attention(received_GHIN: Tensor) -> dict[str, Any]:
    """Return attention in 255 logarithmic steps (7.5 % each): 0 is below the least, q is least * ratio ** (q - 1)."""
    for axis in (1, 0):
        if received_GHIN.numel() > MOST_ATTENTION_BYTES:
            received_GHIN = received_GHIN.mean(axis, keepdim=True)
    step = math.log(MOST_ATTENTION / LEAST_ATTENTION) / 254
    levels = ((received_GHIN.clamp(min=1e-30) / LEAST_ATTENTION).log() / step).round() + 1
    return {
        "shape": list(received_GHIN.shape),
        "least": LEAST_ATTENTION,
        "ratio": math.exp(step),
        "data": base64_of(levels.clamp(0, 255).to(torch.uint8)),
    }


def base64_of(values: Tensor) -> str:
    """Return little-endian bytes in base64."""
    array = values.contiguous().numpy()
    return base64.b64encode(array.astype(array.dtype.newbyteorder("<")).tobytes()).decode()
