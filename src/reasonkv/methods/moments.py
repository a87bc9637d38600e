"""Mean and covariance of queries before RoPE, and what normal queries of these are expected to attend to.

Legend: B rows, H KV heads, q query heads, g query heads per KV head, N slots, D head_dim, F rotary pairs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from reasonkv.methods.ops import by_head, upcast
from reasonkv.rotary import Rotary


class Moments(NamedTuple):
    """Mean and covariance of queries, float64, with dimensions in canonical order (`Rotary.canonical`).

    Args:
        mean_BqD: mean, q = query heads.
        full_BqDD: covariance, or None.
        variance_BqD: its diagonal, or None; with it
        cross_BqF: the covariance within each pair.
    """

    mean_BqD: Tensor
    full_BqDD: Tensor | None = None
    variance_BqD: Tensor | None = None
    cross_BqF: Tensor | None = None


def add_queries(
    sums: dict[str, Tensor], queries_BqtD: Tensor, positions_Bt: Tensor, is_counted_Bt: Tensor, rotary: Rotary
) -> None:
    """Add queries as they were before RoPE to the sums, in place."""
    F = rotary.inv_freq.numel()
    plain_BqtD = rotary.canonical(rotary.unrotate(upcast(queries_BqtD), positions_Bt[:, None]).double())
    plain_BqtD = plain_BqtD.masked_fill(~is_counted_Bt[:, None, :, None], 0.0)
    sums["seen"] += is_counted_Bt.sum(1)
    sums["sum"] += plain_BqtD.sum(2)
    if "products" in sums:
        sums["products"] += plain_BqtD.mT @ plain_BqtD
    if "squares" in sums:
        sums["squares"] += plain_BqtD.square().sum(2)
        sums["cross"][..., :F] += (plain_BqtD[..., :F] * plain_BqtD[..., F : 2 * F]).sum(2)


def moments_of(sums: dict[str, Tensor], rotary: Rotary) -> Moments:
    """Return mean and covariance of the queries that were added to the sums."""
    count_B11 = sums["seen"].clamp(min=1)[:, None, None]
    mean_BqD = sums["sum"] / count_B11
    if "products" in sums:
        square_BqDD = mean_BqD[..., :, None] * mean_BqD[..., None, :]
        return Moments(mean_BqD, sums["products"] / count_B11[..., None] - square_BqDD)
    if "squares" not in sums:
        return Moments(mean_BqD)
    F = rotary.inv_freq.numel()
    cross_BqF = sums["cross"][..., :F] / count_B11 - mean_BqD[..., :F] * mean_BqD[..., F : 2 * F]
    return Moments(mean_BqD, None, sums["squares"] / count_B11 - mean_BqD.square(), cross_BqF)


def mean_rotation(rotary: Rotary, start_B: Tensor, count: int) -> Tensor:
    """Return what RoPE multiplies pairs by, the mean over `count` positions from `start_B` on, complex128 [B, F].

    The scaling factor is in it. In closed form: the sum of a geometric series of unit steps.
    """
    half_F = rotary.inv_freq.to(start_B.device, torch.float64) / 2
    # Mean of exp(2 i h t) over t < n: a unit at the middle, times sin(n h) / (n sin h), which is 1 for h = 0.
    length_F = torch.where(half_F == 0, 1.0, (count * half_F).sin() / (count * half_F.sin()))
    middle_BF = (2.0 * start_B[:, None] + count - 1) * half_F
    return torch.polar(rotary.scaling * torch.ones_like(middle_BF), middle_BF) * length_F


def rotated(moments: Moments, turn_BF: Tensor) -> Moments:
    """Return the moments of queries multiplied, pair by pair, by the complex numbers `turn_BF`."""
    turn_BqF = turn_BF[:, None]
    mean_BqD = _turned(moments.mean_BqD, turn_BqF)
    if moments.full_BqDD is not None:
        turn_BqDF = turn_BqF[:, :, None]
        return Moments(mean_BqD, _turned(_turned(moments.full_BqDD, turn_BqDF).mT, turn_BqDF))
    if moments.variance_BqD is None or moments.cross_BqF is None:
        return Moments(mean_BqD)
    # Of a complex q: E|q|^2 is multiplied by |turn|^2, E q^2 by turn^2.
    F = turn_BF.shape[-1]
    first, second, rest = moments.variance_BqD.tensor_split([F, 2 * F], dim=-1)
    modulus_BqF = (first + second) * turn_BqF.abs().square()
    square_BqF = torch.complex(first - second, 2 * moments.cross_BqF) * turn_BqF.square()
    variance_BqD = torch.cat([(modulus_BqF + square_BqF.real) / 2, (modulus_BqF - square_BqF.real) / 2, rest], dim=-1)
    return Moments(mean_BqD, None, variance_BqD, square_BqF.imag / 2)


def expected_logits(keys_BHND: Tensor, moments: Moments, scaling: float) -> Tensor:
    """Return log E exp(scaling q.k) of every slot for normal queries of these (rotated) moments, float32 [B, Hq, N].

    Keys come with their dimensions in canonical order, as the moments do.
    """
    H, N, D = keys_BHND.shape[1:]
    g = moments.mean_BqD.shape[1] // H
    dtype = torch.promote_types(keys_BHND.dtype, torch.float32)
    # E of the square of scaling q.k / sqrt 2, in parts
    squares = [(0.5 * scaling**2 * part).to(dtype) for part in moments[1:] if part is not None]

    def of_heads(keys_rND: Tensor, mean_rgD: Tensor, *parts: Tensor) -> Tensor:
        logits_rgN = mean_rgD @ keys_rND.mT
        if len(parts) == 1:
            logits_rgN += ((keys_rND[:, None] @ parts[0]) * keys_rND[:, None]).sum(-1)
        elif parts:
            variance_rgD, cross_rgF = parts
            F = cross_rgF.shape[-1]
            logits_rgN += variance_rgD @ keys_rND.square().mT
            logits_rgN += 2 * cross_rgF @ (keys_rND[..., :F] * keys_rND[..., F : 2 * F]).mT
        return logits_rgN

    parts = [torch.unflatten(x, 1, (H, g)) for x in ((scaling * moments.mean_BqD).to(dtype), *squares)]
    elements = (1 if moments.full_BqDD is None else g) * N * D
    return by_head(of_heads, keys_BHND, *parts, elements=elements).flatten(1, 2)


def _turned(x: Tensor, turn: Tensor) -> Tensor:
    """Return pairs of `x` [..., D] multiplied by complex numbers [..., F]; further dimensions stay."""
    F = turn.shape[-1]
    first, second, rest = x.tensor_split([F, 2 * F], dim=-1)
    return torch.cat([first * turn.real - second * turn.imag, second * turn.real + first * turn.imag, rest], dim=-1)
