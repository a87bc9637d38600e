"""RaaS: pages leave in the order of their last use, as in a least-recently-used cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from reasonkv.methods.base import Method, Requirements, SlotState
from reasonkv.methods.ops import largest, leading_slots, newest_attention, top_k_slots
from reasonkv.methods.options import Share, Size
from reasonkv.methods.received import FRESH, uncounted
from reasonkv.plan import Plan
from reasonkv.view import SlotView


@dataclass(frozen=True)
class RaaS(Method):
    """Keep the pages used last (Hu et al., 2025, "RaaS: Reasoning-Aware Attention Sparsity for Efficient LLM
    Reasoning", arXiv 2502.11147).

    A page is `page` consecutive tokens. Every query stamps the pages it uses with its own position: the share of pages
    with most of its attention, or those with more than `alpha` of it. Pages with the oldest stamps are evicted; of the
    last one, the oldest tokens. A page that was never used has the stamp of its newest token.

    The paper keeps the whole prompt: `prompt="keep"` or "on_top" in the budget. Slots that the budget keeps at the
    front are in no page. The paper estimates a page's attention from a representative of its keys, because it must not
    read them all at every step; a compaction reads them all, so here it is exact: the sum over the page's slots, mean
    over the query heads of a KV head. Whether the paper's released figures use the share or `alpha` is not known to us.

    Args:
        page: tokens of a page.
        rule: "share" or "alpha", as above.
        share: of the pages a query sees, those it stamps, rounded up.
        alpha: attention above which a page is stamped.
        window: newest queries that can stamp at a compaction; at least the budget's interval.
    """

    page: Size = 16
    rule: Literal["share", "alpha"] = "share"
    share: Share = 0.5
    alpha: Share = 1e-4
    window: Size = 128

    @property
    def needs(self) -> Requirements:
        return Requirements(queries=self.window, slot_state={"stamp": SlotState(FRESH)})

    def plan(self, view: SlotView, keep: int) -> Plan:
        stamp_BHN = self.stamps(view)
        kept_BHK = top_k_slots(stamp_BHN, keep, view.is_protected_BHN)
        return Plan(kept_BHK, state={"stamp": stamp_BHN.gather(2, kept_BHK)})

    def stamps(self, view: SlotView) -> Tensor:
        """Return the stamp of every slot's page, float32 [B, H, N]; NaN where attention is."""
        stored_BHN, H = view.state["stamp"], view.positions_BHN.shape[1]
        dtype = stored_BHN.dtype
        position_RT, is_new_RT = (x.repeat_interleave(H, 0) for x in uncounted(view, stored_BHN))
        position_RN, is_out_RN = view.positions_BHN.flatten(0, 1), leading_slots(view).flatten(0, 1)
        own_RN = position_RN.div(self.page, rounding_mode="floor")
        page_RN = (torch.diff(own_RN, dim=1, prepend=own_RN[:, :1]) != 0).cumsum(1)  # those still held, from 0
        pages, nowhere = int(page_RN.max()) + 1, torch.iinfo(torch.int64).max
        first_RP = torch.full((len(page_RN), pages), nowhere, device=page_RN.device)
        first_RP = first_RP.scatter_reduce(1, page_RN, position_RN.masked_fill(is_out_RN, nowhere), "amin")
        before_RN = stored_BHN.flatten(0, 1).where(stored_BHN.flatten(0, 1) >= 0, position_RN.to(dtype))
        before_RP = before_RN.new_full((len(page_RN), pages), FRESH).scatter_reduce(1, page_RN, before_RN, "amax")

        def stamp(block: slice, attention_rgTN: Tensor) -> Tensor:
            attention_rTN = attention_rgTN.mean(1).masked_fill(is_out_RN[block, None], 0.0).double()
            page_rTN = page_RN[block, None].expand_as(attention_rTN)
            paid_rTP = attention_rTN.new_zeros(*attention_rTN.shape[:2], pages).scatter_add_(2, page_rTN, attention_rTN)
            is_used_rTP = self.used(paid_rTP, first_RP[block, None] <= position_RT[block, :, None])
            is_used_rTP &= is_new_RT[block, :, None]
            at_rP = position_RT[block, :, None].to(dtype).where(is_used_rTP, FRESH).amax(1)
            at_rP = at_rP.maximum(before_RP[block]) + 0.0 * paid_rTP.sum(1).to(dtype)  # NaN stays
            return at_rP.gather(1, page_RN[block])

        return newest_attention(view, stamp)

    def used(self, paid_rTP: Tensor, is_seen_rTP: Tensor) -> Tensor:
        """Return which pages each query uses, bool [r, T, P], given its attention to them and which it sees."""
        if self.rule == "alpha":
            return (paid_rTP > self.alpha) & is_seen_rTP
        count_rT1 = (self.share * is_seen_rTP.sum(-1, keepdim=True).double()).ceil().long()
        return largest(paid_rTP.masked_fill(~is_seen_rTP, -1.0), count_rT1) & is_seen_rTP
