"""How calibration gets at a model's queries: an attention function that sums them up and then attends as usual.

There are two public ways to the queries before RoPE. Forward hooks see the output of `q_proj`, `q_norm` or a fused
`qkv_proj`, and must know for each model family which of them comes last, how its output is laid out (Gemma 3 norms
[B, Hq, T, D], Qwen3 [B, T, Hq, D], OLMo 2 a flat row) and what the attention module still does to it; where that
knowledge is wrong they return wrong numbers without a word. The attention function that transformers lets anyone
register is given the very queries the layer attends with, in one layout for every family, and only the rotation has
to be taken off again, which is exact because positions are known. This file takes the second way.

Un-rotating costs one rounding of the rotated query in the model's dtype (2 ** -9 of an element in bfloat16), of
random sign, which the mean over thousands of tokens removes. The angles are float32, as the models compute theirs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from reasonkv.calibration.horizon import HorizonSums
from reasonkv.rotary import Rotary

ARGUMENT = "reasonkv_query_sums"
"""Keyword of the model's forward that brings a `QuerySums` to every layer's attention function."""
TOKENS_AT_ONCE = 512
"""Tokens whose queries stand un-rotated in float32 at one time."""
KERNELS = ("sdpa", "eager", "flash_attention_2", "flash_attention_3")


class QuerySums:
    """Running sums over tokens of q_f, |q_f| and |q_f|^2, per layer, query head and rotary pair.

    Args:
        rotaries: the rotation of every layer.
        horizon: also sum what the weights of future distances are fitted to.

    Holds [4, Hq, F] float64 a layer (float32 where the device knows no float64), on the layer's device.
    """

    def __init__(self, rotaries: Sequence[Rotary], *, horizon: bool = False) -> None:
        self.rotaries = rotaries
        self.horizon = HorizonSums(len(rotaries)) if horizon else None
        self.sums: list[Tensor | None] = [None] * len(rotaries)
        self.tokens = [0] * len(rotaries)
        self.start = 0  # position of the next forward's first token

    def add(self, layer: int, query_BHqTD: Tensor) -> None:
        """Add the rotated queries of a forward; their positions are `start`, `start` + 1, ..."""
        B, Hq, T, _ = query_BHqTD.shape
        rotary = self.rotaries[layer]
        F = rotary.inv_freq.numel()
        sums = self.sums[layer]
        if sums is None:
            wide = torch.float32 if query_BHqTD.device.type == "mps" else torch.float64
            sums = self.sums[layer] = torch.zeros(4, Hq, F, dtype=wide, device=query_BHqTD.device)
        step = max(1, TOKENS_AT_ONCE // B)
        for begin in range(0, T, step):
            part_BHqtD = query_BHqTD[:, :, begin : begin + step].float()
            first = self.start + begin
            positions_t = torch.arange(first, first + part_BHqtD.shape[2], device=query_BHqTD.device)
            plain_BHqtD = rotary.unrotate(part_BHqtD, positions_t)
            real, imaginary = plain_BHqtD[..., :F], plain_BHqtD[..., F : 2 * F]
            square = real.square() + imaginary.square()
            for row, values in enumerate((real, imaginary, square.sqrt(), square)):
                sums[row] += values.sum((0, 2))
        self.tokens[layer] += B * T


@contextmanager
def summing(model: PreTrainedModel, sums: QuerySums) -> Iterator[dict[str, Any]]:
    """Set the model's attention to one that sums queries, and set it back afterwards.

    Yields:
        Keyword arguments that a forward must be given for its queries to be summed into `sums`.
    """
    before = model.get_decoder().config._attn_implementation or "eager"
    kernel = before.removeprefix("reasonkv_") if before.startswith("reasonkv_") else before
    model.set_attn_implementation(_name(kernel if kernel in KERNELS else "sdpa"))
    try:
        yield {ARGUMENT: sums}
    finally:
        model.set_attn_implementation(before)


def _name(kernel: str) -> str:
    return f"reasonkv_calibration_{kernel}"


def _attention(kernel: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def forward(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        sums: QuerySums | None = kwargs.pop(ARGUMENT, None)
        if sums is not None:
            layer = int(module.layer_idx)  # type: ignore[arg-type]  # an int attribute, not a submodule
            sums.add(layer, query)
            if sums.horizon is not None:
                scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
                sums.horizon.add(layer, sums.rotaries[layer], query, key, scaling, sums.start)
        stock = _model_eager(module) if kernel == "eager" else ALL_ATTENTION_FUNCTIONS[kernel]
        out: tuple[Tensor, Tensor | None] = stock(module, query, key, value, attention_mask, **kwargs)
        return out

    return forward


def _model_eager(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The eager attention of the model's own file, which knows its softcap and sinks."""
    function: Callable[..., tuple[Tensor, Tensor | None]] = sys.modules[type(module).__module__].eager_attention_forward
    return function


for _kernel in KERNELS:
    AttentionInterface.register(_name(_kernel), _attention(_kernel))
    AttentionMaskInterface.register(_name(_kernel), ALL_MASK_ATTENTION_FUNCTIONS[_kernel])
