"""Where CASK's phases end: marker token sequences, and the phase of every token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

PAPER_MARKERS = ("\n", "\n\n", "Therefore", " Therefore", "So", " So", "Hence", " Hence")
"""Texts that end a phase of the reasoning in the reference, each tokenised without special tokens."""


def phases_of_tokens(ids_L: NDArray[np.int64], prompt: int, markers: Iterable[Sequence[int]]) -> NDArray[np.int64]:
    """Phase of every token: -1 in the prompt, then the number of markers that ended before it.

    A marker's own tokens belong to the phase it ends; a marker counts when all of it was decoded.

    Args:
        ids_L: int64, every token of the row.
        prompt: tokens of the prompt.
        markers: token-id sequences.

    """
    decoded = ids_L[prompt:]
    ends = np.zeros(len(decoded), dtype=bool)
    for marker in markers:
        length = len(marker)
        if 0 < length <= len(decoded):
            windows = np.lib.stride_tricks.sliding_window_view(decoded, length)
            ends[length - 1 :] |= (windows == np.asarray(marker)).all(-1)
    phases = np.full(len(ids_L), -1, dtype=np.int64)
    phases[prompt:] = np.cumsum(ends) - ends
    return phases


def phase_markers(tokenizer: Any, texts: Iterable[str] = PAPER_MARKERS) -> str:
    """The option `markers` for a tokenizer: every text's token ids, without special tokens.

    Texts that the tokenizer cannot write (no ids, or an unknown token among them) are left out.

    Args:
        tokenizer: of transformers, or anything with its `encode`.
        texts: what ends a phase; the reference's list unless given.

    """
    found = []
    for text in texts:
        ids = tuple(int(token) for token in tokenizer.encode(text, add_special_tokens=False))
        if ids and getattr(tokenizer, "unk_token_id", None) not in ids and ids not in found:
            found.append(ids)
    return ";".join("-".join(map(str, ids)) for ids in found)
