"""TriAttention's score: what the queries of the next tokens will on average attend to.

Before RoPE the queries of a head point, pair by pair, mostly one way (their mean mu_f). So their product with a key
depends on the distance alone and is known before the queries exist. With F rotary pairs of frequency w_f, keys as
cached (k_f, a complex number per pair), R tokens seen, and future distances d_j = 1, 2, 4, ...:

    score(k) = Re sum_f mu_f c_f exp(i w_f R) conj(k_f)  +  sum_f alpha_f |k_f|,     c_f = mean over j of exp(i w_f d_j)

times the rotary scaling s (a cached key holds s once, and so will the query). Cached keys are rotated by their own
positions, so no position enters: slots of different heads may hold different tokens.

Legend: B rows, H KV heads, Hq query heads, g = Hq / H, N slots, D head_dim, J distances, R = B x H.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from reasonkv.calibration.horizon import future_distances
from reasonkv.methods.catalogue import MethodError
from reasonkv.methods.ops import by_head
from reasonkv.rotary import Rotary
from reasonkv.view import LayerStatistics, SlotView

Aggregation = Literal["mean", "max"]
Horizon = Literal["fixed", "adaptive", "variational"]
Norm = Literal["tri", "rms2"]
_TINY = 1e-6  # the public code's floor under every denominator and logarithm


@dataclass(frozen=True)
class FrequencyOptions:
    """Variants of the score (Mao et al., 2026, arXiv 2604.04921; the horizons and `rms2` are CASK's).

    Args:
        aggregation: over the future distances: "mean", or "max" of the scores.
        mlr: alpha_f = the mean of |q_f| minus |mu_f|, what the mean leaves unexplained (it vanishes where all queries
            point one way); False takes the whole mean of |q_f|.
        trig: False drops the first sum, so that only norms count.
        horizon: weights of the distances: "fixed" - all equal; "adaptive" - a bump in log distance around each head's
            effective wavelength, wider the less its queries agree; "variational" - the weights per head that a
            calibration brings (`LayerStatistics.horizon_HqJ`).
        norm: "tri" - alpha as above; "rms2" - (mean of |q_f|^2 - |mu_f|^2) / (mean of |q_f| + |mu_f|).
        norm_lambda: factor on alpha.
    """

    aggregation: Aggregation = "mean"
    mlr: bool = True
    trig: bool = True
    horizon: Horizon = "fixed"
    norm: Norm = "tri"
    norm_lambda: float = 1.0


def layer_scores(view: SlotView, options: FrequencyOptions | None = None) -> Tensor:
    """Return the scores of a view's slots; see `frequency_scores`."""
    assert view.calibration is not None and view.rotary is not None
    return frequency_scores(view.keys_BHND, view.calibration, view.rotary, view.length_B, options)


def frequency_scores(
    keys_BHND: Tensor,
    statistics: LayerStatistics,
    rotary: Rotary,
    length_B: Tensor,
    options: FrequencyOptions | None = None,
) -> Tensor:
    """Score every slot for every query head of one layer (see the module's formula).

    Dimensions that RoPE leaves alone do not count.

    Args:
        keys_BHND: rotated keys, any float dtype.
        statistics: of the same layer; its query heads are those of these KV heads, in order.
        rotary: how the keys were rotated.
        length_B: int64, tokens each row has seen: the position of its next token.
        options: see `FrequencyOptions`; its defaults if None.

    Returns:
        float32 (float64 for float64 keys) [B, Hq, N] on the scale of raw query-key products (no 1 / sqrt(D)).

    Raises:
        MethodError: the statistics lack what an option needs, or have another number of pairs or heads.
    """
    options = options or FrequencyOptions()
    B, H, N, _ = keys_BHND.shape
    Hq, F = statistics.mean_HqF.shape
    if Hq % H or rotary.inv_freq.numel() != F:
        raise MethodError(
            f"The calibration has {Hq} query heads of {F} rotary pairs a layer, which do not belong to {H} KV heads "
            f"of {rotary.inv_freq.numel()} pairs."
        )
    dtype, device = torch.promote_types(keys_BHND.dtype, torch.float32), keys_BHND.device
    alpha_HgF = (rotary.scaling * alpha(statistics, options)).to(device, dtype).view(H, Hq // H, F)
    queries_BHmD: list[Tensor] = []  # m = g x J'
    if options.trig:
        query_BqjD = future_queries(statistics, rotary, length_B.to(device), options, dtype)
        queries_BHmD = [query_BqjD.reshape(B, H, -1, 2 * F)]

    def of_heads(keys_rND: Tensor, alpha_rgF: Tensor, *query_rmD: Tensor) -> Tensor:
        keys_rNd = rotary.canonical(keys_rND)[..., : 2 * F]
        modulus_rNF = torch.hypot(keys_rNd[..., :F], keys_rNd[..., F:])
        # Long times short: on CPUs four times as fast as the transposed product.
        if not query_rmD:
            return (modulus_rNF @ alpha_rgF.mT).mT
        score_rNm = keys_rNd @ query_rmD[0].mT
        if options.aggregation == "max":
            score_rNm = score_rNm.view(len(score_rNm), N, Hq // H, -1).amax(-1)
        return torch.baddbmm(score_rNm, modulus_rNF, alpha_rgF.mT).mT

    return by_head(of_heads, keys_BHND, alpha_HgF.expand(B, -1, -1, -1), *queries_BHmD).flatten(1, 2)


def alpha(statistics: LayerStatistics, options: FrequencyOptions) -> Tensor:
    """Return the coefficient of |k_f|, float64 [Hq, F], without the rotary scaling.

    Raises:
        MethodError: `norm="rms2"` without the mean squares.
    """
    mean_HqF, modulus_HqF = statistics.mean_HqF.to(torch.complex128).abs(), statistics.modulus_HqF.double()
    if options.norm == "rms2":
        if statistics.square_HqF is None:
            raise MethodError(
                "norm=rms2 needs the mean squares of the queries, which this calibration does not have; run "
                "`reasonkv calibrate`, or use norm=tri."
            )
        variance_HqF = (statistics.square_HqF.double() - mean_HqF.square()).clamp(min=0)
        return options.norm_lambda * variance_HqF / (modulus_HqF + mean_HqF).clamp(min=_TINY)
    return options.norm_lambda * ((modulus_HqF - mean_HqF).clamp(min=0) if options.mlr else modulus_HqF)


def future_queries(
    statistics: LayerStatistics, rotary: Rotary, length_B: Tensor, options: FrequencyOptions, dtype: torch.dtype
) -> Tensor:
    """Return the mean query, rotated to the future as the model will rotate it, times the rotary scaling.

    [B, Hq, J', 2F] in the half-split layout: J' = 1, the mean over the distances, or J for `aggregation="max"`. Angles
    are computed in `dtype`, float32 as in the model, or float64.
    """
    inv_freq_F = rotary.inv_freq.to(length_B.device, dtype)
    offsets_J, length_B = future_distances().to(length_B.device, dtype), length_B.to(dtype)
    if options.aggregation == "max":
        turn_BHqjF = _unit((length_B[:, None] + offsets_J)[..., None] * inv_freq_F)[:, None]
    else:
        turn_JF = _unit(offsets_J[:, None] * inv_freq_F)
        weights_HqJ = horizon_weights(statistics, rotary.inv_freq.to(length_B.device).double(), options)
        now_BF = _unit(length_B[:, None] * inv_freq_F)
        turn_BHqjF = (weights_HqJ.to(turn_JF) @ turn_JF)[:, None] * now_BF[:, None, None]
    query_BHqjF = rotary.scaling * statistics.mean_HqF.to(turn_BHqjF)[:, None] * turn_BHqjF
    return torch.cat([query_BHqjF.real, query_BHqjF.imag], dim=-1)


def horizon_weights(statistics: LayerStatistics, inv_freq_F: Tensor, options: FrequencyOptions) -> Tensor:
    """Return weights of the future distances, float64 [1 or Hq, J], each row summing to 1.

    Adaptive (CASK's constants, all 1): normal in log2 d around log2 of the effective wavelength, the geometric mean of
    2 pi / w_f weighted by |mu_f|, with deviation 1 + (1 - the same mean of the concentrations |mu_f| / mean |q_f|).

    Raises:
        MethodError: `horizon="variational"` without weights in the calibration, or with another number of them.
    """
    offsets_J = future_distances().to(inv_freq_F.device)
    J = offsets_J.numel()
    if options.horizon == "fixed":
        return torch.full((1, J), 1.0 / J, dtype=torch.float64, device=inv_freq_F.device)
    if options.horizon == "variational":
        weights_HqJ = statistics.horizon_HqJ
        if weights_HqJ is None or weights_HqJ.shape[-1] != J:
            found = "none" if weights_HqJ is None else str(weights_HqJ.shape[-1])
            raise MethodError(
                f"horizon=variational needs weights of {J} distances per query head, and this calibration has {found}; "
                "make it with `reasonkv calibrate --horizon`, or use horizon=fixed or adaptive."
            )
        return weights_HqJ.to(inv_freq_F.device).double()
    mean_HqF = statistics.mean_HqF.to(torch.complex128).abs()
    share_HqF = mean_HqF / mean_HqF.sum(-1, keepdim=True).clamp(min=_TINY)
    concentration_Hq1 = (share_HqF * mean_HqF / statistics.modulus_HqF.double().clamp(min=_TINY)).sum(-1, keepdim=True)
    centre_Hq1 = (share_HqF * (2 * math.pi / inv_freq_F).log2()).sum(-1, keepdim=True)
    deviation_Hq1 = (2.0 - concentration_Hq1).clamp(min=_TINY)
    return (-((offsets_J.log2() - centre_Hq1) ** 2) / (2 * deviation_Hq1.square())).softmax(-1)


def _unit(phases: Tensor) -> Tensor:
    return torch.polar(torch.ones_like(phases), phases)
