"""Carry out a plan: gather the kept slots and fold others into them. The only code that rewrites cache contents.

Shapes: B rows of one plan, H KV heads, A slots allocated, N slots held, K slots kept, D width of a key or value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reasonkv.plan import Fold, Plan


def gather_slots(buffer_BHAD: Tensor, rows: list[int], kept_BHK: Tensor) -> Tensor:
    """Copy the kept slots of some rows out of a contiguous buffer.

    Whole slots are moved at once: on CPU this is several times faster than an element-wise `torch.gather`.

    Args:
        buffer_BHAD: contiguous buffer with all rows of the batch.
        rows: batch rows the plan is for, in its order.
        kept_BHK: slot indices, B = len(rows).

    Returns:
        [len(rows), H, K, D], contiguous.

    """
    _, H, A, D = buffer_BHAD.shape
    row_starts = torch.tensor(rows, device=buffer_BHAD.device)[:, None, None] * (H * A)
    head_starts = torch.arange(H, device=buffer_BHAD.device)[None, :, None] * A
    flat = (row_starts + head_starts + kept_BHK).flatten()
    return buffer_BHAD.view(-1, D).index_select(0, flat).view(*kept_BHK.shape, D)


def fold_slots(source_BHND: Tensor, weights_BHN: Tensor, fold: Fold, keep: int) -> Tensor:
    """Weighted sums of keys or values over every output slot's group.

    Accumulated in float32 (float64 for float64 caches) and rounded once; a one-hot group returns its slot bit for bit.

    Returns:
        [B, H, K, D] in the dtype of the source.

    """
    B, H, _, D = source_BHND.shape
    dtype = torch.promote_types(source_BHND.dtype, torch.float32)
    member = fold.into_BHN >= 0
    weighted = source_BHND.to(dtype) * (weights_BHN.to(dtype) * member)[..., None]
    out = torch.zeros(B, H, keep, D, dtype=dtype, device=source_BHND.device)
    out.scatter_add_(2, fold.into_BHN.clamp(min=0)[..., None].expand(-1, -1, -1, D), weighted)
    return out.to(source_BHND.dtype)


def fold_counts(counts_BHN: Tensor, fold: Fold, keep: int) -> Tensor:
    """Source tokens each output slot stands for: the sum over its group. [B, H, K], the dtype of `counts_BHN`."""
    member = counts_BHN * (fold.into_BHN >= 0)
    out = torch.zeros(*counts_BHN.shape[:2], keep, dtype=counts_BHN.dtype, device=counts_BHN.device)
    return out.scatter_add_(2, fold.into_BHN.clamp(min=0), member)


def compact_pair(
    keys_BHAD: Tensor, values_BHAD: Tensor, rows: list[int], held: int, plan: Plan
) -> tuple[Tensor, Tensor]:
    """New keys and values [len(rows), H, K, D] of the rows of a plan; the buffers themselves are left as they are.

    Args:
        keys_BHAD, values_BHAD: contiguous buffers of the whole batch.
        rows: batch rows the plan is for.
        held: N, slots these rows hold.
        plan: what to keep and fold.

    """
    if plan.fold is None:
        return gather_slots(keys_BHAD, rows, plan.kept_BHK), gather_slots(values_BHAD, rows, plan.kept_BHK)
    keep = plan.kept_BHK.shape[-1]
    index = torch.tensor(rows, device=keys_BHAD.device)
    keys = keys_BHAD[:, :, :held].index_select(0, index)
    values = values_BHAD[:, :, :held].index_select(0, index)
    return (
        fold_slots(keys, plan.fold.key_weights_BHN, plan.fold, keep),
        fold_slots(values, plan.fold.value_weights_BHN, plan.fold, keep),
    )
