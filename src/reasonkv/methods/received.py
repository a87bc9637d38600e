"""The attention that slots received since the last compaction: for methods that count every query once.

A slot's state starts at `FRESH`. The first compaction that sees a slot replaces it, so what is still fresh tells which
tokens are new, and so which queries were not counted yet. Nothing is evicted between compactions, so the softmax of
every such query is known exactly.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from reasonkv.methods.ops import attend, upcast
from reasonkv.view import SlotView

FRESH = -1.0
"""State of a slot that no compaction has seen; attention, positions and intervals are never negative."""
_ROWS_AT_ONCE = 256  # query rows of a product; more would not fit a core's cache beside thousands of slots


def first_fresh(view: SlotView, state_BHN: Tensor) -> Tensor:
    """Return the index of the first token that came since the last compaction, int64 [B, 1]; the length if none did.

    Args:
        view: one layer's slots.
        state_BHN: state that is `FRESH` until a compaction writes it; new slots are the same in all heads.
    """
    return view.positions_BHN.where(state_BHN < 0, view.length_B[:, None, None]).amin((1, 2))[:, None]


def uncounted(view: SlotView, state_BHN: Tensor) -> tuple[Tensor, Tensor]:
    """Return the token index of every query of the view, int64 [B, T], and whether it is new, bool [B, T]."""
    assert view.query_positions_BT is not None
    return view.query_positions_BT, view.query_positions_BT >= first_fresh(view, state_BHN)


def received(
    view: SlotView,
    queries_BHqTD: Tensor,
    weights_BT: Tensor,
    adjust: Callable[[slice, slice, Tensor], None] | None = None,
) -> Tensor:
    """Return the attention that queries pay to every slot: a weighted sum over queries, mean over the query heads.

    Some queries at a time: no matrix of all queries and slots is formed, and no query meets a slot after its own block.

    Args:
        view: one layer's slots.
        queries_BHqTD: rotated queries of the newest T columns of every sequence; padding precedes every token.
        weights_BT: what a query counts, or bool; one that counts sees every slot up to its own, as in the model.
        adjust: called with some of the B x H heads, some of the T queries and their logits [r, g, t, n] for the first n
            slots, to change them in place before the softmax.

    Returns:
        float32 (float64 for float64 keys) [B, H, N].
    """
    (B, H, N, _), T = view.keys_BHND.shape, queries_BHqTD.shape[2]
    keys_BHND, queries_BHgTD = upcast(view.keys_BHND), torch.unflatten(queries_BHqTD, 1, (H, -1))
    group = queries_BHgTD.shape[2]
    weights_RT = (weights_BT.to(keys_BHND.dtype) / group).repeat_interleave(H, 0)
    total_BHN = torch.zeros(B, H, N, dtype=torch.float64, device=keys_BHND.device)  # sums of thousands of queries
    step = max(1, _ROWS_AT_ONCE // group)
    for start in range(0, T, step):
        at = slice(start, min(start + step, T))
        seen, own = N - T + at.stop, at.stop - start  # slots up to the block's last token, and tokens of the block
        if seen <= 0:  # padding alone
            continue

        def summed(block: slice, attention_rgTn: Tensor, at: slice = at) -> Tensor:
            weights_r1q = weights_RT[block, None, at].repeat(1, 1, group)
            return torch.bmm(weights_r1q, attention_rgTn.flatten(1, 2))[:, 0]

        def change(block: slice, logits_rgTn: Tensor, at: slice = at) -> None:
            if adjust is not None:
                adjust(block, at, logits_rgTn)

        later_Tt = torch.ones(own, own, dtype=torch.bool, device=keys_BHND.device).triu(1)[:, -min(own, seen) :]
        later_BHTt = later_Tt.expand(B, H, -1, -1)
        queries_BHgtD, keys_BHnD = queries_BHgTD[:, :, :, at], keys_BHND[:, :, :seen]
        total_BHN[:, :, :seen] += attend(
            queries_BHgtD, keys_BHnD, view.scaling, summed, later_BHTt=later_BHTt, adjust=change
        )
    return total_BHN.to(keys_BHND.dtype)
