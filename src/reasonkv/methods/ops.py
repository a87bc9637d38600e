"""Operations that methods share: top-k, pooling, attention of the recent queries, norms, blocks of heads.

Legend: B rows, H KV heads, g query heads per KV head, N slots, K kept slots, T queries, D head_dim; R = B x H.
Scores are float32 whatever the model's dtype (float64 for float64 models).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from reasonkv import noise
from reasonkv.plan import PlanError
from reasonkv.view import SlotView


def upcast(x: Tensor) -> Tensor:
    """Return `x` in the dtype scores are computed in: float32, or float64 where it already is."""
    return x if x.dtype == torch.float64 else x.float()


# -------------------------------------------------------------------------------------------------------------- top-k


def top_k_slots(scores_BHN: Tensor, keep: int, forced_BHN: Tensor | None = None) -> Tensor:
    """Return the `keep` slots with the highest scores, int64 [B, H, keep], ascending; of equal scores the newer wins.

    Args:
        scores_BHN: scores; infinities are allowed.
        keep: slots to return per KV head.
        forced_BHN: bool, slots returned whatever their score.

    Raises:
        PlanError: a score is NaN, `keep` is not within 0..N, or a row forces more than `keep` slots.
    """
    return top_k_mask(scores_BHN, keep, forced_BHN).nonzero()[:, 2].view(*scores_BHN.shape[:2], keep)


def top_k_mask(scores_BHN: Tensor, keep: int, forced_BHN: Tensor | None = None) -> Tensor:
    """Return what `top_k_slots` returns as a mask of all slots, bool [B, H, N]."""
    N = scores_BHN.shape[-1]
    if not 0 <= keep <= N:
        raise PlanError(f"Cannot keep {keep} of {N} slots.")
    refuse_nan(scores_BHN)
    if forced_BHN is not None and bool((forced_BHN.sum(-1) > keep).any()):
        raise PlanError(f"{int(forced_BHN.sum(-1).max())} slots are forced, but only {keep} may stay.")
    return largest(forced_first(scores_BHN, forced_BHN), keep)


def refuse_nan(scores: Tensor) -> None:
    """Raise PlanError if a score is NaN."""
    if bool(torch.isnan(scores).any()):
        raise PlanError("A score is NaN, so the slots have no order.")


def forced_first(scores: Tensor, forced: Tensor | None) -> Tensor:
    """Return the scores with infinity at forced slots, and less than infinity at all others."""
    if forced is None:
        return scores
    return scores.clamp(max=torch.finfo(scores.dtype).max).masked_fill(forced, float("inf"))


def largest(scores: Tensor, count: int | Tensor, most: int | None = None) -> Tensor:
    """Return which entries of the last axis are its `count` largest, bool; of equal ones the later.

    Args:
        scores: [..., N]; infinities are allowed, NaN is not.
        count: how many, at most N: one number, or int64 that broadcasts to [..., 1].
        most: a bound on a tensor's counts, known without reading them from the device; N unless given.
    """
    N = scores.shape[-1]
    most = count if isinstance(count, int) else N if most is None else min(most, N)
    if most == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    best = scores.topk(most, dim=-1, sorted=isinstance(count, Tensor)).values
    if isinstance(count, Tensor):
        cut = best.gather(-1, (count - 1).clamp(0, most - 1).expand(*scores.shape[:-1], 1))
    else:
        cut = best.amin(-1, keepdim=True)
    # All above the smallest of them, and as many of its equals as there is room for, the last first.
    above, equal = scores > cut, scores == cut
    rank = equal.flip(-1).cumsum(-1).flip(-1)  # 1 for the last of the equals
    return (above | (equal & (rank <= count - above.sum(-1, keepdim=True)))) & torch.as_tensor(count > 0)


def free_slots(view: SlotView, keep: int) -> Tensor:
    """Return how many of `keep` slots shares of the budget are taken of, int64 [B, H, 1].

    Protected slots before the newest ones (a kept prompt, sinks) do not count, so that a method divides what it may
    choose. The newest protected ones do: they are the ones that most methods would keep anyway.
    """
    is_protected_BHN = view.is_protected_BHN
    newest_BH1 = is_protected_BHN.flip(-1).cumprod(-1).sum(-1, keepdim=True)
    return keep - is_protected_BHN.sum(-1, keepdim=True) + newest_BH1


def leading_slots(view: SlotView) -> Tensor:
    """Return the protected slots before the first one that is not, bool [B, H, N]: a kept prompt and sinks.

    What a method counts, averages or compares is of the other slots, however long the prompt is.
    """
    return view.is_protected_BHN.cumprod(-1).bool()


def ranks(x: Tensor) -> Tensor:
    """Return the rank of every entry of the last axis, int64, 0 for the smallest; of equal ones the later is higher."""
    order = x.argsort(dim=-1, stable=True)
    return torch.empty_like(order).scatter_(-1, order, torch.arange(x.shape[-1], device=x.device).expand_as(order))


# ------------------------------------------------------------------------------------------------------------- pooling


def average_pool(x: Tensor, kernel: int) -> Tensor:
    """Return the mean over `kernel` (odd) neighbouring slots [..., N]; zeros beyond the ends count in it (SnapKV)."""
    if kernel == 1:
        return x
    return functional.avg_pool1d(x.reshape(1, -1, x.shape[-1]), kernel, 1, kernel // 2).view(x.shape)


def max_pool(x: Tensor, kernel: int) -> Tensor:
    """Return the maximum over `kernel` (odd) neighbouring slots [..., N]; nothing lies beyond the ends."""
    if kernel == 1:
        return x
    return functional.max_pool1d(x.reshape(1, -1, x.shape[-1]), kernel, 1, kernel // 2).view(x.shape)


def group_mean(x_BHgN: Tensor) -> Tensor:
    """Return the mean over the query heads that share a KV head: [B, H, g, ...] to [B, H, ...]."""
    return x_BHgN.mean(2)


def fill_window(scores_BHn: Tensor, slots: int) -> Tensor:
    """Return scores of the older slots [B, H, n] extended to all slots [B, H, N] by each head's own maximum.

    The newest slots are protected, so their scores decide nothing.
    """
    filler_BH1 = scores_BHn.amax(-1, keepdim=True)
    return torch.cat([scores_BHn, filler_BH1.expand(-1, -1, slots - scores_BHn.shape[-1])], dim=-1)


# ----------------------------------------------------------------------------------------------------------- attention


def window_attention(view: SlotView, *, over: Literal["all", "old"] = "all", merge_logits: bool = False) -> Tensor:
    """Return the attention of the newest T queries to every slot, averaged over the queries; log mass counts.

    Args:
        view: one layer's slots, with queries.
        over: "all" - the softmax runs over all slots, causally, as in the model; "old" - only over the slots before
            the T newest tokens.
        merge_logits: replace the logits of a group's query heads by their maximum before the softmax (R-KV).

    Returns:
        float32 probabilities [B, H, g, n], n = N or N - T; with `merge_logits` [B, H, 1, n].
    """
    queries_BHgTD, N = view.queries_BHgTD(), view.keys_BHND.shape[2]
    n = N if over == "all" else N - queries_BHgTD.shape[3]
    mass_BHN = view.state.get("log_mass")

    def weigh(block: slice, logits_rgTn: Tensor) -> None:
        if mass_BHN is not None:
            logits_rgTn += mass_BHN.flatten(0, 1)[block, None, None, :n]

    return attend(
        queries_BHgTD,
        view.keys_BHND[:, :, :n],
        view.scaling,
        lambda _, attention_rgTn: attention_rgTn.mean(2),
        later_BHTt=later_slots(view) if over == "all" else None,
        merge_logits=merge_logits,
        adjust=weigh,
    )


def newest_attention(view: SlotView, reduce: Callable[[slice, Tensor], Tensor]) -> Tensor:
    """Return the attention of the view's queries to every slot, causally as in the model; `reduce` as of `attend`."""
    later_BHTT = later_slots(view)
    return attend(view.queries_BHgTD(), view.keys_BHND, view.scaling, reduce, later_BHTt=later_BHTT)


