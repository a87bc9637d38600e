"""CASK's public code (Skyline-23/CASK at 02c2f8b) with the options and quirks that `variant="paper"` leaves out."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import numpy as np
from annotated_types import Ge
from torch import Tensor

from reasonkv.methods.cask import (
    CASK,
    LEAST_SUPPORT,
    Bools,
    Floats,
    Groups,
    Ints,
    Pair,
    Row,
    RowPlan,
    best_first,
    unit_vectors,
)
from reasonkv.methods.options import Share
from reasonkv.plan import Plan
from reasonkv.view import SlotView

__all__ = ["CaskReference"]


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
        mass_gate: largest sum of scores of a pair, in mean scores of the best; 0 is off
            (`merge_score_mass_ratio_threshold`).

    """

    variant: Literal["corrected", "paper"] = "paper"
    pin_prompt: bool = False
    coverage: Share = 0.0625
    normalize: bool = False
    representative: Literal["score_max_source", "weighted_latest"] = "score_max_source"
    promotion: Annotated[float, Ge(0)] = 0.0
    mass_gate: Annotated[float, Ge(0)] = 0.0

    def plan_row(self, row: Row, keep: int) -> RowPlan:
        """Plan one row; the whole prompt counts as pinned even once some of it was evicted."""
        P = row.prompt_length if row.prompt_length >= keep else row.prompt
        if not self.pin_prompt or P + int(row.protected_N[P:].sum()) < keep:
            return super().plan_row(row, keep)
        stays, N = row.protected_N.copy(), len(row.protected_N)
        older = np.flatnonzero(~stays)
        stays[older[len(older) - (keep - int(stays.sum())) :]] = True
        nothing = np.zeros(N, dtype=bool)
        return RowPlan(np.where(stays, np.arange(N), -1), np.ones(N), nothing, nothing, ("prefix_budget_exhausted",))

    def prompt_stage(self, row: Row, keep: int, recent: int) -> Bools:
        """Return the prompt slots that are kept, all if the prompt is pinned."""
        return np.ones(row.prompt, dtype=bool) if self.pin_prompt else super().prompt_stage(row, keep, recent)

    def spread_and_best(self, row: Row, target: int, coverage: float = 0.0) -> Bools:
        """Return `target` prompt slots, with the option's coverage."""
        return super().spread_and_best(row, target, self.coverage)

    def best_head(self, scores_Mn: Tensor) -> Tensor:
        """Return the maximum over query heads."""
        return CASK().best_head(scores_Mn) if self.normalize else super().best_head(scores_Mn)

    def core(self, scores_Mn: Tensor, scores_n: Floats, size: int, slots: int) -> Bools:
        """Return the core with the scratch that was promoted to it."""
        is_core_n = super().core(scores_Mn, scores_n, size, slots)
        if self.promotion > 0 and size > 0:
            least = self.promotion * float(scores_n[is_core_n].min())
            worthy = [i for i in best_first(scores_n).tolist() if not is_core_n[i] and scores_n[i] >= least]
            is_core_n[worthy[: max(0, slots - size - 1)]] = True
        return is_core_n

    def groups(self, row: Row, index: Ints, scores_n: Floats, supports_n: Floats, slots: int) -> Groups:
        """Return the candidates as groups of one, with the reference's options."""
        limit = self.mass_gate * float(np.mean(np.sort(scores_n)[-slots:])) if self.mass_gate > 0 else float("inf")
        return ReferenceGroups(
            row, index, scores_n, self.similarity, evicts=self.fold == "similar", supports_n=supports_n, limit=limit,
            means=self.representative == "weighted_latest",
        )  # fmt: skip

    def plan_layers(self, views: Sequence[SlotView], keep: int) -> list[Plan]:
        """Plan all layers; means of keys are taken at the position of the slot that goes on."""
        plans = super().plan_layers(views, keep)
        if self.representative == "score_max_source":
            return plans
        return [
            plan if plan.fold is None else replace(plan, fold=replace(
                plan.fold, key_weights_BHN=plan.fold.value_weights_BHN, rotary=view.rotary
            ))
            for plan, view in zip(plans, views, strict=True)
        ]  # fmt: skip


