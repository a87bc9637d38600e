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
    largest,
    refuse_nan,
    top_k_slots,
    window_attention,
)
from reasonkv.methods.options import Count, Kernel, Size
from reasonkv.noise import gumbel
from reasonkv.plan import Plan
from reasonkv.view import SlotView

_LEAST_WEIGHT = 1e-20  # of a slot without attention: it is drawn after all others, but it can be drawn
_DRAW, _DRAW_RESERVE = 0, 1  # numbers of the two draws a compaction can make


@dataclass(frozen=True)
class VaseAttnV(Method):
    """Keep the largest value ranges, and a sample of the rest drawn by attention (Chang et al., 2026, "Value-Aware
    Stochastic KV Cache Eviction for Reasoning Models", arXiv 2606.03928, the variant VaSE-AttnV; in the authors' code
    the mode `range_sink_sample_attn`).

    The paper's budget leaves the prompt compressible (`prompt="count"`). In the first layer all slots of one word have
    the same value, so that rounding would choose among them. Here magnitudes are compared at 12 bits, and of equal ones
    the newer slot is reserved.

    Args:
        variant: "corrected" - no pooling, near-equal magnitudes equal; "paper" - attention is pooled in the order the
            authors' code holds its slots in: reserved ones by value range, then drawn ones as drawn, then new ones.
        window: newest queries that vote; their tokens are always kept (the public code's residual length).
        n_large: reserved slots, the sinks among them; -1 stands for a quarter of the budget, the paper's choice, where
            protected slots before the window are not counted (but for `n_sink` of them).
        n_sink: first slots, reserved whatever their values.
        temperature: divides the logits of the attention.
        kernel: slots whose attention is averaged, odd. Unless given: 1 (no pooling), paper 5.
        sample: True - the rest is drawn without replacement, with chances by attention; False - the most attended
            slots are kept.
        magnitude: what is reserved by: the value's "range" (largest minus smallest entry), "variance" or "norm", or a
            "random" number (an ablation).
        evict_large: keep the slots with the smallest magnitude, sinks apart, and read no attention (an ablation: the
            opposite of the reserve).
    """

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
        is_ordered = self.variant == "paper" and not self.evict_large
        order = {"order": SlotState("position", dtype=torch.int32)} if is_ordered else {}
        return Requirements(queries=0 if self.evict_large else self.window, recent=self.window, slot_state=order)

    def plan(self, view: SlotView, keep: int) -> Plan:
        """Reserve the largest magnitudes; fill up by attention."""
        N = view.positions_BHN.shape[-1]
        magnitude_BHn = self.magnitudes(view)
        if self.evict_large:
            return Plan(top_k_slots(fill_window(-magnitude_BHn, N), keep, view.is_protected_BHN))
        reserved_BHn = self.reserve(view, keep, magnitude_BHn)
        rank_BHn = self.attention(view)
        if self.sample:
            rank_BHn = sampling_keys(rank_BHn, view.uniform_BHN(_DRAW)[..., : rank_BHn.shape[-1]])
        forced_BHN = view.is_protected_BHN.clone()
        forced_BHN[..., : reserved_BHn.shape[-1]] |= reserved_BHn
        kept_BHK = top_k_slots(fill_window(rank_BHn, N), keep, forced_BHN)
        if self.variant == "corrected":
            return Plan(kept_BHK)
        return Plan(kept_BHK, state={"order": authors_order(kept_BHK, forced_BHN, magnitude_BHn, rank_BHn)})

    def magnitudes(self, view: SlotView) -> Tensor:
        """Return how far a slot's value reaches, of the slots before the window; infinite for sinks: [B, H, n]."""
        window = self.window if view.query_positions_BT is None else view.query_positions_BT.shape[1]
        n = view.positions_BHN.shape[-1] - window
        if self.magnitude == "random":
            magnitude_BHn = view.uniform_BHN(_DRAW_RESERVE)[..., :n].contiguous()
        else:
            magnitude_BHn = by_head(_MAGNITUDES[self.magnitude], view.values_BHND[:, :, :n])
            if self.variant == "corrected":
                magnitude_BHn = evened(magnitude_BHn)
        magnitude_BHn[..., : self.n_sink] = -torch.inf if self.evict_large else torch.inf
        return magnitude_BHn

    def reserve(self, view: SlotView, keep: int, magnitude_BHn: Tensor) -> Tensor:
        """Return the slots reserved by their magnitude, beyond the protected ones: bool [B, H, n].

        As many as `n_large` says, less the sinks that are protected anyway, and never more than there is room for.
        """
        protected_BHn = view.is_protected_BHN[..., : magnitude_BHn.shape[-1]]
        sinks_BH1 = protected_BHn[..., : self.n_sink].sum(-1, keepdim=True)
        beyond_BH1 = (protected_BHn.sum(-1, keepdim=True) - self.n_sink).clamp(min=0)
        large_BH1 = (keep - beyond_BH1) // 4 if self.n_large < 0 else torch.full_like(sinks_BH1, self.n_large)
        room_BH1 = keep - view.is_protected_BHN.sum(-1, keepdim=True)
        count_BH1 = (large_BH1.clamp(min=self.n_sink) - sinks_BH1).clamp(min=0).minimum(room_BH1)
        most = max(keep // 4 if self.n_large < 0 else self.n_large, self.n_sink)
        refuse_nan(magnitude_BHn)
        return largest(magnitude_BHn.masked_fill(protected_BHn, -torch.inf), count_BH1, most)

    def attention(self, view: SlotView) -> Tensor:
        """Return the attention of the window to the slots before it, which alone share the softmax: [B, H, n].

        Mean over queries, pooled, mean over the group.
        """
        softer = replace(view, scaling=view.scaling / self.temperature)
        attention_BHn = window_attention(softer, over="old").mean(2)  # pooling is linear: the order is free
        if self.kernel == 1 or self.variant == "corrected":
            return average_pool(attention_BHn, self.kernel)
        place_BHn = view.state["order"][..., : attention_BHn.shape[-1]].argsort(-1)
        pooled_BHn = average_pool(attention_BHn.gather(-1, place_BHn), self.kernel)
        return torch.empty_like(pooled_BHn).scatter_(-1, place_BHn, pooled_BHn)


def value_range(values_RND: Tensor) -> Tensor:
    """Return the largest minus the smallest entry of every value, [R, N]."""
    return values_RND.amax(-1) - values_RND.amin(-1)


_MAGNITUDES = {
    "range": value_range,
    "variance": lambda values_RND: values_RND.var(-1),
    "norm": lambda values_RND: torch.linalg.vector_norm(values_RND, dim=-1),
}


def evened(magnitude: Tensor) -> Tensor:
    """Return numbers rounded to 12 bits: of those that differ by rounding alone, all but some in 1,000 are equal."""
    mantissa, exponent = torch.frexp(magnitude)
    return torch.ldexp((mantissa * 4096).round() / 4096, exponent)


def sampling_keys(weights_BHn: Tensor, uniform_BHn: Tensor) -> Tensor:
    """Return numbers whose k largest are k draws without replacement with chances proportional to the weights.

    The Gumbel top-k trick: log weight plus Gumbel noise, of independent uniform numbers in (0, 1). In descending order
    the draws are those of drawing one after the other.
    """
    return (weights_BHn + _LEAST_WEIGHT).log() + gumbel(uniform_BHn)


def authors_order(kept_BHK: Tensor, forced_BHN: Tensor, magnitude_BHn: Tensor, rank_BHn: Tensor) -> Tensor:
    """Return where the authors' code puts every kept slot: by falling magnitude, then as drawn, then the window.

    Args:
        kept_BHK: the plan, ascending.
        forced_BHN: bool, reserved or protected.
        magnitude_BHn: of the slots before the window.
        rank_BHn: what the others were chosen by.

    Returns:
        int32 [B, H, K], a permutation. Slots that come later have their token index, which is larger.
    """
    N, n = forced_BHN.shape[-1], magnitude_BHn.shape[-1]
    value_BHn = torch.where(forced_BHN[..., :n], magnitude_BHn, rank_BHn)
    part_BHN = torch.where(forced_BHN, 0, 1)
    part_BHN[..., n:] = 2
    value_BHK = torch.nn.functional.pad(value_BHn, (0, N - n)).gather(-1, kept_BHK)
    by_value_BHK = value_BHK.argsort(dim=-1, descending=True, stable=True)
    by_part_BHK = part_BHN.gather(-1, kept_BHK).gather(-1, by_value_BHK).argsort(dim=-1, stable=True)
    return by_value_BHK.gather(-1, by_part_BHK).argsort(-1).int()
