"""Which future distances matter to a head: weights fitted to the distances its queries look back over.

TriAttention averages its score over the distances d_j = 1, 2, 4, ... with equal weights. The variational horizon (an
option of CASK's code) gives each head weights pi of its own. With a_qk the attention of query q to an earlier key k,

    tau_f = sum_qk a_qk exp(i w_f (p_q - p_k)) / sum_qk a_qk            (the mean phase of pair f)
    pi    = argmin over the simplex of sum_f v_f |sum_j pi_j exp(i w_f d_j) - tau_f|^2,   v_f = |mu_f| / sum |mu|

Legend: B rows, H KV heads, Hq query heads, g = Hq / H, S sampled queries, K keys, F rotary pairs, J distances.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reasonkv.rotary import Rotary

SAMPLES = 128
"""Queries of a sequence that are looked at, evenly spread."""
STEPS = 4000
"""Gradient steps of the fit; J is 17, so they are cheap."""


def future_distances() -> Tensor:
    """Return the distances 1, 2, 4, ... 65536, float64 [J]."""
    return 2.0 ** torch.arange(17, dtype=torch.float64)


class HorizonSums:
    """Running sums of attention-weighted phases, by layer and query head."""

    def __init__(self) -> None:
        self._sums: dict[int, tuple[Tensor, Tensor]] = {}  # complex128 [Hq, F], float64 [Hq]

    def add(self, layer: int, rotary: Rotary, queries_BHqKD: Tensor, keys_BHKD: Tensor, scaling: float) -> None:
        """Add sampled queries of whole sequences: their rotated queries and keys, and the factor on the products."""
        (B, Hq, K, D), H, device = queries_BHqKD.shape, keys_BHKD.shape[1], queries_BHqKD.device
        position_S = torch.linspace(0, K - 1, min(K, SAMPLES), device=device).round().long()
        position_K = torch.arange(K, device=device)
        phase_KF = position_K[:, None].double() * rotary.inv_freq.to(device).double()
        turn_KF = torch.polar(torch.ones_like(phase_KF), phase_KF)
        later_SK, own_SK = position_K > position_S[:, None], position_K == position_S[:, None]
        queries_BHgSD = queries_BHqKD[:, :, position_S].float().view(B, H, Hq // H, len(position_S), D)
        phases_HgF = torch.zeros(H, Hq // H, rotary.inv_freq.numel(), dtype=torch.complex128, device=device)
        mass_Hg = torch.zeros(H, Hq // H, dtype=torch.float64, device=device)
        for row in range(B):
            for head in range(H):  # one head's logits at a time bound the memory
                logits_gSK = scaling * (queries_BHgSD[row, head] @ keys_BHKD[row, head].float().mT)
                attention_gSK = logits_gSK.masked_fill(later_SK, float("-inf")).softmax(-1).masked_fill(own_SK, 0.0)
                back_gSF = attention_gSK.to(turn_KF) @ turn_KF.conj()
                phases_HgF[head] += (back_gSF * turn_KF[position_S]).sum(1)
                mass_Hg[head] += attention_gSK.double().sum((1, 2))
        phases, mass = self._sums.get(layer, (0, 0))
        self._sums[layer] = phases + phases_HgF.flatten(0, 1), mass + mass_Hg.flatten()

    def tau_HqF(self, layer: int) -> Tensor:
        """Return the mean phases of a layer that was observed, complex128; 0 where a head never looked back."""
        phases_HqF, mass_Hq = self._sums[layer]
        return phases_HqF / mass_Hq.clamp(min=1e-12)[:, None]


def fit_horizon(tau_HqF: Tensor, mean_HqF: Tensor, inv_freq_F: Tensor) -> Tensor:
    """Return the weights pi of every head, float64 [Hq, J], each row on the simplex (see the module's formula).

    A convex quadratic over the simplex, by accelerated projected gradients with restarts, for all heads at once.

    Args:
        tau_HqF: complex, mean phases.
        mean_HqF: complex, mean queries mu.
        inv_freq_F: frequencies w.
    """
    phase_FJ = inv_freq_F.double()[:, None] * future_distances()
    turn_FJ = torch.polar(torch.ones_like(phase_FJ), phase_FJ)
    weight_HqF = mean_HqF.to(torch.complex128).abs()
    weight_HqF = weight_HqF / weight_HqF.sum(-1, keepdim=True).clamp(min=1e-12)
    weighted_HqFJ = weight_HqF[..., None] * turn_FJ
    square_HqJJ = (turn_FJ.mH @ weighted_HqFJ).real  # of the objective pi' square pi - 2 linear' pi
    linear_HqJ = (weighted_HqFJ.conj() * tau_HqF[..., None]).sum(1).real
    step_Hq1 = 1.0 / torch.linalg.matrix_norm(square_HqJJ, 2).clamp(min=1e-12)[:, None]
    pi_HqJ = torch.full_like(linear_HqJ, 1.0 / linear_HqJ.shape[-1])
    ahead_HqJ, momentum_Hq1 = pi_HqJ, torch.ones_like(step_Hq1)
    for _ in range(STEPS):
        gradient_HqJ = (square_HqJJ @ ahead_HqJ[..., None])[..., 0] - linear_HqJ
        new_HqJ = onto_simplex(ahead_HqJ - step_Hq1 * gradient_HqJ)
        moved_HqJ = new_HqJ - pi_HqJ
        uphill_Hq1 = (gradient_HqJ * moved_HqJ).sum(-1, keepdim=True) > 0
        grown_Hq1 = torch.where(uphill_Hq1, 1.0, (1 + (1 + 4 * momentum_Hq1.square()).sqrt()) / 2)
        ahead_HqJ = new_HqJ + torch.where(uphill_Hq1, 0.0, (momentum_Hq1 - 1) / grown_Hq1) * moved_HqJ
        pi_HqJ, momentum_Hq1 = new_HqJ, grown_Hq1
    return pi_HqJ


def onto_simplex(x: Tensor) -> Tensor:
    """Return the nearest point of the simplex to each row of `x` [..., J]."""
    descending = x.sort(-1, descending=True).values
    excess = descending.cumsum(-1) - 1.0
    count = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype, device=x.device)
    support = (descending * count > excess).sum(-1, keepdim=True)
    return (x - excess.gather(-1, support - 1) / support).clamp(min=0.0)
