"""An engine told what to say and what to drop: tokens by a logits processor, plans by a method that looks them up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from reasonkv.methods import Method, Requirements
from reasonkv.plan import Merge, Plan
from reasonkv.view import SlotView


class SaysWhatItIsTold(AdapterLogitsProcessor):  # type: ignore[misc]
    """A request with `extra_args={"text": [...]}` says exactly these tokens, whatever the logits."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: Any) -> Callable[[list[int], Tensor], Tensor] | None:
        text = (params.extra_args or {}).get("text")
        if text is None:
            return None

        def say(output_ids: list[int], logits: Tensor) -> Tensor:
            token = text[len(output_ids)]
            return torch.full_like(logits, -torch.inf).index_fill_(0, torch.tensor([token]), 0.0)

        return say


@dataclass(frozen=True)
class Injected(Method):
    """Carries out plans that were made elsewhere; a request's number is its seed.

    Args:
        plans: by request, layer and event; one row each.
        views: what they were made from.
        asked: what their method needs.
    """

    name: ClassVar[str] = "injected"
    title: ClassVar[str] = "Plans that were made elsewhere"
    paper: ClassVar[str] = "-"

    plans: dict[tuple[int, int, int], Plan] = field(default_factory=dict)
    views: dict[tuple[int, int, int], SlotView] = field(default_factory=dict)
    asked: Requirements = field(default_factory=Requirements)

    @property
    def needs(self) -> Requirements:
        return Requirements(recent=self.asked.recent, merges=self.asked.merges, slot_state=self.asked.slot_state)

    def plan(self, view: SlotView, keep: int) -> Plan:
        numbers = zip(view.row_seed_B.tolist(), view.event_B.tolist(), strict=True)
        keys = [(request, view.layer, event) for request, event in numbers]
        assert torch.equal(torch.cat([self.views[key].positions_BHN for key in keys]), view.positions_BHN)
        plans = [self.plans[key] for key in keys]
        folds = [plan.merge for plan in plans if plan.merge is not None]
        fold = None
        if folds:  # a row whose event folded nothing stands for itself
            parts = [plan.merge or without_folds(plan, view.positions_BHN.shape[2]) for plan in plans]
            fold = Merge(
                torch.cat([part.into_BHN for part in parts]),
                torch.cat([part.key_weights_BHN for part in parts]),
                torch.cat([part.value_weights_BHN for part in parts]),
            )
        return Plan(torch.cat([plan.kept_BHK for plan in plans]), fold)


def without_folds(plan: Plan, slots: int) -> Merge:
    """A plan that only drops, as a fold."""
    kept_BHK = plan.kept_BHK
    into_BHN = torch.full((*kept_BHK.shape[:2], slots), -1)
    into_BHN.scatter_(2, kept_BHK, torch.arange(kept_BHK.shape[2]).expand_as(kept_BHK))
    weights_BHN = (into_BHN >= 0).float()
    return Merge(into_BHN, weights_BHN, weights_BHN)
