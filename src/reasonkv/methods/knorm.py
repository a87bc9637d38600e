"""Knorm: keep the keys with the smallest norm."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reasonkv.methods.base import ScorerMethod
from reasonkv.methods.ops import by_head
from reasonkv.view import SlotView


@dataclass(frozen=True)
class Knorm(ScorerMethod):
    """Keep LOW key norms (Devoto et al., 2024, "A Simple and Effective L2 Norm-Based Strategy for KV Cache
    Compression", arXiv 2406.11430).

    The paper leaves the first two layers uncompressed. Models that normalise keys (Qwen3) have nearly constant norms.
    """

    def score(self, view: SlotView) -> Tensor:
        """-||k||."""
        return -by_head(lambda keys_RND: torch.linalg.vector_norm(keys_RND, dim=-1), view.keys_BHND)