class ReferenceGroups(Groups):
    """Groups with the reference's options.

    Args:
        supports_n: of the candidates; a group's is the mean over its tokens.
        limit: pairs whose scores add up to more may not merge. Once phases were given up and nothing else is left, the
            limit is dropped, and merging goes on from there.
        means: groups are compared by the weighted mean of their vectors, and the last slot goes on.
    """

    def __init__(
        self, row: Row, index: Ints, scores_n: Floats, similarity: float, *, evicts: bool, supports_n: Floats,
        limit: float, means: bool,
    ) -> None:  # fmt: skip
        super().__init__(row, index, scores_n, similarity, evicts=evicts)
        self.counts_n, self.supports_n, self.vectors_nD = row.counts_N[index], supports_n, row.vectors_ND[index]
        self.singles_nD, self.gate, self.means = self.unit_nD, limit, means

    def merge_down(self, slots: int, is_core_n: Bools, phases_n: Ints) -> Ints | None:
        """Merge as `Groups` does; the gate may be dropped where phases have been."""
        self.limit, self.may_relax = self.gate, phases_n is not self.phases_n
        return super().merge_down(slots, is_core_n, phases_n)

    def restart(self) -> None:
        """Make every candidate a group of its own."""
        super().restart()
        self.count, self.support = self.counts_n.tolist(), self.supports_n.tolist()
        self.score_mass = self.score.copy()
        if self.means:
            self.vector_nD, self.unit_nD = self.vectors_nD.copy(), self.singles_nD.copy()

    def relax(self, heap: list[Pair], before: list[int], joined: list[bool], version: list[int]) -> bool:
        """Drop the limit and offer all pairs again, once."""
        if not self.may_relax or self.limit == float("inf"):
            return False
        self.limit = float("inf")
        for right in range(1, len(version)):
            if joined[right] and version[right] >= 0:
                left = before[right]
                order = self.order(left, right)
                if order is not None:
                    heapq.heappush(heap, (-order[0], -order[1], left, version[left], version[right]))
        return bool(heap)

    def goes_on(self, first: int) -> int:
        """Return the candidate that a group becomes."""
        return self.last[first] if self.means else super().goes_on(first)

    def first_pairs(self, right: Ints) -> list[Pair]:
        """Return heap entries of single candidates `right` and those before them, within the limit."""
        pairs = super().first_pairs(right)
        return [pair for pair in pairs if self.score[pair[2]] + self.score[pair[2] + 1] <= self.limit]

    def order(self, left: int, right: int) -> tuple[int, float] | None:
        """Return (tier, cosine) of two groups, None where they may not merge."""
        over = self.score_mass[left] + self.score_mass[right] > self.limit
        return None if over else super().order(left, right)

    def cosine(self, left: int, right: int) -> float:
        """Return the cosine of two groups."""
        if not self.means:
            return super().cosine(left, right)
        if self.last[left] == left == right - 1 and self.last[right] == right:
            return float(self.neighbours_n[right])
        return float(np.add.reduce(self.unit_nD[left] * self.unit_nD[right]))

    def merge(self, left: int, right: int) -> None:
        """Put the group `right` into the group `left` before it."""
        counts = self.count[left], self.count[right]
        masses = [self.count[i] * max(self.support[i], LEAST_SUPPORT) for i in (left, right)]
        if self.means:
            total = masses[0] * self.vector_nD[left] + masses[1] * self.vector_nD[right]
            self.vector_nD[left] = total / sum(masses)
            self.unit_nD[left] = unit_vectors(self.vector_nD[left])
        super().merge(left, right)
        self.count[left] = sum(counts)
        self.support[left] = sum(masses) / sum(counts)
        self.score_mass[left] += self.score_mass[right]
