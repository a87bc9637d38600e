"""Tensor-parallel ranks, for methods whose heads decide together (`SlotView.reduce`)."""

from __future__ import annotations

from torch import Tensor
from vllm.distributed import get_tp_group


class TensorParallel:
    """vLLM's own group, on its own transport: shared memory or gloo on CPU, NCCL on CUDA.

    Everything reduced goes through one collective, gathering, and is added up in the order of the ranks. So all ranks
    have the same numbers to the bit, and drop the same slots.
    """

    def gather(self, x: Tensor) -> Tensor:
        """Every rank's `x`, stacked in front."""
        gathered: Tensor = get_tp_group().all_gather(x.contiguous()[None], 0)
        return gathered


def other_ranks(world_size: int) -> TensorParallel | None:
    """The ranks that hold a layer's other heads, or None where there are none."""
    return TensorParallel() if world_size > 1 else None
