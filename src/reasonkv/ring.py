"""Rings of recent queries: [R, T, Hq, D], a row's token t stands at t % T. Both runtimes keep theirs so.

Tokens before heads, because every decode step writes one token of every row: one line of memory instead of Hq.
"""

from __future__ import annotations

import torch
from torch import Tensor


def newest_queries(ring_RTHqD: Tensor, row_b: Tensor, length_b: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The newest queries of some rows, oldest first.

    Whole heads are copied, in the order that attention reads them: on CPU four times as fast as an index per token.

    Args:
        ring_RTHqD: contiguous.
        row_b: int64, rows of the ring.
        length_b: int64, tokens each of them has seen, at least `count`.
        count: queries to return, at most T.

    Returns:
        Queries [b, Hq, count, D] and their token indices, int64 [b, count].

    """
    _, T, Hq, D = ring_RTHqD.shape
    token_bn = length_b[:, None] - count + torch.arange(count, device=ring_RTHqD.device)
    line_bn = row_b[:, None] * T + token_bn % T
    head_bHqn = line_bn[:, None] * Hq + torch.arange(Hq, device=ring_RTHqD.device)[:, None]
    return ring_RTHqD.view(-1, D).index_select(0, head_bHqn.flatten()).view(*head_bHqn.shape, D), token_bn