def later_slots(view: SlotView, positions_BT: Tensor | None = None, newest: int | None = None) -> Tensor:
    """Return which of the newest slots come after which query, bool [B, H, T, newest].

    Args:
        view: one layer's slots, ascending.
        positions_BT: where the queries stand, -1 for padding; unless given, those of the view.
        newest: slots to look at, T unless given: no other slot comes after a query among the newest `newest` tokens.
    """
    positions_BT = view.query_positions_BT if positions_BT is None else positions_BT
    assert positions_BT is not None
    first = max(0, view.positions_BHN.shape[-1] - (newest or positions_BT.shape[1]))
    return view.positions_BHN[:, :, None, first:] > positions_BT[:, None, :, None]


def attend(
    queries_BHgTD: Tensor,
    keys_BHND: Tensor,
    scaling: float,
    reduce: Callable[[slice, Tensor], Tensor],
    *,
    later_BHTt: Tensor | None = None,
    merge_logits: bool = False,
    adjust: Callable[[slice, Tensor], None] | None = None,
    blocks: Sequence[slice] | None = None,
) -> Tensor:
    """Return the softmax over slots of every query's products with the keys, reduced a block of KV heads at a time.

    Args:
        queries_BHgTD: rotated queries.
        keys_BHND: rotated keys, any float dtype.
        scaling: factor on the products.
        reduce: called with a block of the R heads and its attention, float32 (float64 for float64 keys) [r, g, T, N],
            which the next block overwrites; returns [r, ...].
        later_BHTt: bool, which of the last t slots come after a query, which then does not see them; a query that sees
            no slot pays no attention.
        merge_logits: as in `window_attention`; g is then 1.
        adjust: called with a block and its logits [r, g, T, N], to change them in place before the softmax.
        blocks: which heads to take at once, unless as `head_blocks` says.

    Returns:
        What `reduce` returned, [B, H, ...].
    """
    (B, H, g, T, _), N = queries_BHgTD.shape, keys_BHND.shape[2]
    queries_RgTD, keys_RND = queries_BHgTD.flatten(0, 1), keys_BHND.flatten(0, 1)
    later_RTt = None if later_BHTt is None else later_BHTt.flatten(0, 1)
    # a query older than every slot that a small budget kept, and padding: they see nothing
    blind_RT1 = later_RTt.all(-1, keepdim=True) if later_RTt is not None and later_RTt.shape[-1] == N else None
    blocks = blocks or list(head_blocks(B * H, g * T * N, keys_RND.device))
    most = max((block.stop - block.start for block in blocks), default=0)
    logits_rqN = upcast(keys_RND[:0]).new_empty(most, g * T, N)
    parts = []
    for block in blocks:
        queries_rqD = upcast(queries_RgTD[block]).flatten(1, 2) * scaling
        logits_rqN = logits_rqN[: len(queries_rqD)]
        torch.bmm(queries_rqD, upcast(keys_RND[block]).mT, out=logits_rqN)
        logits_rgTN = logits_rqN.view(-1, g, T, N)
        if merge_logits:
            logits_rgTN = logits_rgTN.amax(1, keepdim=True)
        if later_RTt is not None:
            logits_rgTN[..., N - later_RTt.shape[-1] :].masked_fill_(later_RTt[block, None], float("-inf"))
        if adjust is not None:
            adjust(block, logits_rgTN)
        attention_rgTN = torch.softmax(logits_rgTN, -1, out=logits_rgTN)
        if blind_RT1 is not None:
            attention_rgTN.masked_fill_(blind_RT1[block, None], 0.0)
        parts.append(reduce(block, attention_rgTN))
    return torch.unflatten(torch.cat(parts), 0, (B, H))


