"""DefensiveKV: guard against the worst query instead of trusting the mean one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from reasonkv.methods.base import Method, Requirements, SlotState
from reasonkv.methods.ops import attention_blocks, fill_window, later_slots, top_k_slots, upcast
from reasonkv.methods.options import Kernel, Share, Size
from reasonkv.plan import Plan
from reasonkv.view import SlotView

_UNKNOWN = -1.0  # state of a slot whose norm has not been taken; norms are never negative
_SLOTS_AT_ONCE = 64


class WindowVotes(NamedTuple):
    """What a window of queries says about the n slots before it, float32.

    Args:
        worst_BHn: pooled attention, the maximum over queries and query heads.
        mean_BHn: attention, the mean over queries and query heads.
        edge_BH: mean attention to the newest slots before the window, as many as it has queries.

    """

    worst_BHn: Tensor
    mean_BHn: Tensor
    edge_BH: Tensor


@dataclass(frozen=True)
class DefensiveKV(Method):
    """Keep what any recent query attends to, weighted by what its value adds to the output (Feng et al., 2025,
    "Taming the Fragility of KV Cache Eviction in LLM Inference", arXiv 2510.13334).

    1. Attention of the window's queries to the slots before it, pooled over neighbours; each row keeps its sum.
    2. Maximum over the query heads of a group and over the queries; not below the mean of that over slots.
    3. Times r / sum r, r the L1 norm of the value's contribution to the output, mean over the group (CriticalKV).
    4. The tokens that cover 90 % of the mean attention, the window's included, come before all others.

    Here every KV head keeps the same number of slots; the paper also divides the budget of a layer, or of the model,
    among heads.

    Args:
        variant: "corrected" - as above; "paper" - the authors' code where it differs: it normalises r over KV heads
            instead of slots, takes the attention to the newest slots BEFORE the window for that to the window, compares
            the sums of step 4 with that on the scale of old slots alone, and leaves out the token that reaches it.
        window: newest queries that vote; their tokens always stay.
        kernel: slots pooled together, odd; 1 turns pooling off.
        mass: share of attention that step 4 covers; 0 turns it off.
        output_norm: step 3. It reads the layer's output projection, once for every token.

    """

    name: ClassVar[str] = "defensivekv"
    title: ClassVar[str] = "Largest attention of any recent query, times the value's output norm"
    paper: ClassVar[str] = "DefensiveKV, arXiv 2510.13334"

    variant: Literal["corrected", "paper"] = "corrected"
    window: Size = 32
    kernel: Kernel = 5
    mass: Share = 0.9
    output_norm: bool = True

    @property
    def needs(self) -> Requirements:
        """The window's queries, its tokens protected, and each slot's norm, which never changes."""
        return Requirements(
            queries=self.window,
            recent=self.window,
            slot_state={"output_norm": SlotState(_UNKNOWN)} if self.output_norm else {},
            output_projection=self.output_norm,
        )

    def plan(self, view: SlotView, keep: int) -> Plan:
        """Top-k of the scores; the norms taken so far stay beside their slots."""
        norms_BHN = self.norms(view) if self.output_norm else None
        kept_BHK = top_k_slots(self.score(view, norms_BHN), keep, forced_BHN=view.is_protected_BHN)
        return Plan(kept_BHK, state={} if norms_BHN is None else {"output_norm": norms_BHN.gather(2, kept_BHK)})

    def score(self, view: SlotView, norms_BHN: Tensor | None = None) -> Tensor:
        """Steps 1 to 4, float32 [B, H, N]; `norms_BHN` as `norms` gives them, or None to leave step 3 out."""
        votes = window_votes(view, self.kernel)
        worst_BHn = votes.worst_BHn
        score_BHn = worst_BHn.maximum(worst_BHn.mean(-1, keepdim=True))
        if norms_BHN is not None:
            r_BHn = norms_BHN[..., : score_BHn.shape[-1]]
            total = r_BHn.sum(-1 if self.variant == "corrected" else 1, keepdim=True)
            score_BHn = score_BHn * (r_BHn / total.clamp(min=torch.finfo(total.dtype).tiny))
        if self.mass:
            covering_BHn, rank_BHn = self.covering(votes)
            first_BHn = score_BHn.amax(-1, keepdim=True) + 1.0 + rank_BHn
            score_BHn = torch.where(covering_BHn & ~score_BHn.isnan(), first_BHn, score_BHn)
        return fill_window(score_BHn, view.positions_BHN.shape[-1])

    def covering(self, votes: WindowVotes) -> tuple[Tensor, Tensor]:
        """Step 4: which slots cover the mass, bool [B, H, n], and their rank by mean attention, n - 1 the highest."""
        mean_BHn = votes.mean_BHn
        old_BH1 = mean_BHn.sum(-1, keepdim=True)
        if self.variant == "corrected":
            target_BH1 = self.mass - (1.0 - old_BH1)
        else:
            mean_BHn = mean_BHn / old_BH1
            target_BH1 = self.mass - votes.edge_BH.mean(1)[:, None, None].expand_as(old_BH1)
        sorted_BHn, order_BHn = mean_BHn.sort(dim=-1, descending=True, stable=True)
        sums_BHn = sorted_BHn.cumsum(-1)
        covers_BHn = (sums_BHn - sorted_BHn if self.variant == "corrected" else sums_BHn) < target_BH1
        n = mean_BHn.shape[-1]
        rank_n = torch.arange(n - 1, -1, -1, device=mean_BHn.device, dtype=mean_BHn.dtype)
        rank_BHn = torch.empty_like(mean_BHn).scatter_(-1, order_BHn, rank_n.expand_as(mean_BHn))
        return torch.zeros_like(covers_BHn).scatter_(-1, order_BHn, covers_BHn), rank_BHn

    def norms(self, view: SlotView) -> Tensor:
        """L1 norm of each slot's value through the output projection, mean over the group, float32 [B, H, N].

        A norm is taken at the first event after its token and carried along from then on.
        """
        assert view.output_projection_HqDM is not None
        stored_BHN = view.state["output_norm"]
        unknown_BN = (stored_BHN < 0).any(1)
        rows = []
        # By row: what is new is a row's own, and products then have the shapes the row has alone.
        for values_HND, stored_HN, unknown_N in zip(view.values_BHND, stored_BHN, unknown_BN, strict=True):
            slot_n = unknown_N.nonzero()[:, 0]
            fresh_Hn = projected_norms(values_HND[:, slot_n], view.output_projection_HqDM)
            rows.append(stored_HN.index_copy(1, slot_n, fresh_Hn.to(stored_HN.dtype)))
        return torch.stack(rows)


def projected_norms(values_HND: Tensor, projection_HqDM: Tensor) -> Tensor:
    """L1 norm of values through the output projection, mean over the query heads of a KV head: float32 [H, N]."""
    H, N, _ = values_HND.shape
    g = projection_HqDM.shape[0] // H
    weights_HgDM = projection_HqDM.view(H, g, *projection_HqDM.shape[1:]).to(upcast(values_HND[:0]).dtype)
    parts = []
    for start in range(0, N, _SLOTS_AT_ONCE):
        values_H1nD = upcast(values_HND[:, None, start : start + _SLOTS_AT_ONCE])
        heads = [values_H1nD[:, 0] @ weights_HgDM[:, member] for member in range(g)]
        parts.append(torch.stack([outputs_HnM.abs().sum(-1) for outputs_HnM in heads]).mean(0))
    return torch.cat(parts, dim=1) if parts else values_HND.new_empty(H, 0, dtype=weights_HgDM.dtype)


def neighbour_sums(x: Tensor, kernel: int) -> Tensor:
    """Sum over `kernel` neighbouring slots [..., n], nothing beyond the ends: pooling up to a factor, undone in step 1.

    By shifted additions, which on a CPU take a tenth of the time of a pooling kernel.
    """
    sums = x.clone()
    for shift in range(1, min(kernel // 2, x.shape[-1] - 1) + 1):
        sums[..., shift:] += x[..., :-shift]
        sums[..., :-shift] += x[..., shift:]
    return sums


def window_votes(view: SlotView, kernel: int) -> WindowVotes:
    """Steps 1 and 2 up to the maximum; the softmax runs over all slots, causally, as in the model."""
    queries_RgTD, keys_RND = view.queries_BHgTD().flatten(0, 1), view.keys_BHND.flatten(0, 1)
    T, N = queries_RgTD.shape[2], keys_RND.shape[1]
    n = N - T
    worst, mean, edge = [], [], []
    for _, attention_RgTN in attention_blocks(queries_RgTD, keys_RND, view.scaling, later_slots(view)):
        attention_RgTn = attention_RgTN[..., :n]
        sums_RgT1 = attention_RgTn.sum(-1, keepdim=True)
        pooled_RgTn = neighbour_sums(attention_RgTn, kernel)
        least = torch.finfo(pooled_RgTn.dtype).tiny  # a row without any attention to old slots stays without
        scale_RgT1 = sums_RgT1 / pooled_RgTn.sum(-1, keepdim=True).clamp(min=least)
        worst.append(pooled_RgTn.mul_(scale_RgT1).amax((1, 2)))
        mean.append(attention_RgTn.mean((1, 2)))
        edge.append(attention_RgTn[..., -T:].sum(-1).mean((1, 2)))
    B, H = view.positions_BHN.shape[:2]
    return WindowVotes(torch.cat(worst).view(B, H, n), torch.cat(mean).view(B, H, n), torch.cat(edge).view(B, H))
