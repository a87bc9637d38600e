"""Phases of a reasoning trace, which end at marker texts (CASK)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reasonkv.methods.catalogue import MethodError

PAPER_MARKERS = ("\n", "\n\n", "Therefore", " Therefore", "So", " So", "Hence", " Hence")
"""Texts that end a phase in CASK's code, each tokenised without special tokens."""


def phase_markers(tokenizer: Any) -> str:
    """Return the token ids of `PAPER_MARKERS`, as in "198;271;12-13", without texts that the tokenizer cannot write."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    found = [tokenizer.encode(text, add_special_tokens=False) for text in PAPER_MARKERS]
    written = ["-".join(map(str, ids)) for ids in found if ids and unknown not in ids]
    return ";".join(dict.fromkeys(written))


def parse_markers(text: str) -> tuple[tuple[int, ...], ...]:
    """Return markers as token ids; none of "" and "none".

    Raises:
        MethodError: the text has another form.
    """
    try:
        markers = text.split(";") if text not in ("", "none") else []
        return tuple(tuple(int(token) for token in one.split("-")) for one in markers if one)
    except ValueError:
        raise MethodError(f"cask: markers must be token ids like 198;271;12-13, or none, not {text!r}.") from None


def phases_of_tokens(ids_L: NDArray[np.int64], prompt: int, markers: Iterable[Sequence[int]]) -> NDArray[np.int64]:
    """Return the phase of every token: -1 in the prompt, then the number of markers that ended before it.

    A marker's own tokens belong to the phase it ends; a marker counts when all of it was decoded.

    Args:
        ids_L: every token of the sequence.
        prompt: tokens of the prompt.
        markers: token-id sequences.
    """
    decoded = ids_L[prompt:]
    ends = np.zeros(len(decoded), dtype=bool)
    for marker in markers:
        if 0 < len(marker) <= len(decoded):
            windows = np.lib.stride_tricks.sliding_window_view(decoded, len(marker))
            ends[len(marker) - 1 :] |= (windows == np.asarray(marker)).all(-1)
    return np.concatenate([np.full(len(ids_L) - len(decoded), -1), np.cumsum(ends) - ends])
