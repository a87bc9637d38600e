"""How calibration and gate training get at a model's queries: an attention function that shows them and then attends.

There are two public ways to the queries. Forward hooks see the output of `q_proj`, `q_norm` or a fused `qkv_proj`, and
must know for each model family which of them comes last, how its output is laid out and what the attention module still
does to it; where that knowledge is wrong they return wrong numbers silently. The attention function that transformers
lets anyone register is given the very queries the layer attends with, in one layout for every family. Only the rotation
has to be undone, which is exact because positions are known. This file takes the second way.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from reasonkv.offload import input_device
from reasonkv.rotary import Rotary

Watch = Callable[[int, Tensor, Tensor, dict[str, Any]], None]
"""Called with a layer's index, its rotated queries [B, Hq, T, D] and keys [B, H, L, D], and its attention's options."""

KERNELS = ("sdpa", "eager", "flash_attention_2", "flash_attention_3")
_ARGUMENT, _PREFIX = "reasonkv_watch", "reasonkv_watched_"


@contextmanager
def watched(model: PreTrainedModel, watch: Watch) -> Iterator[dict[str, Any]]:
    """Set the model's attention to one that shows queries and keys, and set it back afterwards.

    Yields:
        Keyword arguments that a forward must be given for `watch` to be called in every layer.
    """
    before = model.get_decoder().config._attn_implementation or "eager"
    kernel = before.removeprefix("reasonkv_")
    model.set_attn_implementation(_PREFIX + (kernel if kernel in KERNELS else "sdpa"))
    try:
        yield {_ARGUMENT: watch}
    finally:
        model.set_attn_implementation(before)


def rotaries(model: PreTrainedModel) -> list[tuple[str, Rotary]]:
    """Return the attention type and the rotation of every layer.

    Raises:
        UnsupportedModelError: a model that no compressed cache can serve.
        RotaryError: RoPE that cannot be undone.
    """
    from reasonkv.resolve import UnsupportedModelError, check_model, layer_types

    problems = check_model(model)
    if problems:
        raise UnsupportedModelError(problems[0])
    types = layer_types(model.config)
    by_type = {one: Rotary.from_config(model.config, one).to(input_device(model)) for one in dict.fromkeys(types)}
    return [(one, by_type[one]) for one in types]


def _attention(kernel: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def forward(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        watch: Watch | None = kwargs.pop(_ARGUMENT, None)
        if watch is not None:
            watch(int(module.layer_idx), query, key, kwargs)  # type: ignore[arg-type]  # an int, not a submodule
        # the eager attention of the model's own file knows its softcap and sinks
        own = sys.modules[type(module).__module__]
        stock = own.eager_attention_forward if kernel == "eager" else ALL_ATTENTION_FUNCTIONS[kernel]
        out: tuple[Tensor, Tensor | None] = stock(module, query, key, value, attention_mask, **kwargs)
        return out

    return forward


for _kernel in KERNELS:
    AttentionInterface.register(_PREFIX + _kernel, _attention(_kernel))
    AttentionMaskInterface.register(_PREFIX + _kernel, ALL_MASK_ATTENTION_FUNCTIONS[_kernel])
