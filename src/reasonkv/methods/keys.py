"""What slots are compared by when neighbours merge: unit keys before RoPE."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reasonkv.view import SlotView


def comparison_vectors(views: Sequence[SlotView]) -> Tensor:
    """Return unit keys before RoPE, averaged over layers and KV heads, [B, N, D]; float32, or float64 for float64 keys.

    Rotations are linear, keep norms, and are the same for all heads of a slot, so the mean of rotated unit keys is
    un-rotated once.

    Args:
        views: layers whose heads hold the same tokens.
    """
    first = views[0]
    dtype = torch.promote_types(first.keys_BHND.dtype, torch.float32)
    total_BND = torch.zeros(first.keys_BHND[:, 0].shape, dtype=dtype, device=first.keys_BHND.device)
    for view in views:
        for keys_BND in view.keys_BHND.to(dtype).unbind(1):  # one head at a time stays in a core's cache
            norm_BN1 = torch.linalg.vector_norm(keys_BND, dim=-1, keepdim=True)
            total_BND.addcdiv_(keys_BND, norm_BN1.clamp_(min=1e-12))
    assert first.rotary is not None
    total_BND /= len(views) * first.keys_BHND.shape[1]
    return first.rotary.unrotate(first.reduce(total_BND, "mean"), first.positions_BHN[:, 0])


def unit_vectors(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return vectors [..., D] divided by their norms."""
    unit: NDArray[np.float64] = vectors / np.maximum(np.sqrt(np.square(vectors).sum(-1, keepdims=True)), 1e-12)
    return unit
