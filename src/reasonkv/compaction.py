"""Carry out a plan: gather the kept slots and merge others into them. The only code that rewrites cache contents.

Shapes: B rows of one plan, H KV heads, A slots allocated, N slots held, K slots kept, D width of a key or value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reasonkv.plan import Merge, Plan


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


def merge_slots(
    kept_BHKD: Tensor,
    buffer_BHAD: Tensor,
    rows: list[int],
    weights_BHN: Tensor,
    plan: Plan,
    positions_BHN: Tensor | None = None,
) -> Tensor:
    """Replace the slots of groups by their weighted sums; slots that stand for themselves are left bit for bit.

    Only members of changed groups are touched, so a merge costs little more than the gather before it. Accumulated in
    float32 (float64 for float64 caches) and rounded once.

    Args:
        kept_BHKD: the kept slots, contiguous; changed in place.
        buffer_BHAD: contiguous buffer with all rows of the batch.
        rows: batch rows the plan is for, in its order.
        weights_BHN: a member's weight in its group.
        plan: with a merge.
        positions_BHN: token indices of the slots; turns every member to its kept slot's position by `merge.rotary`.

    Returns:
        `kept_BHKD`.
    """
    merge, kept_BHK = plan.merge, plan.kept_BHK
    assert merge is not None
    (B, H, K, D), A = kept_BHKD.shape, buffer_BHAD.shape[2]
    into_BHN = merge.into_BHN
    N, device = into_BHN.shape[2], kept_BHKD.device
    member_BHN = (into_BHN >= 0) & (weights_BHN != 0)
    target_BHN = into_BHN.clamp(min=0)
    members_BHK = torch.zeros(B, H, K, dtype=torch.int32, device=device).scatter_add_(2, target_BHN, member_BHN.int())
    stays_BHK = (members_BHK == 1) & (weights_BHN.gather(2, kept_BHK) == 1)
    touched_M = (member_BHN & ~stays_BHK.gather(2, target_BHN)).flatten().nonzero()[:, 0]
    changed_C = (~stays_BHK).flatten().nonzero()[:, 0]
    if len(changed_C) == 0:
        return kept_BHKD

    head_M, slot_M = touched_M // N, touched_M % N
    first_line = torch.tensor(rows, device=device).repeat_interleave(H) * H + torch.arange(H, device=device).repeat(B)
    output_M = head_M * K + target_BHN.flatten()[touched_M]
    dtype = torch.promote_types(kept_BHKD.dtype, torch.float32)
    source_MD = buffer_BHAD.view(-1, D).index_select(0, first_line[head_M] * A + slot_M).to(dtype)
    if merge.rotary is not None and positions_BHN is not None:
        kept_positions = positions_BHN.gather(2, kept_BHK).flatten()
        source_MD = merge.rotary.rerotate(source_MD, positions_BHN.flatten()[touched_M], kept_positions[output_M])
    place_of_output = torch.zeros(B * H * K, dtype=torch.long, device=device)
    place_of_output[changed_C] = torch.arange(len(changed_C), device=device)
    sums_CD = torch.zeros(len(changed_C), D, dtype=dtype, device=device)
    sums_CD.index_add_(0, place_of_output[output_M], source_MD * weights_BHN.flatten()[touched_M, None].to(dtype))
    kept_BHKD.view(-1, D).index_copy_(0, changed_C, sums_CD.to(kept_BHKD.dtype))
    return kept_BHKD


def merge_state(values_BHN: Tensor, plan: Plan, how: str) -> Tensor:
    """What a slot's state becomes: [B, H, K]; members of a group combine by "sum", "max", "min", or not ("kept")."""
    kept = values_BHN.gather(2, plan.kept_BHK)
    if plan.merge is None or how == "kept":
        return kept
    # members that are dropped would be scattered somewhere: give them what changes nothing
    into_BHN = plan.merge.into_BHN
    neutral = kept.new_tensor(0) if how == "sum" else None
    home_BHN = torch.where(into_BHN >= 0, into_BHN, 0)
    source = torch.where(into_BHN >= 0, values_BHN, kept[..., :1] if neutral is None else neutral)
    reduce = {"sum": "sum", "max": "amax", "min": "amin"}[how]
    return torch.zeros_like(kept).scatter_reduce_(2, home_BHN, source, reduce, include_self=False)


def merge_counts(counts_BHN: Tensor, merge: Merge, keep: int) -> Tensor:
    """Source tokens each output slot stands for: the sum over its group. [B, H, K], the dtype of `counts_BHN`."""
    member = counts_BHN * (merge.into_BHN >= 0)
    out = torch.zeros(*counts_BHN.shape[:2], keep, dtype=counts_BHN.dtype, device=counts_BHN.device)
    return out.scatter_add_(2, merge.into_BHN.clamp(min=0), member)


def compact_pair(
    keys_BHAD: Tensor, values_BHAD: Tensor, rows: list[int], plan: Plan, positions_BHN: Tensor
) -> tuple[Tensor, Tensor]:
    """New keys and values [len(rows), H, K, D] of the rows of a plan; the buffers themselves are left as they are.

    Args:
        keys_BHAD, values_BHAD: contiguous buffers of the whole batch.
        rows: batch rows the plan is for.
        plan: what to keep and merge.
        positions_BHN: token indices of the slots the plan is about.
    """
    keys, values = gather_slots(keys_BHAD, rows, plan.kept_BHK), gather_slots(values_BHAD, rows, plan.kept_BHK)
    if plan.merge is not None:
        merge_slots(keys, keys_BHAD, rows, plan.merge.key_weights_BHN, plan, positions_BHN)
        merge_slots(values, values_BHAD, rows, plan.merge.value_weights_BHN, plan)
    return keys, values
