"""Noise without a generator: an integer hash of who asks, mapped to uniforms, Gumbel noise and normals.

A number depends only on (seed, row seed, layer, KV head, event, draw, token position). No generator object, batch
index or call order enters, so a row of a batch draws what the row alone draws, and every runtime draws the same.

The hash is arithmetic on 32-bit words held in int64. Every product stays below 2 ** 63, so nothing ever overflows and
the bits are equal on every device, in every torch version, compiled or not, and in plain Python. Two words of state
(64 bits) keep the streams of different heads, layers and events apart.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

Word: TypeAlias = Tensor | int

_MASK = 0xFFFFFFFF
# Multipliers of the 32-bit finaliser "lowbias32" (C. Wellons, hash-prospector, 2018; measured avalanche bias 0.17).
# The second is 0x846CA68B - 2 ** 32: the same product modulo 2 ** 32, but below 2 ** 63 in size.
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - (1 << 32)
_START = (0x243F6A88, 0x85A308D3)  # fractional bits of pi: any constants do


def hash_bits(
    positions: Tensor,
    *,
    seed: int,
    row_seed: Tensor | int,
    layer: int,
    head: Tensor | int,
    event: Tensor | int,
    draw: int = 0,
) -> Tensor:
    """32 hashed bits for every position; the arguments broadcast against each other.

    Args:
        positions: int64 token positions, below 2 ** 32.
        seed: the run's seed (64 bits count).
        row_seed: the row's seed, int64 (64 bits count).
        layer: index of the layer.
        head: global index of the KV head, int64.
        event: number of the event, int64; a constant gives a token the same bits for ever.
        draw: number of the draw within the event.

    Returns:
        int64 in [0, 2 ** 32), the broadcast shape.
    """
    state: tuple[Word, Word] = _START
    # Plain integers first: they cost nothing. Then [H], [B], and only the last step is of full size.
    for word in (seed, seed >> 32, layer, draw, head, event, row_seed, row_seed >> 32):
        state = _absorb(state, word & _MASK)
    first, second = state
    bits = _mix((_mix((positions.long() & _MASK) ^ first) + second) & _MASK)
    assert isinstance(bits, Tensor)
    return bits


def uniform(
    positions: Tensor,
    *,
    seed: int,
    row_seed: Tensor | int,
    layer: int,
    head: Tensor | int,
    event: Tensor | int,
    draw: int = 0,
) -> Tensor:
    """Uniform numbers in the open interval (0, 1) from 23 bits of `hash_bits`, whose arguments these are.

    Returns:
        float32, an odd multiple of 2 ** -24 and hence exact: never 0, never 1, and the same on every device.
    """
    bits = hash_bits(positions, seed=seed, row_seed=row_seed, layer=layer, head=head, event=event, draw=draw)
    return ((bits >> 9).float() + 0.5) * 2.0**-23


def gumbel(uniform: Tensor) -> Tensor:
    """Standard Gumbel noise from uniforms in (0, 1), computed in float64 so that devices agree after rounding.

    Returns:
        float32, between -2.9 and 16.7 for the uniforms of this module.
    """
    return (-torch.log(-torch.log(uniform.double()))).float()


def normal(uniform: Tensor) -> Tensor:
    """Standard normals from uniforms in (0, 1) by the inverse distribution function, computed in float64.

    Returns:
        float32, between -5.4 and 5.4 for the uniforms of this module.
    """
    normals: Tensor = torch.special.ndtri(uniform.double())
    return normals.float()


def _mix(word: Word) -> Word:
    """A bijection of 32-bit words in which every input bit flips every output bit about half of the time."""
    word = ((word ^ (word >> 16)) * _FIRST) & _MASK
    word = ((word ^ (word >> 15)) * _SECOND) & _MASK
    return word ^ (word >> 16)


def _absorb(state: tuple[Word, Word], word: Word) -> tuple[Word, Word]:
    """The state after one more 32-bit word; different words always give different states."""
    first = _mix(state[0] ^ word)
    return first, _mix((state[1] + first) & _MASK)
