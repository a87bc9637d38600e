"""VaSE-AttnV: reserve the slots with large values, draw the others by their attention."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from reasonkv.methods.base import OF_VARIANT, Method, Requirements, SlotState
from reasonkv.methods.ops import (
    average_pool,
    by_head,
    fill_window,
    group_mean,
    top_k_slots,
    window_attention,
)
from reasonkv.methods.options import Count, Kernel, Size
from reasonkv.noise import gumbel
from reasonkv.plan import Plan, PlanError
from reasonkv.view import SlotView

_LEAST_WEIGHT = 1e-20  # of a slot without attention: it is drawn after all others, but it can be drawn
_DRAW, _DRAW_RESERVE = 0, 1  # numbers of the two draws an event can make


@dataclass(frozen=True)
class VaseAttnV(Method):
    """Keep the largest value ranges, and a sample of the rest drawn by attention (Chang et al., 2026, "Value-Aware
    Stochastic KV Cache Eviction for Reasoning Models", arXiv 2606.03928, the variant VaSE-AttnV; in the authors' code
    the mode `range_sink_sample_attn`).

    The paper's budget leaves the prompt compressible (`prompt="count"`); whatever the budget protects stays, counts in
    `keep`, and is not drawn.

    A first layer's value depends on its token alone, so that all slots of one word have the same range, and rounding,
    which differs between batches and kernels, would choose among them. Here magnitudes are compared at 12 bits, and of
    equal ones the newer slot is reserved.

    Args:
        variant: "corrected" - slots in the order of their tokens, no pooling, near-equal magnitudes equal; "paper" -
            attention is pooled in the order the authors' code holds its slots in: reserved ones by value range, then
            drawn ones as drawn, then new ones.
        window: newest queries that vote; their tokens always stay (the public code's residual length).
        n_large: reserved slots, the sinks among them; -1 stands for a quarter of the budget, the paper's choice, where
            protected slots before the window are not counted (but for `n_sink` of them).
        n_sink: first slots, reserved whatever their values.
        temperature: divides the logits of the attention.
        kernel: slots whose attention is averaged, odd. Unless given: 1 (no pooling), paper 5.
        sample: True - the rest is drawn without replacement, with chances by attention; False - the most attended
            slots stay.
        magnitude: what is reserved by: the value's "range" (largest minus smallest entry), "variance" or "norm", or a
            "random" number (an ablation).
        evict_large: keep the slots with the smallest magnitude, sinks apart, and read no attention (an ablation: the
            opposite of the reserve).

    """

    name: ClassVar[str] = "vase-attnv"
    title: ClassVar[str] = "The largest value ranges, and a sample by attention"
    paper: ClassVar[str] = "VaSE, arXiv 2606.03928"

    variants: ClassVar[dict[str, dict[str, object]]] = {"corrected": {"kernel": 1}, "paper": {"kernel": 5}}

    variant: Literal["corrected", "paper"] = "corrected"
    window: Size = 64
    n_large: Annotated[int, Ge(-1)] = -1
    n_sink: Count = 4
    temperature: Annotated[float, Gt(0)] = 1.0
    kernel: Kernel = OF_VARIANT
    sample: bool = True
    magnitude: Literal["range", "variance", "norm", "random"] = "range"
    evict_large: bool = False

    @property
    def needs(self) -> Requirements:
        """The window's queries, its tokens protected, and in the variant "paper" the order of the slots."""
        is_ordered = self.variant == "paper" and not self.evict_large
        order = {"order": SlotState("position", dtype=torch.int32)} if is_ordered else {}
        return Requirements(queries=0 if self.evict_large else self.window, recent=self.window, slot_state=order)

    def plan(self, view: SlotView, keep: int) -> Plan:
        """Reserve the largest magnitudes; fill up by attention.

        Raises:
            PlanError: a key, query or value is not a number.

        """
        N = view.positions_BHN.shape[-1]
        magnitude_BHn = self.magnitudes(view)
        if self.evict_large:
            return Plan(top_k_slots(fill_window(-magnitude_BHn, N), keep, view.is_protected_BHN))
        reserved_BHn = self.reserve(view, keep, magnitude_BHn)
        rank_BHn = self.attention(view)
        if self.sample:
            uniform_BHn = view.uniform_BHN(_DRAW)[..., : rank_BHn.shape[-1]]
            rank_BHn = sampling_keys(rank_BHn, uniform_BHn)
        forced_BHN = view.is_protected_BHN.clone()
        forced_BHN[..., : reserved_BHn.shape[-1]] |= reserved_BHn
        kept_BHK = top_k_slots(fill_window(rank_BHn, N), keep, forced_BHN)
        if self.variant == "corrected":
            return Plan(kept_BHK)
        ordered_BHK = public_order(kept_BHK, forced_BHN, magnitude_BHn, rank_BHn)
        return Plan(kept_BHK, state={"order": ordered_BHK})

    def magnitudes(self, view: SlotView) -> Tensor:
        """How far a slot's value reaches, of the slots before the window; infinite for sinks: [B, H, n]."""
        n = self._candidates(view)
        if self.magnitude == "random":
            magnitude_BHn = view.uniform_BHN(_DRAW_RESERVE)[..., :n].contiguous()
        else:
            measure = {"range": value_range, "variance": value_variance, "norm": value_norm}[self.magnitude]
            magnitude_BHn = measure(view.values_BHND[:, :, :n])
            if self.variant == "corrected":
                magnitude_BHn = evened(magnitude_BHn)
        return magnitude_BHn.masked_fill(self._is_sink(view)[..., :n], -torch.inf if self.evict_large else torch.inf)

    def reserve(self, view: SlotView, keep: int, magnitude_BHn: Tensor) -> Tensor:
        """The slots reserved by their magnitude, beyond the protected ones: bool [B, H, n].

        As many as `n_large` says, less the sinks that are protected anyway, and never more than there is room for.
        """
        n = magnitude_BHn.shape[-1]
        protected_BHn = view.is_protected_BHN[..., :n]
        sinks_BH1 = (protected_BHn & self._is_sink(view)[..., :n]).sum(-1, keepdim=True)
        beyond_BH1 = (protected_BHn.sum(-1, keepdim=True) - self.n_sink).clamp(min=0)
        large_BH1 = (keep - beyond_BH1) // 4 if self.n_large < 0 else torch.full_like(sinks_BH1, self.n_large)
        room_BH1 = keep - view.is_protected_BHN.sum(-1, keepdim=True)
        count_BH1 = (large_BH1.clamp(min=self.n_sink) - sinks_BH1).clamp(min=0).minimum(room_BH1)
        most = min(n, max(keep // 4 if self.n_large < 0 else self.n_large, self.n_sink))
        return largest(magnitude_BHn.masked_fill(protected_BHn, -torch.inf), count_BH1, most)

    def attention(self, view: SlotView) -> Tensor:
        """Attention of the window to the slots before it, which alone share the softmax: mean over queries, pool, mean
        over the group: [B, H, n].
        """
        softer = replace(view, scaling=view.scaling / self.temperature)
        attention_BHn = group_mean(window_attention(softer, over="old"))  # pooling is linear: the order is free
        if self.kernel == 1 or self.variant == "corrected":
            return average_pool(attention_BHn, self.kernel)
        place_BHn = view.state["order"][..., : attention_BHn.shape[-1]].argsort(-1)
        pooled_BHn = average_pool(attention_BHn.gather(-1, place_BHn), self.kernel)
        return torch.empty_like(pooled_BHn).scatter_(-1, place_BHn, pooled_BHn)

    def _candidates(self, view: SlotView) -> int:
        """Slots before the window."""
        window = self.window if view.query_positions_BT is None else view.query_positions_BT.shape[1]
        return view.positions_BHN.shape[-1] - window

    def _is_sink(self, view: SlotView) -> Tensor:
        """The first `n_sink` slots, bool [N]."""
        return torch.arange(view.positions_BHN.shape[-1], device=view.positions_BHN.device) < self.n_sink


def value_range(values_BHND: Tensor) -> Tensor:
    """Largest minus smallest entry of every value, float32 [B, H, N]."""
    return by_head(lambda values_RND: values_RND.amax(-1) - values_RND.amin(-1), values_BHND)


def value_variance(values_BHND: Tensor) -> Tensor:
    """Variance over the entries of every value, float32 [B, H, N]."""
    return by_head(lambda values_RND: values_RND.var(-1), values_BHND)


def value_norm(values_BHND: Tensor) -> Tensor:
    """Euclidean norm of every value, float32 [B, H, N]."""
    return by_head(lambda values_RND: torch.linalg.vector_norm(values_RND, dim=-1), values_BHND)


def evened(magnitude: Tensor) -> Tensor:
    """Rounded to 12 bits, so that numbers that differ by rounding alone are equal (but for 1 in some thousands)."""
    mantissa, exponent = torch.frexp(magnitude)
    return torch.ldexp((mantissa * 4096).round() / 4096, exponent)


def sampling_keys(weights_BHn: Tensor, uniform_BHn: Tensor) -> Tensor:
    """Numbers whose k largest are k draws without replacement with chances proportional to the weights.

    The Gumbel top-k trick: log weight plus Gumbel noise. In descending order the draws are those of drawing one after
    the other. Weights of 0 count as 1e-20, so that k slots can be drawn however few have a weight.

    Args:
        weights_BHn: at least 0.
        uniform_BHn: float32 in (0, 1), independent.

    """
    return (weights_BHn + _LEAST_WEIGHT).log() + gumbel(uniform_BHn)


def largest(scores_BHn: Tensor, count_BH1: Tensor, most: int) -> Tensor:
    """Which slots have the `count` largest scores of their head; of equal ones the newer slot.

    Args:
        scores_BHn: scores; infinities are allowed.
        count_BH1: int64, how many per row and head: rows may differ.
        most: a bound on `count`, known without reading it.

    Returns:
        bool [B, H, n].

    Raises:
        PlanError: a score is NaN.

    """
    if bool(torch.isnan(scores_BHn).any()):
        raise PlanError("A value is NaN, so the slots have no order.")
    if most == 0:
        return torch.zeros_like(scores_BHn, dtype=torch.bool)
    cut_BH1 = scores_BHn.topk(most, dim=-1).values.gather(-1, (count_BH1 - 1).clamp(0, most - 1))
    above_BHn, equal_BHn = scores_BHn > cut_BH1, scores_BHn == cut_BH1
    room_BH1 = count_BH1 - above_BHn.sum(-1, keepdim=True)
    rank_BHn = equal_BHn.flip(-1).cumsum(-1).flip(-1)  # 1 for the newest of the equals
    return (above_BHn | (equal_BHn & (rank_BHn <= room_BH1))) & (count_BH1 > 0)


def public_order(kept_BHK: Tensor, forced_BHN: Tensor, magnitude_BHn: Tensor, rank_BHn: Tensor) -> Tensor:
    """Where the public code puts every kept slot: reserved by falling magnitude, then drawn as drawn, then the window.

    Args:
        kept_BHK: the plan, ascending.
        forced_BHN: bool, reserved or protected.
        magnitude_BHn: of the slots before the window.
        rank_BHn: what the others were chosen by.

    Returns:
        int32 [B, H, K], a permutation of 0..K-1. Slots that come later have their token index, which is larger.

    """
    N, n = forced_BHN.shape[-1], magnitude_BHn.shape[-1]
    value_BHn = torch.where(forced_BHN[..., :n], magnitude_BHn, rank_BHn)
    part_BHN = torch.where(forced_BHN, 0, 1)
    part_BHN[..., n:] = 2
    value_BHK = torch.nn.functional.pad(value_BHn, (0, N - n)).gather(-1, kept_BHK)
    by_value_BHK = value_BHK.argsort(dim=-1, descending=True, stable=True)
    by_part_BHK = part_BHN.gather(-1, kept_BHK).gather(-1, by_value_BHK).argsort(dim=-1, stable=True)
    sequence_BHK = by_value_BHK.gather(-1, by_part_BHK)
    return sequence_BHK.argsort(-1).int()
