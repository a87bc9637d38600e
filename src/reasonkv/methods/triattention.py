"""TriAttention: what the mean query of each head will attend to, from rotated keys alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from reasonkv.budget import Budget
from reasonkv.methods.base import OF_VARIANT, Method, Requirements
from reasonkv.methods.catalogue import MethodError
from reasonkv.methods.frequency import (
    Aggregation,
    FrequencyOptions,
    Horizon,
    Norm,
    layer_scores,
)
from reasonkv.methods.ops import top_k_slots
from reasonkv.plan import Plan
from reasonkv.view import SlotView

_NOISE = 1e-6


def paper_budget(tokens: int, entry: Literal["command_line", "library"] = "command_line") -> Budget:
    """Return the budget that the public TriAttention and CASK code run with.

    Args:
        tokens: slots that are kept, prompt included.
        entry: "command_line" - their `run-one` and workers, behind the published results; "library" - their functions
            called directly, and CASK's replay harness.
    """
    budget = Budget(tokens, interval=128, sinks=0, recent=0, cut_prompt="first_event", prompt="count")
    return budget if entry == "command_line" else replace(budget, trigger="grid", trigger_counts="decode")


@dataclass(frozen=True)
class TriAttention(Method):
    """Keep what the mean query will attend to at the coming distances (Mao et al., 2026, "TriAttention: Efficient Long
    Reasoning with Trigonometric KV Compression", arXiv 2604.04921).

    1. Score every slot for every query head (`frequency_scores`); positions are not needed, and slots of different
       heads may hold different tokens.
    2. `normalize`: z-score each query head's scores over the candidates, the slots that nothing protects.
    3. Reduce over heads and layers as `mode` says, and take the best.

    The default is the published setting. `variant="paper"` is the public code with its default, a pinned prompt; as
    there, once the prompt alone fills the budget, every compaction keeps the first slots of the cache and nothing else.
    `paper_budget` has the budgets it ran with; its library and replay harness ran `mode=global,normalize=false`. Ties
    go to the newer slot (the public code adds noise of 1e-6).

    Args:
        variant: "corrected" or "paper".
        mode: "per_head" - the best query head of a group, averaged over layers: each KV head index has its own set,
            the same in all layers; "global" - the best query head of the model: one set for all; "per_layer_per_head"
            - each KV head of each layer by itself.
        normalize: z-score before reducing (population deviation, at least 1e-6).
        group: how the query heads of a KV head are reduced: "max" or "mean" (the public code has "mean" in
            per_layer_per_head only; "global" always takes the maximum).
        aggregation, mlr, trig, horizon, norm, norm_lambda: of the score, see `FrequencyOptions`.
        noise: break ties by hashed noise of up to 1e-6 instead of by age.
        pin_prompt: prompt slots are kept whatever the budget's prompt policy. Unless given: false, paper true.
    """

    variants: ClassVar[dict[str, dict[str, object]]] = {
        "corrected": {"pin_prompt": False},
        "paper": {"pin_prompt": True},
    }
    paper_budget = staticmethod(paper_budget)

    variant: Literal["corrected", "paper"] = "corrected"
    mode: Literal["per_head", "global", "per_layer_per_head"] = "per_head"
    normalize: bool = True
    group: Literal["max", "mean"] = "max"
    aggregation: Aggregation = "mean"
    mlr: bool = True
    trig: bool = True
    horizon: Horizon = "fixed"
    norm: Norm = "tri"
    norm_lambda: Annotated[float, Ge(0)] = 1.0
    noise: bool = False
    pin_prompt: bool = OF_VARIANT

    def check_options(self) -> None:
        if self.mode == "global" and self.group != "max":
            raise MethodError("triattention: mode=global takes the maximum over all heads, so it needs group=max.")
        if self.aggregation == "max" and self.horizon != "fixed":
            raise MethodError(
                f"triattention: horizon={self.horizon} weights the mean over distances, so it needs aggregation=mean."
            )
        if self.norm == "rms2" and not self.mlr:
            raise MethodError("triattention: mlr=false takes the whole mean modulus, so it needs norm=tri.")

    @property
    def frequency(self) -> FrequencyOptions:
        """The options of the score."""
        return FrequencyOptions(self.aggregation, self.mlr, self.trig, self.horizon, self.norm, self.norm_lambda)

    @property
    def needs(self) -> Requirements:
        """Query statistics; all layers at once unless every layer chooses by itself."""
        parts = {"square": self.norm == "rms2", "horizon": self.horizon == "variational"}
        return Requirements(
            scope="head" if self.mode == "per_layer_per_head" else "model",
            calibration=True,
            statistics=frozenset(part for part, is_read in parts.items() if is_read),
        )

    def plan(self, view: SlotView, keep: int) -> Plan:
        return self.plan_layers([view], keep)[0]

    def plan_layers(self, views: Sequence[SlotView], keep: int) -> list[Plan]:
        """Score all layers, reduce, and take the best; layers and heads that share a score share its set."""
        reduced = [self._reduced_scores(view, keep) for view in views]
        if self.mode == "per_layer_per_head":
            return [self._choose(scores, view, keep) for scores, view in zip(reduced, views, strict=True)]
        stacked = torch.stack(reduced)
        combined = stacked.amax(0) if self.mode == "global" else stacked.mean(0)
        return [self._choose(combined, views[0], keep)] * len(views)

    def _reduced_scores(self, view: SlotView, keep: int) -> Tensor:
        """One layer's scores after steps 1 and 2, reduced over query heads: [B, H, N], or [B, 1, N] for `global`."""
        B, H, N = view.positions_BHN.shape
        scores_BHgN = layer_scores(view, self.frequency).view(B, H, -1, N)
        if self.normalize:
            scores_BHgN = standardize(scores_BHgN, ~self._protected(view, keep)[0][:, :, None])
        if self.mode == "global":
            return view.reduce(scores_BHgN.flatten(1, 2).amax(1, keepdim=True), "max")
        return scores_BHgN.amax(2) if self.group == "max" else scores_BHgN.mean(2)

    def _protected(self, view: SlotView, keep: int) -> tuple[Tensor, Tensor]:
        """Slots that must stay, bool [B, H, N], and rows whose prompt fills the budget, bool [B] (see the class)."""
        protected_BHN = view.is_protected_BHN
        if not self.pin_prompt:
            return protected_BHN, torch.zeros(len(protected_BHN), dtype=torch.bool, device=protected_BHN.device)
        pinned_BHN = protected_BHN | view.is_prompt_BHN
        is_full_B = (pinned_BHN.sum(-1) > keep).flatten(1).any(1)
        if view.prompt_length_B is not None:
            is_full_B |= view.prompt_length_B >= keep
        return torch.where(is_full_B[:, None, None], protected_BHN, pinned_BHN), is_full_B

    def _choose(self, scores_BHN: Tensor, view: SlotView, keep: int) -> Plan:
        """Step 3's best, for all heads of a layer; of one row of scores for all heads, the set of head 0."""
        H, N = view.positions_BHN.shape[1:]
        heads = scores_BHN.shape[1]
        protected_BHN, is_full_B = self._protected(view, keep)
        if self.noise:
            # A set for all heads takes head 0's noise, whichever heads this process holds.
            asked = view if heads == H and self.mode != "global" else replace(view, first_head=0)
            scores_BHN = scores_BHN + _NOISE * asked.uniform_BHN()[:, :heads]
        oldest_N = -torch.arange(N, dtype=scores_BHN.dtype, device=scores_BHN.device)
        scores_BHN = torch.where(is_full_B[:, None, None], oldest_N, scores_BHN)
        kept_BHK = top_k_slots(scores_BHN, keep, protected_BHN[:, :heads])
        return Plan(kept_BHK.expand(-1, H, -1))


def standardize(scores: Tensor, is_candidate: Tensor, least: float = 1e-6) -> Tensor:
    """Return z-scores [..., N] over each row's candidates alone.

    Args:
        scores: any float dtype.
        is_candidate: bool that broadcasts to `scores`; their number may differ from row to row.
        least: floor under the population standard deviation.

    Returns:
        Of slots that are no candidates: the same map applied, which decides nothing.
    """
    count = is_candidate.sum(-1, keepdim=True).clamp(min=1)
    centred = scores - (scores * is_candidate).sum(-1, keepdim=True) / count
    deviation = ((centred.square() * is_candidate).sum(-1, keepdim=True) / count).sqrt()
    return centred / deviation.clamp(min=least)
