"""The attention kernels that a compressed cache drives; which models it serves is `reasonkv.resolve`'s."""

from __future__ import annotations

from transformers import PreTrainedConfig

from reasonkv.resolve import UnsupportedModelError, check_model, compressed_layers, layer_types, text_config

__all__ = ["UnsupportedModelError", "base_kernel", "check_model", "compressed_layers", "layer_types", "text_config"]

KERNELS = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "reference")
"""Attention implementations a compressed cache can drive."""


def base_kernel(config: PreTrainedConfig, requested: str | None = None) -> str:
    """Return the attention kernel to drive: the requested one, or the one the model is set to.

    Raises:
        UnsupportedModelError: a kernel that cannot be driven.

    """
    current = text_config(config)._attn_implementation or "eager"
    kernel = requested or current.removeprefix("reasonkv_")
    if kernel not in KERNELS:
        raise UnsupportedModelError(
            f"A compressed cache cannot drive the attention implementation {kernel!r}; "
            f"load the model with one of {', '.join(KERNELS[:-1])}."
        )
    return kernel
