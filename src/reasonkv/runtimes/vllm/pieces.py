"""The queries of a step as `Method.observe` wants them: one batch for every length of piece, without padding."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from reasonkv.runtimes.vllm.step import Step


@dataclass(frozen=True)
class Pieces:
    """Requests that feed equally many tokens in a step.

    Args:
        token_bn: int64, where their tokens stand in the step's batch.
        place_b: int64, the requests' places.
        position_bn: int64, token indices.
        valid_bn: bool, True throughout.

    """

    token_bn: Tensor
    place_b: Tensor
    position_bn: Tensor
    valid_bn: Tensor

    @classmethod
    def of(cls, step: Step, device: torch.device) -> list[Pieces]:
        """All requests of a step: those that decode are one batch, whatever their lengths."""
        starts = np.cumsum(step.pieces) - step.pieces
        found = []
        for fed in np.unique(step.pieces):
            rows = np.flatnonzero(step.pieces == fed)
            numbers = np.stack([starts[rows], step.places[rows], step.lengths[rows]])
            start_b, place_b, length_b = torch.from_numpy(numbers).to(device)
            rank_n = torch.arange(int(fed), device=device)
            token_bn = start_b[:, None] + rank_n
            valid_bn = torch.ones_like(token_bn, dtype=torch.bool)
            found.append(cls(token_bn, place_b, length_b[:, None] + rank_n, valid_bn))
        return found
