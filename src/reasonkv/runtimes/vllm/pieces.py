"""The queries of a step as `Method.observe` wants them: one batch for every length of piece, without padding."""

from __future__ import annotations

from collections.abc import Sequence
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
        """All requests of a step whose order is known: those that decode are one batch, whatever their lengths."""
        starts = dict(zip(step.order, np.cumsum([0, *(step.fed[name] for name in step.order)]), strict=False))
        alike: dict[int, list[str]] = {}
        for name in step.order:
            alike.setdefault(step.fed[name], []).append(name)
        return [cls._alike(step, names, [int(starts[name]) for name in names], device) for names in alike.values()]

    @classmethod
    def _alike(cls, step: Step, names: Sequence[str], starts: Sequence[int], device: torch.device) -> Pieces:
        numbers = [
            [start, step.sequences[name].place, step.before[name].length]
            for start, name in zip(starts, names, strict=True)
        ]
        start_b, place_b, length_b = torch.tensor(numbers, device=device).unbind(1)
        rank_n = torch.arange(step.fed[names[0]], device=device)
        token_bn = start_b[:, None] + rank_n
        return cls(token_bn, place_b, length_b[:, None] + rank_n, torch.ones_like(token_bn, dtype=torch.bool))