# --------------------------------------------------------------------------------------------------- norms and blocks


def squared_norms(x_BHND: Tensor, projection_BHDp: Tensor | None = None) -> Tensor:
    """Return squared norms of keys or values, multiplied by a matrix first if one is given: float32 [B, H, N]."""
    if projection_BHDp is None:
        dtype = upcast(x_BHND[:0]).dtype
        norms_BHN: Tensor = torch.linalg.vector_norm(x_BHND, dim=-1, dtype=dtype)
        return norms_BHN.square()
    # entries before slots, so that the sum runs over long rows
    return by_head(lambda x_RND, G_RDp: (G_RDp.mT.to(x_RND.dtype) @ x_RND.mT).square().sum(1), x_BHND, projection_BHDp)


def random_projection(
    view: SlotView, columns: int, row_seed: Tensor, head: Tensor | int, event: Tensor | int
) -> Tensor:
    """Return Gaussian matrices [..., D, columns] with entries of variance 1 / columns, hashed from the seeds.

    Args:
        view: for the run's seed, the layer and D.
        columns: of a matrix.
        row_seed, head, event: what else is hashed, broadcast to [..., 1]: a sequence has the same in any batch.
    """
    D, device = view.keys_BHND.shape[-1], view.keys_BHND.device
    entries = torch.arange(D * columns, device=device)
    uniform = noise.uniform(entries, seed=view.seed, row_seed=row_seed, layer=view.layer, head=head, event=event)
    normals: Tensor = torch.unflatten(noise.normal(uniform), -1, (D, columns))
    return torch.div(normals, columns**0.5)


def by_head(function: Callable[..., Tensor], *given: Tensor, elements: int | None = None) -> Tensor:
    """Return a function of single heads applied to blocks of heads at a time.

    Args:
        function: of tensors [r, ...], float32 (float64 for float64), to one tensor [r, ...].
        given: tensors [B, H, ...].
        elements: what one head needs, for `head_blocks`; unless given, those of the first tensor.

    Returns:
        What the function returned, [B, H, ...].
    """
    of_heads = [x.flatten(0, 1) for x in given]
    blocks = head_blocks(len(of_heads[0]), elements or of_heads[0][0].numel(), given[0].device)
    parts = [function(*(upcast(x[block]) for x in of_heads)) for block in blocks]
    return torch.unflatten(torch.cat(parts), 0, given[0].shape[:2])


def head_blocks(heads: int, elements: int, device: torch.device) -> Iterator[slice]:
    """Yield slices over `heads` that bound what is worked on at once, given the elements one head needs.

    On a CPU a block fits a core's cache (1 MiB of float32), but has a head for every thread, because threads share a
    product of one head badly. An accelerator takes 256 MiB.
    """
    is_cpu = device.type == "cpu"
    step = max(torch.get_num_threads() if is_cpu else 1, (1 << 18 if is_cpu else 1 << 26) // max(1, elements))
    for start in range(0, heads, step):
        yield slice(start, min(start + step, heads))
