"""KeyDiff: keep the keys least like the others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from reasonkv.methods.base import ScorerMethod
from reasonkv.methods.ops import by_head
from reasonkv.view import SlotView


@dataclass(frozen=True)
class KeyDiff(ScorerMethod):
    """Keep keys that point away from the mean direction (Park et al., 2025, "KeyDiff: Key Similarity-Based KV Cache
    Eviction", arXiv 2504.15364).

    The anchor is the mean of the normalised keys of a KV head, over all kept slots.
    """

    def score(self, view: SlotView) -> Tensor:
        """-cos(k, anchor)."""
        return -by_head(cosine_with_anchor, view.keys_BHND)


def cosine_with_anchor(keys_RND: Tensor) -> Tensor:
    """Cosine of every key with the mean of the normalised keys of its head: [R, N, D] to [R, N].

    Keys are divided by their norms inside the two products, so that no normalised copy of them is made.
    """
    inverse_R1N = 1.0 / torch.linalg.vector_norm(keys_RND, dim=-1).clamp(min=1e-12)[:, None]
    anchor_R1D = functional.normalize(inverse_R1N @ keys_RND, dim=-1)  # the sum points where the mean does
    cosine_R1N: Tensor = anchor_R1D @ keys_RND.mT * inverse_R1N
    return cosine_R1N.squeeze(1)
