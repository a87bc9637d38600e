"""Expected attention: what queries drawn from the distribution of past ones would attend to at the next positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from annotated_types import Ge
from torch import Tensor

from reasonkv.methods.base import OF_VARIANT, Observed, Requirements, ScorerMethod
from reasonkv.methods.ops import group_mean, head_blocks, upcast
from reasonkv.methods.options import Count, Size
from reasonkv.rotary import Rotary
from reasonkv.view import SlotView

Variant = Literal["corrected", "kvpress", "cask"]
Covariance = Literal["bands", "full", "none"]

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

    `variant="corrected"` takes the statistics of every query since the row's start, kept as sums beside the cache, and
    the true next positions. The others are here for comparison:

    * "kvpress" (the authors' code): the same with the whole covariance; the keys of the first `sinks` tokens are kept
      and stay outside the softmax. It compresses a prompt once; at later events the statistics here include what was
      decoded.
    * "cask" (the baseline in CASK's code): the statistics of the newest `window` queries alone, of which the first
      `sinks` are cut where the window is longer: four queries at its defaults. The next position is taken to be the
      number of slots held, which after the first event it is not. The window's tokens always stay.

    Float64 sums per query head and row, which make the result independent of the pieces tokens come in: 2.5 D numbers
    for "bands", D + D * D for "full", D for "none", and 8 bytes each; at Qwen3-8B geometry 3, 153 and 1.2 MB for all
    layers, beside 151 MB of bf16 keys and values at 1,024 slots.

    Args:
        variant: "corrected", "kvpress" or "cask".
        covariance: "bands" - within each rotary pair (dimensions without RoPE: their variances); "full" - all pairs
            of dimensions; "none" - the mean alone. Unless given: "bands" of "corrected", "full" of the others.
        future: positions averaged over.
        value_norm: multiply by the norm of the value.
        epsilon: added to the expected attention before the norm multiplies it, so that large values stay.
        sinks: first tokens whose queries do not count, because they are unlike all others; see the forms.
        window: newest queries of "cask".

    """

    name: ClassVar[str] = "expected"
    title: ClassVar[str] = "Expected attention of future queries, times the value's norm"
    paper: ClassVar[str] = "Expected Attention, arXiv 2510.00636"

    variants: ClassVar[dict[str, dict[str, object]]] = {
        "corrected": {"covariance": "bands"},
        "kvpress": {"covariance": "full"},
        "cask": {"covariance": "full"},
    }

    variant: Variant = "corrected"
    covariance: Covariance = OF_VARIANT
    future: Size = 512
    value_norm: bool = True
    epsilon: Annotated[float, Ge(0)] = 0.0
    sinks: Count = 4
    window: Size = 8

    @property
    def needs(self) -> Requirements:
        """The newest queries and their tokens for "cask", the sums of all queries for the others."""
        if self.variant == "cask":
            return Requirements(queries=self.window, recent=self.window, rotary=True)
        return Requirements(observes=True, rotary=True)

    def new_row_state(self, rows: int, query_heads: int, head_dim: int, device: torch.device) -> dict[str, Tensor]:
        """Sums over the queries seen, float64 (see the class)."""
        shapes: dict[str, tuple[int, ...]] = {"sum": (head_dim,)}
        if self.covariance == "full":
            shapes["products"] = (head_dim, head_dim)
        elif self.covariance == "bands":
            shapes |= {"squares": (head_dim,), "cross": (head_dim // 2,)}
        state = {
            name: torch.zeros(rows, query_heads, *shape, dtype=torch.float64, device=device)
            for name, shape in shapes.items()
        }
        return state | {"seen": torch.zeros(rows, dtype=torch.float64, device=device)}

    def observe(self, state: dict[str, Tensor], seen: Observed) -> None:
        """Add the queries of one forward, un-rotated; those of padding and of the first `sinks` tokens do not count."""
        F = seen.rotary.inv_freq.numel()
        for queries_BqtD, positions_Bt, valid_Bt in zip(
            torch.split(seen.queries_BHqqD, _TOKENS_AT_ONCE, 2),
            torch.split(seen.positions_Bq, _TOKENS_AT_ONCE, 1),
            torch.split(seen.valid_Bq, _TOKENS_AT_ONCE, 1),
            strict=True,
        ):
            counts_Bt = valid_Bt & (positions_Bt >= self.sinks)
            plain_BqtD = seen.rotary.unrotate(upcast(queries_BqtD), positions_Bt[:, None]).double()
            plain_BqtD = plain_BqtD.masked_fill(~counts_Bt[:, None, :, None], 0.0)
            state["seen"] += counts_Bt.sum(1)
            state["sum"] += plain_BqtD.sum(2)
            if "products" in state:
                state["products"] += plain_BqtD.mT @ plain_BqtD
            if "squares" in state:
                state["squares"] += plain_BqtD.square().sum(2)
                state["cross"][..., :F] += (plain_BqtD[..., :F] * plain_BqtD[..., F : 2 * F]).sum(2)

    def score(self, view: SlotView) -> Tensor:
        """Steps 2 to 4."""
        assert view.rotary is not None
        B, H, N = view.positions_BHN.shape
        moments = self._window_moments(view, view.rotary) if self.variant == "cask" else self._running_moments(view)
        start_B = torch.full_like(view.length_B, N) if self.variant == "cask" else view.length_B
        logits_BHgN = expected_logits(
            view.keys_BHND, rotated(moments, mean_rotation(view.rotary, start_B, self.future)), view.scaling
        ).view(B, H, -1, N)
        is_sink_BHN = view.positions_BHN < (0 if self.variant == "corrected" else self.sinks)
        attention_BHN = group_mean(logits_BHgN.masked_fill(is_sink_BHN[:, :, None], float("-inf")).softmax(-1))
        scores_BHN = attention_BHN
        if self.value_norm:
            scores_BHN = (scores_BHN + self.epsilon) * upcast(view.values_BHND).norm(dim=-1)
        scores_BHN = scores_BHN.masked_fill(is_sink_BHN, 0.0)
        return torch.where(is_sink_BHN, scores_BHN.amax(-1, keepdim=True) + 1.0, scores_BHN)

    def _running_moments(self, view: SlotView) -> Moments:
        """Of all queries since the start, from their sums."""
        state = view.row_state
        count_B11 = state["seen"].clamp(min=1)[:, None, None]
        mean_BqD = state["sum"] / count_B11
        if "products" in state:
            return Moments(
                mean_BqD, state["products"] / count_B11[..., None] - mean_BqD[..., :, None] * mean_BqD[..., None, :]
            )
        if "squares" not in state:
            return Moments(mean_BqD)
        assert view.rotary is not None
        F = view.rotary.inv_freq.numel()
        cross_BqF = state["cross"][..., :F] / count_B11 - mean_BqD[..., :F] * mean_BqD[..., F : 2 * F]
        return Moments(mean_BqD, None, state["squares"] / count_B11 - mean_BqD.square(), cross_BqF)

    def _window_moments(self, view: SlotView, rotary: Rotary) -> Moments:
        """Of the newest queries alone."""
        assert view.queries_BHqTD is not None and view.query_positions_BT is not None
        plain_BqTD = rotary.unrotate(upcast(view.queries_BHqTD), view.query_positions_BT[:, None]).double()
        if plain_BqTD.shape[2] > self.sinks:
            plain_BqTD = plain_BqTD[:, :, self.sinks :]
        mean_BqD = plain_BqTD.mean(2)
        centred_BqTD, F = plain_BqTD - mean_BqD[:, :, None], rotary.inv_freq.numel()
        if self.covariance == "full":
            return Moments(mean_BqD, centred_BqTD.mT @ centred_BqTD / centred_BqTD.shape[2])
        if self.covariance == "none":
            return Moments(mean_BqD)
        cross_BqF = (centred_BqTD[..., :F] * centred_BqTD[..., F : 2 * F]).mean(2)
        return Moments(mean_BqD, None, centred_BqTD.square().mean(2), cross_BqF)


def mean_rotation(rotary: Rotary, start_B: Tensor, count: int) -> Tensor:
    """Mean over `count` positions from `start_B` on of what RoPE multiplies every pair by, complex128 [B, F].

    The scaling factor is in it. In closed form: the sum of a geometric series of unit steps.
    """
    half_F = rotary.inv_freq.to(start_B.device, torch.float64) / 2
    # mean of exp(2 i h t) over t < n: a unit at the middle, times sin(n h) / (n sin h), which is 1 for h = 0
    length_F = torch.where(half_F == 0, 1.0, (count * half_F).sin() / (count * half_F.sin()))
    middle_BF = (2.0 * start_B[:, None] + count - 1) * half_F
    return torch.polar(rotary.scaling * torch.ones_like(middle_BF), middle_BF) * length_F


def rotated(moments: Moments, turn_BF: Tensor) -> Moments:
    """The moments of queries multiplied, pair by pair, by the complex numbers `turn_BF`."""
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
    """log E exp(scaling q.k) of every slot for normal queries, a block of heads at a time.

    Args:
        keys_BHND: rotated keys, any float dtype.
        moments: of the query heads, rotated.
        scaling: of query-key products.

    Returns:
        float32 (float64 for float64 keys) [B, Hq, N].

    """
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
    """Pairs of `x` [..., D] multiplied by complex numbers [..., F]; further dimensions stay."""
    F = turn.shape[-1]
    first, second, rest = x.tensor_split([F, 2 * F], dim=-1)
    return torch.cat([first * turn.real - second * turn.imag, second * turn.real + first * turn.imag, rest], dim=-1)
