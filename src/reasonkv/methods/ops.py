"""What scoring methods share: choosing the best slots, pooling, group reduction, attention of the recent queries.

Legend: B rows, H KV heads, g query heads per KV head, N slots, K kept slots, T queries, D head_dim; R = B x H.
Scores are float32 whatever the model's dtype (float64 for float64 models).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from reasonkv.plan import PlanError
from reasonkv.view import SlotView


def upcast(x: Tensor) -> Tensor:
    """`x` in the dtype scores are computed in: float32, or float64 where it already is."""
    return x if x.dtype == torch.float64 else x.float()


def top_k_slots(scores_BHN: Tensor, keep: int, forced_BHN: Tensor | None = None) -> Tensor:
    """The `keep` slots with the highest scores, forced ones first; of equal scores the newer slot wins.

    Args:
        scores_BHN: scores; infinities are allowed.
        keep: slots to return per KV head.
        forced_BHN: bool, slots returned whatever their score.

    Returns:
        int64 [B, H, keep], strictly ascending.

    Raises:
        PlanError: a score is NaN, `keep` is not within 0..N, or a row forces more than `keep` slots.

    """
    return top_k_mask(scores_BHN, keep, forced_BHN).nonzero()[:, 2].view(*scores_BHN.shape[:2], keep)


def top_k_mask(scores_BHN: Tensor, keep: int, forced_BHN: Tensor | None = None) -> Tensor:
    """What `top_k_slots` returns, as a mask of all slots, bool [B, H, N]."""
    N = scores_BHN.shape[-1]
    if not 0 <= keep <= N:
        raise PlanError(f"Cannot keep {keep} of {N} slots.")
    if bool(torch.isnan(scores_BHN).any()):
        raise PlanError("A score is NaN, so the slots have no order.")
    if forced_BHN is not None:
        if bool((forced_BHN.sum(-1) > keep).any()):
            raise PlanError(f"{int(forced_BHN.sum(-1).max())} slots are forced, but only {keep} may stay.")
        # Below infinity first, so that no score ties with a forced slot.
        scores_BHN = scores_BHN.clamp(max=torch.finfo(scores_BHN.dtype).max).masked_fill(forced_BHN, float("inf"))
    if keep == 0:
        return torch.zeros_like(scores_BHN, dtype=torch.bool)
    # The smallest kept score; all above it stay, and as many of its equals as there is room for, newest first.
    cut_BH1 = scores_BHN.topk(keep, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above_BHN, equal_BHN = scores_BHN > cut_BH1, scores_BHN == cut_BH1
    room_BH1 = keep - above_BHN.sum(-1, keepdim=True)
    rank_BHN = equal_BHN.flip(-1).cumsum(-1).flip(-1)  # 1 for the newest of the equals
    return above_BHN | (equal_BHN & (rank_BHN <= room_BH1))


def average_pool(x: Tensor, kernel: int) -> Tensor:
    """Mean over `kernel` neighbouring slots, same length; beyond the ends lie zeros that count in the mean (SnapKV).

    Args:
        x: [..., N].
        kernel: an odd number of slots; 1 returns `x`.

    """
    if kernel == 1:
        return x
    return functional.avg_pool1d(x.reshape(1, -1, x.shape[-1]), kernel, 1, kernel // 2).view(x.shape)


def max_pool(x: Tensor, kernel: int) -> Tensor:
    """Maximum over `kernel` neighbouring slots, same length; nothing lies beyond the ends.

    Args:
        x: [..., N].
        kernel: an odd number of slots; 1 returns `x`.

    """
    if kernel == 1:
        return x
    return functional.max_pool1d(x.reshape(1, -1, x.shape[-1]), kernel, 1, kernel // 2).view(x.shape)


def group_mean(x_BHgN: Tensor) -> Tensor:
    """Mean over the query heads that share a KV head: [B, H, g, ...] to [B, H, ...]."""
    return x_BHgN.mean(2)


def group_max(x_BHgN: Tensor) -> Tensor:
    """Maximum over the query heads that share a KV head: [B, H, g, ...] to [B, H, ...]."""
    return x_BHgN.amax(2)


def z_score(x: Tensor, least: float = 1e-6) -> Tensor:
    """Centred and divided by the population standard deviation over slots [..., N]; that is at least `least`."""
    return (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True, correction=0).clamp(min=least)


def fill_window(scores_BHn: Tensor, slots: int) -> Tensor:
    """Scores of the older slots [B, H, n] extended to all slots [B, H, N] by each head's own maximum.

    The newest slots are protected, so what they score decides nothing; the maximum keeps plots of scores readable.
    """
    filler_BH1 = scores_BHn.amax(-1, keepdim=True)
    return torch.cat([scores_BHn, filler_BH1.expand(-1, -1, slots - scores_BHn.shape[-1])], dim=-1)


def window_attention(view: SlotView, *, over: Literal["all", "old"] = "all", merge_logits: bool = False) -> Tensor:
    """Attention of the newest T queries to every slot, averaged over the queries.

    Slots that weigh more or less than one token (log mass) do so here as they do in the model.

    Args:
        view: one layer's slots, with queries.
        over: "all" - the softmax runs over all slots, causally, as in the model; "old" - only over the slots before
            the T newest tokens.
        merge_logits: replace the logits of a group's query heads by their maximum before the softmax (R-KV).

    Returns:
        float32 probabilities [B, H, g, n], n = N or N - T; with `merge_logits` [B, H, 1, n].

    """
    queries_RgTD, keys_RND = view.queries_BHgTD().flatten(0, 1), view.keys_BHND.flatten(0, 1)
    (R, g, T, _), N = queries_RgTD.shape, keys_RND.shape[1]
    n = N if over == "all" else N - T
    later_RTT = later_slots(view) if over == "all" else None
    mean_RgN = torch.empty(R, 1 if merge_logits else g, n, dtype=upcast(keys_RND[:0]).dtype, device=keys_RND.device)
    mass_BHN = view.state.get("log_mass")
    mass_Rn = None if mass_BHN is None else mass_BHN.flatten(0, 1)[:, :n]

    def weigh(block: slice, logits_rgTn: Tensor) -> None:
        if mass_Rn is not None:
            logits_rgTn += mass_Rn[block, None, None]

    for block, attention_RgTN in attention_blocks(
        queries_RgTD, keys_RND[:, :n], view.scaling, later_RTT, merge_logits=merge_logits, adjust=weigh
    ):
        torch.mean(attention_RgTN, 2, out=mean_RgN[block])
    return mean_RgN.view(*view.keys_BHND.shape[:2], -1, n)


def later_slots(view: SlotView) -> Tensor:
    """Which of the T newest slots come after which of the T newest queries, bool [R, T, T].

    Slots are ascending and the queries are the row's newest tokens, so no other slot can come after a query.
    """
    assert view.query_positions_BT is not None
    T = view.query_positions_BT.shape[1]
    newest_BHT = view.positions_BHN[..., view.positions_BHN.shape[-1] - T :]
    return (newest_BHT[:, :, None] > view.query_positions_BT[:, None, :, None]).flatten(0, 1)


def attention_blocks(
    queries_RgTD: Tensor,
    keys_RND: Tensor,
    scaling: float,
    later_RTt: Tensor | None = None,
    *,
    merge_logits: bool = False,
    adjust: Callable[[slice, Tensor], None] | None = None,
    blocks: Sequence[slice] | None = None,
) -> Iterator[tuple[slice, Tensor]]:
    """Softmax over slots of every query's products with the keys, a block of KV heads at a time.

    Args:
        queries_RgTD: rotated queries.
        keys_RND: rotated keys, any float dtype.
        scaling: factor on the products.
        later_RTt: bool, which of the last t slots come after a query, which then does not see them.
        merge_logits: replace the logits of a group's query heads by their maximum.
        adjust: called with a block and its logits [r, g, T, N], to change them in place before the softmax.
        blocks: which heads to take at once; what `head_blocks` finds best unless given.

    Yields:
        The block, and float32 (float64 for float64 keys) [r, g, T, N], or with `merge_logits` [r, 1, T, N]. The next
        block is written over it.

    """
    (R, g, T, _), N = queries_RgTD.shape, keys_RND.shape[1]
    dtype, device = upcast(keys_RND[:0]).dtype, keys_RND.device
    blocks = list(head_blocks(R, g * T * N, device)) if blocks is None else blocks
    logits_rqN = torch.empty(max((b.stop - b.start for b in blocks), default=0), g * T, N, dtype=dtype, device=device)
    for block in blocks:
        queries_rqD = upcast(queries_RgTD[block]).flatten(1, 2) * scaling
        logits_rqN = logits_rqN[: len(queries_rqD)]
        torch.bmm(queries_rqD, upcast(keys_RND[block]).mT, out=logits_rqN)
        logits_rgTN = logits_rqN.view(-1, g, T, N)
        if merge_logits:
            logits_rgTN = logits_rgTN.amax(1, keepdim=True)
        if later_RTt is not None:
            hidden_r1Tt = later_RTt[block, None]
            logits_rgTN[..., N - hidden_r1Tt.shape[-1] :].masked_fill_(hidden_r1Tt, float("-inf"))
        if adjust is not None:
            adjust(block, logits_rgTN)
        yield block, torch.softmax(logits_rgTN, -1, out=logits_rgTN)


def by_head(function: Callable[[Tensor], Tensor], keys_BHND: Tensor) -> Tensor:
    """Apply a function of the keys of single heads, [R', N, D] to [R', N], to blocks of heads in float32: [B, H, N]."""
    keys_RND = keys_BHND.flatten(0, 1)
    blocks = head_blocks(len(keys_RND), keys_RND[0].numel(), keys_RND.device)
    return torch.cat([function(upcast(keys_RND[block])) for block in blocks]).view(keys_BHND.shape[:3])


def block_elements(device: torch.device) -> int:
    """Elements worth working on at once: 1 MiB of float32 on a CPU (a core's cache), 256 MiB on an accelerator."""
    return 1 << 18 if device.type == "cpu" else 1 << 26


def head_blocks(heads: int, elements: int, device: torch.device) -> Iterator[slice]:
    """Slices over `heads` that bound what is worked on at once, given the elements one head needs.

    On a CPU a block fits a core's cache, which is faster than all heads at once, but has a head for every thread, for
    a product of one head is shared badly among threads; an accelerator takes large ones.
    """
    least = torch.get_num_threads() if device.type == "cpu" else 1
    step = max(least, block_elements(device) // max(1, elements))
    for start in range(0, heads, step):
        yield slice(start, min(start + step, heads))
