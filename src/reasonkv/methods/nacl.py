"""NACL: the attention of proxy queries decides most slots, chance the rest."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from reasonkv import noise
from reasonkv.methods.base import Method, Requirements
from reasonkv.methods.ops import forced_first, group_mean, largest, refuse_nan, top_k_slots, window_attention
from reasonkv.methods.options import Share, Size
from reasonkv.plan import Plan
from reasonkv.view import SlotView


@dataclass(frozen=True)
class NACL(Method):
    """Keep what proxy tokens attend to, and a random part of the rest (Chen et al., 2024, "NACL: A General and
    Effective KV Cache Eviction Framework for LLMs at Inference Time", arXiv 2408.03675, and its code).

    1. The score of a slot is the attention that the proxies pay to it, summed over them, mean over the query heads of a
       KV head. The best slots are kept.
    2. Of the other slots, `random_share` of what is kept is drawn without replacement, each KV head by itself, with
       probabilities softmax(score).

    The paper runs once, after the prompt, and its proxies are the end of the prompt, where the question stands. Here
    the newest queries are the proxies, at every compaction. What the budget protects is not counted in the share.

    Args:
        window: newest queries that are proxies; the authors' code takes 1 % of the text.
        random_share: of the slots that may be chosen, those drawn by chance. The authors' code keeps 12 % of the text
            by score and 7 % by chance.
    """

    window: Size = 32
    random_share: Share = 0.37

    @property
    def needs(self) -> Requirements:
        return Requirements(queries=self.window)

    def plan(self, view: SlotView, keep: int) -> Plan:
        score_BHN = group_mean(window_attention(view)) * view.queries_BHgTD().shape[3]
        refuse_nan(score_BHN)
        best_BHN = largest(forced_first(score_BHN, view.is_protected_BHN), keep - self.drawn(view, keep), keep)
        # Gumbel noise on log-probabilities, then the largest: a draw without replacement
        drawn_BHN = score_BHN + noise.gumbel(view.uniform_BHN())
        return Plan(top_k_slots(drawn_BHN, keep, best_BHN))

    def drawn(self, view: SlotView, keep: int) -> Tensor:
        """Return how many slots are drawn by chance, int64 [B, H, 1]."""
        open_BH1 = keep - view.is_protected_BHN.sum(-1, keepdim=True)
        return (self.random_share * open_BH1.double()).long()
