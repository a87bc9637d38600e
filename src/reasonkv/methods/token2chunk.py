"""Token2Chunk of Kara (arXiv 2607.01237): the best tokens, and whole what lies between them where they are close.

Legend: B rows, H KV heads, M slots of a window.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reasonkv.methods.ops import top_k_mask, top_k_slots


def chunked_top_k(
    scores_BHM: Tensor, positions_BHM: Tensor, keep: int, forced_BHM: Tensor, *, gamma: int, alpha: float
) -> Tensor:
    """Token2Chunk: candidates are the best tokens; accepted chunks of them are kept whole, then the best left.

    Args:
        scores_BHM: scores of a window's slots.
        positions_BHM: their tokens, ascending but for forced slots behind them.
        keep: slots to return.
        forced_BHM: bool, slots returned whatever happens, which are no part of the window.
        gamma: most tokens a chunk spans.
        alpha: most slots between ends of chunks, as a share of the window's slots that are kept.

    Returns:
        int64 [B, H, keep], strictly ascending.
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
    """Choose which pairs of neighbouring candidates become chunks.

    A pair spans a chunk if slots lie between its ends and it spans at most `gamma` tokens. Pairs are taken in
    descending order of their lower end's score, newer ones first among equals, as long as the slots between ends are at
    most alpha x candidates and all slots of chunks at most as many as there are candidates.

    Returns:
        For every slot: the start of the pair that ends there (int64, 0 where none does), and whether it is accepted.
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
