"""What became of every token: the plans a cache carried out, kept as they were, and the fates that follow from them.

Legend: G layers, H KV heads, N tokens of a row (or slots of an event), K slots kept, E events.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from safetensors.torch import save
from torch import Tensor

from reasonkv.evaluate.manifest import ResultsError
from reasonkv.files import write_atomically
from reasonkv.plan import Plan
from reasonkv.view import SlotView

NEVER = -1


@dataclass(frozen=True)
class EventPlan:
    """The plan of one event of one layer and one row, as carried out."""

    layer: int
    row: int
    event: int
    length: int  # tokens the row had seen
    positions_HN: Tensor  # int32, token index of every slot held before the event
    kept_HK: Tensor  # int32, slots that stayed, ascending
    # int32, output slot a slot was merged into (a kept one: its own), -1 where dropped; None where the plan merges
    # nothing. A slot that stays as padding (log mass -inf) counts as dropped.
    into_HN: Tensor | None = None


class PlanRecorder:
    """An observer for `CompressedCache` that keeps a copy of every plan.

    Rows must stay where they are: beam search moves them between events, and their plans would be told apart wrongly.
    """

    def __init__(self) -> None:
        self.plans: list[EventPlan] = []

    def __call__(self, layer: int, rows: list[int], view: SlotView, plan: Plan) -> None:
        """Copy one layer's plan for the rows that share it."""
        positions_BHN, kept_BHK = _copied(view.positions_BHN), _copied(plan.kept_BHK)
        into_BHN = _copied(plan.merge.into_BHN) if plan.merge is not None else _without_padding(view, plan)
        events, lengths = view.event_B.tolist(), view.length_B.tolist()
        for place, row in enumerate(rows):
            into_HN = None if into_BHN is None else into_BHN[place]
            self.plans.append(
                EventPlan(layer, row, events[place], lengths[place], positions_BHN[place], kept_BHK[place], into_HN)
            )


@dataclass(frozen=True)
class Fates:
    """What became of the tokens of one row.

    A merged token lives on in the slot it was merged into; when that slot is dropped later, so is the token. Where
    layers have events of their own, they are counted over all layers: one for every length at which any had one.
    """

    layers: tuple[int, ...]  # indices of the layers, in the order of the first axis
    dropped_GHN: Tensor  # int32, event at which nothing of the token was left, or -1
    folded_GHN: Tensor  # int32, event at which the token's slot was merged into another, or -1
    into_GHN: Tensor  # int32, token index of that other slot, or -1
    lengths_E: tuple[int, ...]  # tokens seen at every event
    before_E: tuple[int, ...]  # slots held per KV head before every event, mean over the layers that had it
    after_E: tuple[int, ...]  # slots held after it


def fates(plans: Sequence[EventPlan], tokens: int, *, row: int = 0, layers: Sequence[int] = ()) -> Fates:
    """Follow every token of a row through its plans; whole events at once, no loop over slots.

    Args:
        plans: of one cache, in the order they were carried out; those of other rows are left out.
        tokens: N, tokens the row has been fed.
        layers: layers to tell about; none named: those that have plans.

    Raises:
        ResultsError: the plans of a layer do not follow each other.
    """
    own = [plan for plan in plans if plan.row == row]
    chosen = tuple(layers) or tuple(sorted({plan.layer for plan in own}))
    H = own[0].kept_HK.shape[0] if own else 1
    shape = (len(chosen), H, tokens)
    dropped, folded, into = (torch.full(shape, NEVER, dtype=torch.int32) for _ in range(3))
    lengths = sorted({plan.length for plan in own if plan.layer in chosen})
    for place, layer in enumerate(chosen):
        steps = [plan for plan in own if plan.layer == layer]
        if [plan.event for plan in steps] != list(range(len(steps))):
            raise ResultsError(f"The plans of layer {layer} are incomplete: its events do not count from 0.")
        host_HN = torch.arange(tokens).repeat(H, 1)  # the token whose slot holds this one; -1 once it is dropped
        for plan in steps:
            moved_HN = _hosts(plan, tokens).gather(1, host_HN.clamp(min=0))
            gone = (host_HN >= 0) & (moved_HN < 0)
            leaves = (host_HN == torch.arange(tokens)) & (moved_HN >= 0) & (moved_HN != host_HN)
            event = lengths.index(plan.length)
            dropped[place][gone] = event
            folded[place][leaves] = event
            into[place][leaves] = moved_HN[leaves].to(torch.int32)
            host_HN = torch.where(host_HN >= 0, moved_HN, host_HN)
    at = [[plan for plan in own if plan.layer in chosen and plan.length == length] for length in lengths]
    before = tuple(round(fmean(plan.positions_HN.shape[-1] for plan in plans)) for plans in at)
    after = tuple(round(fmean(plan.kept_HK.shape[-1] for plan in plans)) for plans in at)
    return Fates(chosen, dropped, folded, into, tuple(lengths), before, after)


def _without_padding(view: SlotView, plan: Plan) -> Tensor | None:
    """Where every slot goes, int32 [B, H, N], if some stay as padding, which is as good as dropped; else None."""
    if plan.log_mass_BHK is None or not bool(plan.log_mass_BHK.isneginf().any()):
        return None
    K = plan.kept_BHK.shape[-1]
    output_BHK = torch.arange(K, device=plan.kept_BHK.device).expand_as(plan.kept_BHK)
    output_BHK = output_BHK.masked_fill(plan.log_mass_BHK.isneginf(), NEVER)
    return _copied(torch.full_like(view.positions_BHN, NEVER).scatter_(2, plan.kept_BHK, output_BHK))


def _hosts(plan: EventPlan, tokens: int) -> Tensor:
    """int64 [H, N]: for every token with a slot, the token whose slot holds it after the event, or -1.

    Tokens without a slot of their own keep themselves; nothing reads them.
    """
    positions_HN, kept_HK = plan.positions_HN.long(), plan.kept_HK.long()
    kept_tokens_HK = positions_HN.gather(1, kept_HK)
    if plan.into_HN is None:
        after_HN = torch.full_like(positions_HN, NEVER).scatter_(1, kept_HK, kept_tokens_HK)
    else:
        into_HN = plan.into_HN.long()
        after_HN = torch.where(into_HN >= 0, kept_tokens_HK.gather(1, into_HN.clamp(min=0)), NEVER)
    hosts_HN = torch.arange(tokens).repeat(positions_HN.shape[0], 1)
    return hosts_HN.scatter_(1, positions_HN, after_HN)


def save_plans(path: Path, plans: Sequence[EventPlan]) -> None:
    """Write plans to a safetensors file, whole or not at all, so that fates can be recomputed by anyone.

    Plan i has the tensors `i.positions`, `i.kept` and, where it merges, `i.into`; the file's metadata lists layer, row,
    event and length of every plan.
    """
    tensors: dict[str, Tensor] = {}
    for number, plan in enumerate(plans):
        tensors[f"{number}.positions"] = plan.positions_HN.contiguous()
        tensors[f"{number}.kept"] = plan.kept_HK.contiguous()
        if plan.into_HN is not None:
            tensors[f"{number}.into"] = plan.into_HN.contiguous()
    index = [[plan.layer, plan.row, plan.event, plan.length] for plan in plans]
    write_atomically(path, save(tensors, metadata={"plans": json.dumps(index)}))


def _copied(index_BHN: Tensor) -> Tensor:
    """A copy of its own on the CPU; views and plans belong to the cache."""
    return index_BHN.detach().to("cpu", torch.int32, copy=True)
