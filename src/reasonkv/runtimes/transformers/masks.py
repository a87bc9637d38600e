"""The mask function that goes with compressed attention: it announces a forward to its cache.

Compressed layers make their masks from what they hold, so a model is given none. A model that reads the mask itself, as
an indexer does, is given the one over the slots that are held.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function

from reasonkv.resolve import UnsupportedModelError
from reasonkv.runtimes.transformers.forward import ForwardPlan

BeginForward = Callable[[int, int, Tensor | None], ForwardPlan]
MORE_THAN_CAUSAL = (
    "This forward asks for more than a causal mask (bidirectional, packed or block-wise attention), which a compressed "
    "cache cannot honour once slots are dropped."
)


class MaskLength(int):
    """A key length that carries its cache's `begin_forward`, so that the mask function needs no global state.

    `reads_mask` says that the model itself reads the mask of a forward, as an indexer does.
    """

    begin_forward: BeginForward
    reads_mask: bool

    def __new__(cls, length: int, begin_forward: BeginForward, reads_mask: bool) -> MaskLength:
        """Return the length with the callback attached."""
        made = super().__new__(cls, length)
        made.begin_forward, made.reads_mask = begin_forward, reads_mask
        return made

    def mask(self, kwargs: dict[str, Any]) -> Tensor | None:
        """Announce a forward, and return the mask that its model is given, from a mask function's arguments."""
        asked = int(kwargs["batch_size"]), int(kwargs["q_length"]), kwargs.get("attention_mask")
        forward = self.begin_forward(*asked)
        if self.reads_mask:
            return forward.additive_mask(kwargs["device"], kwargs["dtype"])
        return None  # compressed layers build their own from what they hold


def mask_function(kernel: str) -> Callable[..., Tensor | None]:
    """Return the mask function that is registered beside a kernel."""
    stock_kernel = "sdpa" if kernel == "reference" else kernel

    def build(*args: Any, **kwargs: Any) -> Tensor | None:
        length = kwargs.get("kv_length")
        # a mask with a local size is that of sliding layers, which the model may not have (Qwen2-MoE)
        if not isinstance(length, MaskLength) or kwargs.get("local_size") is not None:
            mask: Tensor | None = ALL_MASK_ATTENTION_FUNCTIONS[stock_kernel](*args, **kwargs)
            return mask
        if not _is_causal(kwargs):
            raise UnsupportedModelError(MORE_THAN_CAUSAL)
        return length.mask(kwargs)

    return build


def _is_causal(kwargs: dict[str, Any]) -> bool:
    """Return whether a mask hides nothing but later tokens, whatever function makes it (text of a model of images)."""
    made: Callable[..., Any] = kwargs["mask_function"]
    if made is causal_mask_function:
        return True
    if kwargs.get("use_vmap"):  # a function of single indices
        return False
    row, query, key = (
        torch.arange(start, start + int(count), device=kwargs["device"])
        for start, count in (
            (0, kwargs["batch_size"]),
            (kwargs["q_offset"], kwargs["q_length"]),
            (0, kwargs["kv_length"]),
        )
    )
    places = row[:, None, None, None], row.new_zeros(1, 1, 1, 1), query[:, None], key
    return bool((made(*places) == causal_mask_function(*places)).all())
