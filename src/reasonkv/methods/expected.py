"""Expected attention: what queries drawn from the distribution of past ones would attend to at the next positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from annotated_types import Ge
from torch import Tensor

from reasonkv.methods.base import OF_VARIANT, Observed, Requirements, ScorerMethod
from reasonkv.methods.ops import head_blocks, upcast
from reasonkv.methods.options import Count, Size
from reasonkv.rotary import Rotary
from reasonkv.view import SlotView

_TOKENS_AT_ONCE = 256  # of one forward's queries in float64


class Moments(NamedTuple):
    """Mean and covariance of queries, float64; F = rotary pairs, the first 2F of D dimensions, (f, F + f) a pair.

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


@dataclass(frozen=True)
class ExpectedAttention(ScorerMethod):
    """Keep what future queries are expected to attend to, weighed by the value (Devoto et al., 2025, "Expected
    Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution", arXiv 2510.00636).

    1. Queries before RoPE are taken as normal with the mean mu and covariance S of those seen.
    2. Both are rotated by A, the mean rotation over the `future` positions that come next.
    3. Expected attention of a slot: softmax over slots of log E exp(q.k / sqrt D) = A mu.k / sqrt D + k.A S A'k / 2D.
    4. Times the norm of the value; mean over the query heads of a KV head.

    `variant="corrected"` takes the statistics of every query since the start, stored as sums beside the cache, and the
    true next positions. The others are here for comparison:

    * "kvpress" (the authors' code): the same with the whole covariance; the keys of the first `sinks` tokens are kept
      and stay outside the softmax. It compresses a prompt once; at later compactions the statistics here include what
      was decoded.
    * "cask" (the baseline in CASK's code): the statistics of the newest `window` queries alone, of which the first
      `sinks` are cut where the window is longer: four queries at its defaults. The next position is taken to be the
      number of kept slots, which after the first compaction it is not. The window's tokens are always kept.

    Float64 sums per query head and sequence, which do not depend on how tokens are divided into forwards: 2.5 D numbers
    for "bands", D + D * D for "full", D for "none", and 8 bytes each; at Qwen3-8B geometry 3, 153 and 1.2 MB for all
    layers, beside 151 MB of bf16 keys and values at 1,024 slots.

    Args:
        variant: "corrected", "kvpress" or "cask".
        covariance: "bands" - within each rotary pair (dimensions without RoPE: their variances); "full" - all pairs
            of dimensions; "none" - the mean alone. Unless given: "bands" of "corrected", "full" of the others.
        future: positions averaged over.
        value_norm: multiply by the norm of the value.
        epsilon: added to the expected attention before the norm multiplies it, so that large values are kept.
        sinks: first tokens whose queries do not count, because they are unlike all others; see the variants.
        window: newest queries of "cask".
    """

    name: ClassVar[str] = "expected"
    variants: ClassVar[dict[str, dict[str, object]]] = {
        "corrected": {"covariance": "bands"},
        "kvpress": {"covariance": "full"},
        "cask": {"covariance": "full"},
    }

    variant: Literal["corrected", "kvpress", "cask"] = "corrected"
    covariance: Literal["bands", "full", "none"] = OF_VARIANT
    future: Size = 512
    value_norm: bool = True
    epsilon: Annotated[float, Ge(0)] = 0.0
    sinks: Count = 4
    window: Size = 8

    @property
    def needs(self) -> Requirements:
        if self.variant == "cask":
            return Requirements(queries=self.window, recent=self.window, rotary=True)
        return Requirements(observes=True, rotary=True)

    def new_row_state(self, rows: int, query_heads: int, head_dim: int, device: torch.device) -> dict[str, Tensor]:
        """Return sums over queries, float64 (see the class)."""
        shapes: dict[str, tuple[int, ...]] = {"sum": (head_dim,)}
        if self.covariance == "full":
            shapes["products"] = (head_dim, head_dim)
        elif self.covariance == "bands":
            shapes |= {"squares": (head_dim,), "cross": (head_dim // 2,)}
        sums = {name: (rows, query_heads, *shape) for name, shape in shapes.items()} | {"seen": (rows,)}
        return {name: torch.zeros(shape, dtype=torch.float64, device=device) for name, shape in sums.items()}

    def observe(self, state: dict[str, Tensor], seen: Observed) -> None:
        """Add the queries of one forward; those of padding and of the first `sinks` tokens do not count."""
        for queries_BqtD, positions_Bt, valid_Bt in zip(
            torch.split(seen.queries_BHqqD, _TOKENS_AT_ONCE, 2),
            torch.split(seen.positions_Bq, _TOKENS_AT_ONCE, 1),
            torch.split(seen.valid_Bq, _TOKENS_AT_ONCE, 1),
            strict=True,
        ):
            add_queries(state, queries_BqtD, positions_Bt, valid_Bt & (positions_Bt >= self.sinks), seen.rotary)

    def score(self, view: SlotView) -> Tensor:
        """Return scores by steps 2 to 4."""
        assert view.rotary is not None
        B, H, N = view.positions_BHN.shape
        is_cask = self.variant == "cask"
        sums = self._window_sums(view) if is_cask else view.row_state
        start_B = torch.full_like(view.length_B, N) if is_cask else view.length_B
        moments = rotated(moments_of(sums, view.rotary), mean_rotation(view.rotary, start_B, self.future))
        logits_BHgN = expected_logits(view.keys_BHND, moments, view.scaling).view(B, H, -1, N)
        is_sink_BHN = view.positions_BHN < (0 if self.variant == "corrected" else self.sinks)
        scores_BHN = logits_BHgN.masked_fill(is_sink_BHN[:, :, None], float("-inf")).softmax(-1).mean(2)
        if self.value_norm:
            scores_BHN = (scores_BHN + self.epsilon) * upcast(view.values_BHND).norm(dim=-1)
        scores_BHN = scores_BHN.masked_fill(is_sink_BHN, 0.0)
        return torch.where(is_sink_BHN, scores_BHN.amax(-1, keepdim=True) + 1.0, scores_BHN)

    def _window_sums(self, view: SlotView) -> dict[str, Tensor]:
        assert view.queries_BHqTD is not None and view.query_positions_BT is not None and view.rotary is not None
        B, Hq, T, D = view.queries_BHqTD.shape
        sums = self.new_row_state(B, Hq, D, view.queries_BHqTD.device)
        first = self.sinks if self.sinks < T else 0
        positions_Bt = view.query_positions_BT[:, first:]
        is_counted_Bt = torch.ones_like(positions_Bt, dtype=torch.bool)
        add_queries(sums, view.queries_BHqTD[:, :, first:], positions_Bt, is_counted_Bt, view.rotary)
        return sums


def add_queries(
    sums: dict[str, Tensor], queries_BqtD: Tensor, positions_Bt: Tensor, is_counted_Bt: Tensor, rotary: Rotary
) -> None:
    """Add queries as they were before RoPE to the sums, in place."""
    F = rotary.inv_freq.numel()
    plain_BqtD = rotary.unrotate(upcast(queries_BqtD), positions_Bt[:, None]).double()
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
    """Return log E exp(scaling q.k) of every slot for normal queries of these (rotated) moments, float32 [B, Hq, N]."""
    B, H, N, D = keys_BHND.shape
    g = moments.mean_BqD.shape[1] // H
    dtype = torch.promote_types(keys_BHND.dtype, torch.float32)
    mean_RgD = (scaling * moments.mean_BqD).to(dtype).view(B * H, g, D)
    # E of the square of scaling q.k / sqrt 2, in parts
    full, variance, cross = (
        None if part is None else (0.5 * scaling**2 * part).to(dtype).view(B * H, g, *part.shape[2:])
        for part in moments[1:]
    )
    keys_RND = keys_BHND.flatten(0, 1)
    parts = []
    for block in head_blocks(B * H, (g if full is not None else 1) * N * D, keys_RND.device):
        keys = upcast(keys_RND[block])
        logits_rgN = mean_RgD[block] @ keys.mT
        if full is not None:
            logits_rgN += ((keys[:, None] @ full[block]) * keys[:, None]).sum(-1)
        if variance is not None and cross is not None:
            F = cross.shape[-1]
            logits_rgN += variance[block] @ keys.square().mT
            logits_rgN += 2 * cross[block] @ (keys[..., :F] * keys[..., F : 2 * F]).mT
        parts.append(logits_rgN)
    return torch.cat(parts).view(B, H * g, N)


def _turned(x: Tensor, turn: Tensor) -> Tensor:
    """Return pairs of `x` [..., D] multiplied by complex numbers [..., F]; further dimensions stay."""
    F = turn.shape[-1]
    first, second, rest = x.tensor_split([F, 2 * F], dim=-1)
    return torch.cat([first * turn.real - second * turn.imag, second * turn.real + first * turn.imag, rest], dim=-1)
