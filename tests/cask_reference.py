"""CASK's public code (Skyline-23/CASK at 02c2f8b) with the options and quirks that `variant="paper"` leaves out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Ge
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from reasonkv.methods.cask import (
    CASK,
    COVERAGE,
    LEAST_SUPPORT,
    LOCAL_WINDOW,
    Bools,
    Floats,
    Ints,
    Row,
    RowPlan,
    best_first,
)
from reasonkv.methods.keys import unit_vectors
from reasonkv.methods.options import Share
from reasonkv.plan import Plan
from reasonkv.view import SlotView


@dataclass
class _Group:
    """Neighbouring candidates first..last; `vector` is what it is compared by."""

    first: int
    last: int
    anchor: int
    count: int
    support: float
    score_mass: float
    vector: Floats


@dataclass(frozen=True)
class CaskReference(CASK):
    """CASK as its public code runs it: `CASK(variant="paper")` and the options that no experiment sets.

    Not in the catalogue; the vector tests use it. Two differences from the public code remain: kept slots are exactly
    the budget's, and the code's tie-breaking noise on the prompt's scores (1e-6, of a generator) is left out.

    Args:
        pin_prompt: the prompt is never evicted, as without `count_prompt_tokens` (the code's library entry point). A
            prompt that fills the budget leaves the newest slots alone, sinks evicted: "prefix_budget_exhausted".
        coverage: part of the kept prompt that is spread evenly (`prefix_coverage_ratio`).
        normalize: z-score per query head (`normalize_scores`).
        representative: "score_max_source" - a group's key is its best source's; "weighted_latest" - the weighted mean
            of all, moved to the latest position (`representative_mode`).
        promotion: scratch with this part of the core's lowest score joins the core; 0 is off (`promotion_score_ratio`).
        mass_gate: largest sum of scores of a pair, in mean scores of the best; 0 is off. It is dropped once phases were
            and no pair is left (`merge_score_mass_ratio_threshold`).
    """

    variant: Literal["corrected", "paper"] = "paper"
    pin_prompt: bool = False
    coverage: Share = COVERAGE
    normalize: bool = False
    representative: Literal["score_max_source", "weighted_latest"] = "score_max_source"
    promotion: Annotated[float, Ge(0)] = 0.0
    mass_gate: Annotated[float, Ge(0)] = 0.0

    def plan_row(self, row: Row, keep: int) -> RowPlan:
        """Plan one row; the whole prompt counts as pinned even once some of it was evicted."""
        N, P = len(row.protected_N), row.prompt_length if row.prompt_length >= keep else row.prompt
        if not self.pin_prompt or P + int(row.protected_N[P:].sum()) < keep:
            return super().plan_row(row, keep)
        stays, nothing = row.protected_N.copy(), np.zeros(N, dtype=bool)
        older = np.flatnonzero(~stays)
        stays[older[len(older) - (keep - int(stays.sum())) :]] = True
        return RowPlan(np.where(stays, np.arange(N), -1), np.ones(N), nothing, nothing, ("prefix_budget_exhausted",))

    def prompt_stage(self, row: Row, keep: int, recent: int, coverage: float = COVERAGE) -> Bools:
        """Return the prompt slots that are kept, all if the prompt is pinned."""
        if self.pin_prompt:
            return np.ones(row.prompt, dtype=bool)
        return super().prompt_stage(row, keep, recent, self.coverage)

    def best_head(self, scores_Mn: Tensor) -> Tensor:
        """Return the maximum over query heads."""
        return CASK().best_head(scores_Mn) if self.normalize else super().best_head(scores_Mn)

    def core(self, scores_Mn: NDArray[Any], scores_n: Floats, size: int, slots: int) -> Bools:
        """Return the core with the scratch that was promoted to it."""
        is_core_n = super().core(scores_Mn, scores_n, size, slots)
        if self.promotion > 0 and size > 0:
            least = self.promotion * float(scores_n[is_core_n].min())
            worthy = [i for i in best_first(scores_n).tolist() if not is_core_n[i] and scores_n[i] >= least]
            is_core_n[worthy[: max(0, slots - size - 1)]] = True
        return is_core_n

    def merge_runs(
        self, own: Row, scores_n: Floats, linked_n: Bools, is_core_n: Bools, phases_n: Ints, slots: int
    ) -> Ints | None:
        """Merge as CASK does, with the mass gate and means; all pairs are looked at again after every merge."""
        means, joined_n = self.representative == "weighted_latest", linked_n.copy()
        joined_n[1:] &= phases_n[1:] == phases_n[:-1]
        limit, supports = float("inf"), functional.softplus(torch.as_tensor(scores_n, dtype=own.scores_MN.dtype))
        if self.mass_gate > 0:
            total_slots = slots + int(is_core_n.sum())
            limit = self.mass_gate * float(np.mean(np.sort(scores_n)[-total_slots:]))
        values = zip(
            own.counts_N.tolist(), (supports + LEAST_SUPPORT).tolist(), scores_n.tolist(), own.vectors_ND, strict=True
        )
        groups = [_Group(i, i, i, *of_slot) for i, of_slot in enumerate(values) if not is_core_n[i]]
        while len(groups) > slots:
            pairs = []
            for place, (left, right) in enumerate(pairwise(groups)):
                allowed = right.first == left.last + 1 and left.score_mass + right.score_mass <= limit
                if allowed and joined_n[right.first]:
                    cosine = float(np.add.reduce(unit_vectors(left.vector) * unit_vectors(right.vector)))
                    is_close = own.starts_N[right.first] - own.ends_N[left.last] <= LOCAL_WINDOW
                    tier = (2 if cosine >= self.similarity else 1) if is_close else 0
                    pairs.append((tier, cosine, -place))
            if pairs:
                place = -max(pairs)[2]
                self._merge(groups[place], groups.pop(place + 1), scores_n, means)
            elif limit == float("inf") or phases_n is own.phases_N:
                return None
            else:
                limit = float("inf")
        target_n = np.where(is_core_n, np.arange(len(scores_n)), -1)
        for group in groups:
            target_n[group.first : group.last + 1] = group.last if means else group.anchor
        return target_n

    @staticmethod
    def _merge(left: _Group, right: _Group, scores_n: Floats, means: bool) -> None:
        """Put the group `right` into the group `left` before it."""
        masses = [group.count * max(group.support, LEAST_SUPPORT) for group in (left, right)]
        if means:
            left.vector = (masses[0] * left.vector + masses[1] * right.vector) / sum(masses)
        if scores_n[right.anchor] >= scores_n[left.anchor]:
            left.anchor = right.anchor
            left.vector = left.vector if means else right.vector
        left.last, left.count = right.last, left.count + right.count
        left.support, left.score_mass = sum(masses) / left.count, left.score_mass + right.score_mass

    def plan_layers(self, views: Sequence[SlotView], keep: int) -> list[Plan]:
        """Plan all layers; a mean of keys is taken at the position of the slot that goes on."""
        plans = super().plan_layers(views, keep)
        if self.representative == "score_max_source":
            return plans
        merges = (
            merge and replace(merge, key_weights_BHN=merge.value_weights_BHN, rotary=view.rotary)
            for view, merge in zip(views, (plan.merge for plan in plans), strict=True)
        )
        return [replace(plan, merge=merge) for plan, merge in zip(plans, merges, strict=True)]
