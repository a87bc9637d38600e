"""Kara: compress a window once by attention inside it, and keep chunks of tokens whole (Token2Chunk)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from reasonkv.budget import Budget, Window
from reasonkv.methods.base import Method, Requirements
from reasonkv.methods.ops import attend, head_blocks, top_k_mask, top_k_slots
from reasonkv.methods.options import Count, Share, Size
from reasonkv.plan import Plan
from reasonkv.view import SlotView


@dataclass(frozen=True)
class Kara(Method):
    """Score a window's slots by attention inside the window, without a causal mask, and keep chunks rather than single
    tokens (Han et al., 2026, "Kara: Sliding-Window KV Cache Compression for Efficient Serving of Reasoning LLMs under
    Memory Constraints", arXiv 2607.01237).

    Made for `reasonkv.Window`, whose compactions show exactly one window as slots that are not protected. Under a
    `Budget` the window is every slot that may be evicted, and queries that are no longer in the ring do not vote. There
    is no public code; `docs/methods/kara.md` lists what was settled here.

    Args:
        gamma: most tokens that a chunk spans, its two ends included.
        alpha: most slots between the ends of chunks, as a share of the slots that are kept.
        token2chunk: False keeps the best single tokens (ablation).
        causal: a token is scored by itself and later ones alone (ablation).
        buffer_votes: the queries after the window vote, too.
        queries: queries kept in the ring; 0: as many as `size + buffer` of a `Window`, or `interval + recent`.
    """

    gamma: Size = 8
    alpha: Share = 0.5
    token2chunk: bool = True
    causal: bool = False
    buffer_votes: bool = False
    queries: Count = 0

    @property
    def needs(self) -> Requirements:
        default = Window()
        return Requirements(queries=self.queries or default.size + default.buffer)

    def for_budget(self, budget: Budget) -> Kara:
        """Return the method with a ring for all queries since the last compaction."""
        return self if self.queries else replace(self, queries=budget.interval + budget.recent)

    def plan(self, view: SlotView, keep: int) -> Plan:
        """Score the window, keep its best chunks and tokens; everything outside it is protected and kept."""
        B, H, N = view.positions_BHN.shape
        window_BHM = open_slots(~view.is_protected_BHN)
        filler_BHM = view.is_protected_BHN.gather(2, window_BHM)
        scores_BHM = self.score(view, window_BHM, filler_BHM)
        room = keep - (N - window_BHM.shape[2])  # the same for all heads: fillers are kept, as all protected slots are
        if self.token2chunk:
            positions_BHM = view.positions_BHN.gather(2, window_BHM)
            kept_BHr = chunked_top_k(scores_BHM, positions_BHM, room, filler_BHM, gamma=self.gamma, alpha=self.alpha)
        else:
            kept_BHr = top_k_slots(scores_BHM, room, filler_BHM)
        is_kept_BHN = view.is_protected_BHN.scatter(2, window_BHM.gather(2, kept_BHr), True)
        return Plan(is_kept_BHN.nonzero()[:, 2].view(B, H, keep))

    def score(self, view: SlotView, window_BHM: Tensor, filler_BHM: Tensor) -> Tensor:
        """Return s_j = mean over the group's query heads and the window's tokens i of softmax over j of q_i . k_j.

        A window whose own queries are all gone from the ring is scored by those at hand, which are later.

        Args:
            view: one layer's slots, with queries.
            window_BHM: int64, slots of the window, ascending, and fillers behind them.
            filler_BHM: bool, entries of `window_BHM` that are no part of it; every head has others. They score 0.
        """
        assert view.query_positions_BT is not None
        B, H, M = window_BHM.shape
        position_RM, filler_RM = view.positions_BHN.gather(2, window_BHM).flatten(0, 1), filler_BHM.flatten(0, 1)
        asks_RT = view.query_positions_BT.repeat_interleave(H, dim=0)
        votes_RT = self._votes(asks_RT, position_RM, filler_RM)

        # Attention is what costs: queries later than all that vote take no part, and a window that is one run of slots
        # in every head is read where it lies.
        T, device = votes_RT.shape[1], window_BHM.device
        run_M = window_BHM[0, 0, 0] + torch.arange(M, device=device)
        last_vote = (votes_RT * torch.arange(1, T + 1, device=device)).amax()
        facts = (last_vote, run_M[0], (window_BHM == run_M).all().long(), filler_RM.any().long())
        asking, first, is_run, has_fillers = torch.stack(facts).tolist()  # one read from the device
        # A CPU's product of a row with a matrix rounds by where matrices begin. With multiples of 16 queries, all begin
        # on a cache line, and in the blocks of all T scores are to the bit what they are if all take part.
        asking = -(-asking // 16) * 16 if T % 16 == 0 and M >= 32 else T
        asks_RT, votes_RT = asks_RT[:, :asking], votes_RT[:, :asking]
        if is_run:
            keys_BHMD = view.keys_BHND[:, :, first : first + M]
        else:
            rows_B11, heads_H1 = (torch.arange(n, device=device) for n in (B, H))
            keys_BHMD = view.keys_BHND[rows_B11[:, None, None], heads_H1[:, None], window_BHM]

        def hide(block: slice, logits_rgTM: Tensor) -> None:
            if has_fillers:
                logits_rgTM.masked_fill_(filler_RM[block, None, None], float("-inf"))
            if self.causal:  # queries that do not vote see everything, so that none is left without a slot
                later_rTM = position_RM[block, None, :] > asks_RT[block, :, None]
                logits_rgTM.masked_fill_((later_rTM & votes_RT[block, :, None])[:, None], float("-inf"))

        def voted(block: slice, attention_rgTM: Tensor) -> Tensor:
            vote_r11T = votes_RT[block, None, None].to(attention_rgTM.dtype)
            return (vote_r11T @ attention_rgTM)[:, :, 0] / vote_r11T.sum(-1)

        return attend(
            view.queries_BHgTD()[:, :, :, :asking],
            keys_BHMD,
            view.scaling,
            voted,
            adjust=hide,
            blocks=list(head_blocks(B * H, view.group_size * T * M, device)),
        ).mean(2)

    def _votes(self, asks_RT: Tensor, position_RM: Tensor, filler_RM: Tensor) -> Tensor:
        """Return which queries count, bool [R, T]: those in the window; without any, or if asked, later ones."""
        votes_RT = asks_RT >= position_RM[:, :1]
        if self.buffer_votes:
            return votes_RT
        last_R1 = position_RM.gather(1, (~filler_RM).sum(-1, keepdim=True) - 1)
        own_RT = votes_RT & (asks_RT <= last_R1)
        return torch.where(own_RT.any(-1, keepdim=True), own_RT, votes_RT)


def open_slots(open_BHN: Tensor) -> Tensor:
    """Return every head's open slots, ascending, int64 [B, H, M] for M of the head that has most.

    Where a head has fewer, protected slots fill up behind them.
    """
    if bool((open_BHN == open_BHN[:1, :1]).all()):  # as under a schedule that protects equal places in all rows
        return open_BHN[0, 0].nonzero()[:, 0].expand(*open_BHN.shape[:2], -1)
    most = int(open_BHN.sum(-1).max())
    return open_BHN.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices[..., :most]


def chunked_top_k(
    scores_BHM: Tensor, positions_BHM: Tensor, keep: int, forced_BHM: Tensor, *, gamma: int, alpha: float
) -> Tensor:
    """Return the slots of accepted chunks of the best tokens, then the best tokens left: int64 [B, H, keep], ascending.

    Args:
        scores_BHM: scores of a window's slots.
        positions_BHM: their tokens, ascending but for forced slots behind them.
        keep: slots to return.
        forced_BHM: bool, slots returned whatever happens, which are no part of the window.
        gamma, alpha: see `Kara`.
    """
    candidate_BHM = top_k_mask(scores_BHM, keep, forced_BHM) & ~forced_BHM
    start_BHM, accepted_BHM = accept_chunks(scores_BHM, positions_BHM, candidate_BHM, gamma=gamma, alpha=alpha)
    # Count up where chunks begin and down behind their ends: slots inside one stand above zero.
    edges_BHM = torch.zeros_like(start_BHM).scatter_add_(2, start_BHM, accepted_BHM.long())
    edges_BHM[..., 1:] -= accepted_BHM[..., :-1].long()
    whole_BHM = edges_BHM.cumsum(-1) > 0
    return top_k_slots(scores_BHM.masked_fill(~candidate_BHM, float("-inf")), keep, whole_BHM | forced_BHM)


def accept_chunks(
    scores_BHM: Tensor, positions_BHM: Tensor, candidate_BHM: Tensor, *, gamma: int, alpha: float
) -> tuple[Tensor, Tensor]:
    """Return the start of the pair of candidates that ends at every slot (0: none), and whether it becomes a chunk.

    A pair spans a chunk if slots lie between its ends and it spans at most `gamma` tokens. Pairs are taken in
    descending order of their lower end's score, newer ones first among equals, as long as the slots between ends are at
    most alpha x candidates and all slots of chunks at most as many as there are candidates.
    """
    M = scores_BHM.shape[-1]
    slot_BHM = torch.arange(M, device=scores_BHM.device).expand(scores_BHM.shape)
    newest_BHM = torch.where(candidate_BHM, slot_BHM, -1).cummax(-1).values
    start_BHM = newest_BHM.roll(1, -1)
    start_BHM[..., 0] = -1
    is_pair_BHM = candidate_BHM & (start_BHM >= 0)
    start_BHM = start_BHM.clamp(min=0)
    between_BHM = slot_BHM - start_BHM - 1
    span_BHM = positions_BHM - positions_BHM.gather(2, start_BHM) + 1
    is_pair_BHM &= (between_BHM > 0) & (span_BHM <= gamma)

    value_BHM = torch.minimum(scores_BHM, scores_BHM.gather(2, start_BHM)).masked_fill(~is_pair_BHM, float("-inf"))
    # Stable, and over the slots in reverse, so that of equal values the newer pair comes first.
    order_BHM = M - 1 - value_BHM.flip(-1).sort(dim=-1, descending=True, stable=True).indices
    rank_BHM = torch.empty_like(order_BHM).scatter_(2, order_BHM, slot_BHM).masked_fill(~is_pair_BHM, M)

    # A candidate that ends one pair and starts the next takes a slot once: when the better of the two is accepted.
    as_start_BHM = torch.full_like(rank_BHM, M).scatter_reduce_(2, start_BHM, rank_BHM, "amin")
    joins_BHM = torch.minimum(rank_BHM, as_start_BHM)
    ends_BHM = rank_BHM.new_zeros(*rank_BHM.shape[:2], M + 1).scatter_add_(2, joins_BHM, torch.ones_like(joins_BHM))
    inner_BHM = (between_BHM * is_pair_BHM).gather(2, order_BHM)
    inner_sum_BHM, all_sum_BHM = inner_BHM.cumsum(-1), (inner_BHM + ends_BHM[..., :M]).cumsum(-1)
    candidates_BH1 = candidate_BHM.sum(-1, keepdim=True)
    fits_BHM = (inner_sum_BHM <= alpha * candidates_BH1) & (all_sum_BHM <= candidates_BH1)
    # Both sums only grow: the first pair that does not fit ends the list.
    accepted_BHM = is_pair_BHM & fits_BHM.gather(2, rank_BHM.clamp(max=M - 1))
    return start_BHM, accepted_BHM
