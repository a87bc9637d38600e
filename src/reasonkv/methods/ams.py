"""AMS: another method's scores compete within segments of the text, which attention cuts and gives their slots."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from reasonkv.methods.base import Requirements, SlotState
from reasonkv.methods.catalogue import MethodError
from reasonkv.methods.ops import average_pool, fill_window, ranks, top_k_slots, window_attention
from reasonkv.methods.options import Count, Kernel, Share, Size
from reasonkv.methods.wraps import ScoreWrapper
from reasonkv.plan import Plan
from reasonkv.view import SlotView

_LEAST_MASS = 1e-12  # so that a segment without attention still has an order among such


@dataclass(frozen=True)
class AMS(ScoreWrapper):
    """Give every segment of the text slots in proportion to its attention (2026, "Adaptive Mass-Segmented KV
    Compression", arXiv 2605.23200, and its code), so that one top-k over all slots wipes out no region.

    1. Mass: pooled attention of the newest queries to every slot that may be evicted, a share of 1 per head; the newest
       tokens have its maximum. It is mixed with credit, a moving average of mass over compactions.
    2. Going through the slots, a segment ends with every `mass` of it, if it has at least `least` slots, or at `most`.
    3. Every segment keeps its best `floor` slots by the base method's scores; the others are divided in proportion to
       mass, fractions rounded.

    Args:
        base: the method whose scores choose within segments; see `ScoreWrapper`.
        window: newest queries whose attention is mass.
        kernel: slots pooled together for that, odd; 1 turns pooling off.
        mass: of a segment.
        least, most: slots of a segment; the last one may have fewer.
        floor: slots that a segment keeps at least, or as many as fit.
        decay: what is left of the credit after a compaction.
        mix: weight of the mass beside the credit.
    """

    window: Size = 32
    kernel: Kernel = 5
    mass: Annotated[float, Gt(0), Le(1)] = 0.02
    least: Size = 64
    most: Size = 2048
    floor: Count = 8
    decay: Annotated[float, Ge(0), Le(1)] = 0.8
    mix: Share = 0.7

    @property
    def needs(self) -> Requirements:
        needs = self.scorer.needs
        return replace(needs, queries=max(needs.queries, self.window), slot_state={"credit": SlotState(0.0)})

    def check_options(self) -> None:
        super().check_options()
        if self.least > self.most:
            raise MethodError(f"{self.name}: least must not be above most, unlike {self.least} and {self.most}.")

    def plan(self, view: SlotView, keep: int) -> Plan:
        score_BHN = self.scorer.score(with_newest(view, self.scorer.needs.queries))
        mass_BHN, credit_BHN = self.masses(view)
        order_BHN = self.order(score_BHN, mass_BHN, view.is_protected_BHN, keep)
        kept_BHK = top_k_slots(torch.where(score_BHN.isnan(), torch.nan, order_BHN), keep, view.is_protected_BHN)
        return Plan(kept_BHK, state={"credit": credit_BHN.gather(2, kept_BHK)})

    def masses(self, view: SlotView) -> tuple[Tensor, Tensor]:
        """Return every slot's mass by step 1, and its credit from now on, float32 [B, H, N]; 0 for protected slots."""
        N = view.positions_BHN.shape[-1]
        newest = with_newest(view, min(self.window, N - 1))
        n = N - newest.queries_BHgTD().shape[3]
        pooled_BHn = average_pool(window_attention(newest)[..., :n].mean(2), self.kernel)
        now_BHN = shares(fill_window(pooled_BHn, N), view.is_protected_BHN)
        credit_BHN = self.decay * view.state["credit"].to(now_BHN.dtype) + (1.0 - self.decay) * now_BHN
        credited_BHN = shares(credit_BHN, view.is_protected_BHN)
        return shares(self.mix * now_BHN + (1.0 - self.mix) * credited_BHN, view.is_protected_BHN), credit_BHN

    def segments(self, mass_BHN: Tensor, is_out_BHN: Tensor) -> Tensor:
        """Return step 2: the number of every slot's segment, int64 [B, H, N]; protected slots are in segment N."""
        N = mass_BHN.shape[-1]
        last = math.ceil(1.0 / self.mass) - 1
        reached_BHN = mass_BHN.double().cumsum(-1).div(self.mass).floor().clamp(max=last)
        starts_BHN = torch.diff(reached_BHN, prepend=reached_BHN[..., :1]) > 0
        number_N = torch.arange(N, device=mass_BHN.device)
        since_BHN = number_N - number_N.where(starts_BHN | (~is_out_BHN).cumsum(-1).eq(1), 0).cummax(-1).values
        starts_BHN = starts_BHN | ((since_BHN % self.most == 0) & (since_BHN > 0))
        # The first start at or after every slot, N if there is none; then from start to start, in all heads at once.
        next_BHN = number_N.where(starts_BHN & ~is_out_BHN, N).flip(-1).cummin(-1).values.flip(-1)
        next_BHN = torch.cat([next_BHN, torch.full_like(next_BHN[..., :1], N)], -1)
        at_BH1 = (~is_out_BHN).long().argmax(-1, keepdim=True)
        is_first_BHN = torch.zeros_like(next_BHN)
        for _ in range(N // self.least):
            at_BH1 = next_BHN.gather(-1, (at_BH1 + self.least).clamp(max=N))
            is_first_BHN.scatter_(-1, at_BH1, 1)
        return is_first_BHN[..., :N].cumsum(-1).masked_fill(is_out_BHN, N)

    def order(self, score_BHN: Tensor, mass_BHN: Tensor, is_out_BHN: Tensor, keep: int) -> Tensor:
        """Return numbers whose largest are what step 3 keeps, float64 [B, H, N].

        Slots are divided by the divisor method of Webster: its quotients in order are the shares for every total,
        rounded, and a segment that runs out of slots leaves its share to the others.
        """
        N, segment_BHN = score_BHN.shape[-1], self.segments(mass_BHN, is_out_BHN)
        zeros_BHS = torch.zeros(*score_BHN.shape[:2], N + 1, dtype=torch.float64, device=score_BHN.device)
        size_BHS = zeros_BHS.scatter_add(2, segment_BHN, torch.ones_like(score_BHN).double())
        weight_BHS = zeros_BHS.scatter_add(2, segment_BHN, mass_BHN.double()) + _LEAST_MASS
        # place within the segment, 0 for the best score; of equal scores the newer is better
        place_BHN = ranks(segment_BHN * N + (N - 1 - ranks(score_BHN)))
        place_BHN = place_BHN - (size_BHS.cumsum(-1) - size_BHS).gather(2, segment_BHN).long()
        free_BH1 = keep - is_out_BHN.sum(-1, keepdim=True)
        floors_F = torch.arange(1, self.floor + 1, device=score_BHN.device)
        floors_BHF = size_BHS[..., :N, None].minimum(floors_F).sum(2)  # slots that a floor takes in all segments
        floor_BH1 = (floors_BHF <= free_BH1).sum(-1, keepdim=True)
        quotient_BHN = weight_BHS.gather(2, segment_BHN) / (place_BHN - floor_BH1 + 0.5)
        return torch.where(place_BHN < floor_BH1, 2.0 / _LEAST_MASS, quotient_BHN)


def with_newest(view: SlotView, queries: int) -> SlotView:
    """Return the view with only the newest `queries` queries, or none."""
    assert view.queries_BHqTD is not None and view.query_positions_BT is not None
    first = max(0, view.queries_BHqTD.shape[2] - queries)
    if queries == 0:
        return replace(view, queries_BHqTD=None, query_positions_BT=None)
    return replace(
        view,
        queries_BHqTD=view.queries_BHqTD[:, :, first:].contiguous(),
        query_positions_BT=view.query_positions_BT[:, first:],
    )


def shares(x_BHN: Tensor, is_out_BHN: Tensor) -> Tensor:
    """Return numbers as shares of their sum over the slots that count, 0 for the others."""
    x_BHN = (x_BHN + _LEAST_MASS).masked_fill(is_out_BHN, 0.0)
    return x_BHN / x_BHN.sum(-1, keepdim=True)
