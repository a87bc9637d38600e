"""AdaKV: the heads of a layer share its slots, and heads whose attention is spread out get more of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from reasonkv.budget import Budget, BudgetError, Window
from reasonkv.methods.base import Requirements
from reasonkv.methods.ops import forced_first, free_slots, largest, top_k_slots
from reasonkv.methods.options import Share
from reasonkv.methods.wraps import ScoreWrapper
from reasonkv.plan import Plan
from reasonkv.view import SlotView


@dataclass(frozen=True)
class AdaKV(ScoreWrapper):
    """One top-k over all heads of a layer instead of one per head (Feng et al., 2024, "Ada-KV: Optimizing KV Cache
    Eviction by Adaptive Budget Allocation for Efficient LLM Inference", arXiv 2407.11550).

    Storage holds `keep` slots in every head, so that the physical length is one number. A layer's H heads together
    attend to H x a of them: a = round(keep / stretch), where a kept prompt and sinks are set apart and all attended.

    1. Every head stores its `keep` best slots by the base method's scores.
    2. The best round-down(alpha x a) slots of every head, and all protected ones, are attended (the safeguard).
    3. The rest of the H x a goes to the best scores of all heads together.
    4. What is stored and not attended is padding: log mass -inf, until the next compaction evicts it first.

    Scores of different heads are compared as they are: a base whose scores are shares of attention suits it.

    Args:
        base: the method whose scores are compared; see `ScoreWrapper`.
        alpha: part of the mean that every head is sure of; protected slots count in it. The published safeguard is 0.2.
        stretch: slots stored per slot attended; 1 is the base method, every head with the same number.
    """

    alpha: Share = 0.2
    stretch: Annotated[float, Ge(1)] = 1.5

    @property
    def needs(self) -> Requirements:
        return replace(self.scorer.needs, log_mass=self.stretch != 1)

    def for_budget(self, budget: Budget) -> AdaKV:
        if isinstance(budget, Window):
            raise BudgetError(f"{self.name} divides all slots of a layer at every compaction; give it a Budget.")
        return self

    def plan(self, view: SlotView, keep: int) -> Plan:
        scores_BHN, protected_BHN = self.scorer.score(view), view.is_protected_BHN
        if self.stretch == 1:
            return Plan(top_k_slots(scores_BHN, keep, protected_BHN))
        padding_BHN = view.state["log_mass"].isneginf()
        scores_BHN = scores_BHN.clamp(min=torch.finfo(scores_BHN.dtype).min).masked_fill(padding_BHN, float("-inf"))
        kept_BHK = top_k_slots(scores_BHN, keep, protected_BHN)
        free_B11 = free_slots(view, keep)[:, :1]  # the same in all heads
        mean_B11 = (free_B11.double() / self.stretch).round().long().clamp(min=1)
        apart_B11, safe_B11 = keep - free_B11, (self.alpha * mean_B11.double()).long()
        attended_BHK = shared_top_k(
            scores_BHN.gather(2, kept_BHK),
            apart_B11 + mean_B11,
            apart_B11 + safe_B11,
            protected_BHN.gather(2, kept_BHK),
        )
        log_mass_BHK = torch.zeros(kept_BHK.shape, device=kept_BHK.device).masked_fill(~attended_BHK, float("-inf"))
        return Plan(kept_BHK, log_mass_BHK=log_mass_BHK)


def shared_top_k(scores_BHN: Tensor, mean: int | Tensor, safe: int | Tensor, forced_BHN: Tensor) -> Tensor:
    """Return the slots with the highest scores of all heads together, H x `mean` of them, bool [B, H, N].

    More only where the safeguard alone asks for more; fewer only where fewer are not -inf. In every head these are its
    best; of equal scores the newer slot.

    Args:
        scores_BHN: scores on one scale; -inf is never chosen, NaN is not allowed.
        mean: slots per head, on average; this and `safe` are one number, or int64 [B, 1, 1].
        safe: the best of every head that are chosen whatever the other heads' scores, forced ones among them.
        forced_BHN: bool, slots chosen whatever their score.
    """
    B, H, N = scores_BHN.shape
    can_BHN = ~scores_BHN.isneginf() | forced_BHN
    scores_BHN = forced_first(scores_BHN, forced_BHN)
    mean_B1, safe_B11 = (torch.as_tensor(x, device=scores_BHN.device).expand(B, 1, 1) for x in (mean, safe))
    mean_B1 = mean_B1[:, 0]
    first_BHN = (largest(scores_BHN, safe_B11.clamp(max=N)) & can_BHN) | forced_BHN
    count_B1 = first_BHN.flatten(1).sum(-1, keepdim=True).maximum(H * mean_B1).clamp(max=H * N)
    # Slot by slot through all heads, so that of equal scores the newer slot wins whichever head it is in.
    flat_BM = scores_BHN.masked_fill(first_BHN, float("inf")).transpose(1, 2).flatten(1)
    return largest(flat_BM, count_B1).view(B, N, H).transpose(1, 2) & can_BHN
