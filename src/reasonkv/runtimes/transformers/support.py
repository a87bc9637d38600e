"""Which models a compressed cache can serve, and one sentence for each reason why not."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from reasonkv.errors import ReasonKVError

TESTED = ("llama", "qwen2", "qwen3", "qwen3_moe", "mistral", "phi3", "gemma3", "gemma3_text", "gpt_oss")
"""Model types whose every layer is compared with full attention over the kept slots in the tests."""

KERNELS = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "reference")
"""Attention implementations a compressed cache can drive."""


class UnsupportedModelError(ReasonKVError, ValueError):
    """A model, setting or use that a compressed cache would get wrong; the message is one sentence."""


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The decoder's own configuration (multi-modal models nest it)."""
    return config.get_text_config(decoder=True)


def layer_types(config: PreTrainedConfig) -> list[str]:
    """The attention type of every layer, "full_attention" or "sliding_attention" for supported models."""
    decoder = text_config(config)
    declared = getattr(decoder, "layer_types", None)
    if declared is not None:
        return list(declared)
    sliding = getattr(decoder, "sliding_window", None) is not None and getattr(decoder, "use_sliding_window", True)
    return ["sliding_attention" if sliding else "full_attention"] * decoder.num_hidden_layers


def compressed_layers(config: PreTrainedConfig) -> int:
    """Layers a compressed cache bounds; the others slide and are bounded already."""
    return layer_types(config).count("full_attention")


def check_model(model: PreTrainedModel | PreTrainedConfig) -> list[str]:
    """Reasons why a compressed cache cannot serve this model, one sentence each; empty when it can."""
    config = model if isinstance(model, PreTrainedConfig) else model.config
    decoder = text_config(config)
    kind = getattr(decoder, "model_type", type(decoder).__name__)
    problems = []
    if getattr(config, "is_encoder_decoder", False):
        return [f"{kind} is an encoder-decoder; only decoder-only models keep one growing cache to bound."]
    if getattr(decoder, "kv_lora_rank", None):
        problems.append(f"{kind} uses multi-head latent attention, whose cache holds no per-head keys and values.")
    types = layer_types(config)
    unknown = sorted(set(types) - {"full_attention", "sliding_attention"})
    if unknown:
        problems.append(
            f"{kind} has layers of type {', '.join(unknown)}; only full and sliding attention can be served."
        )
    elif "full_attention" not in types:
        problems.append(
            f"All layers of {kind} use sliding-window attention, which is bounded already; use a stock cache."
        )
    if getattr(decoder, "num_kv_shared_layers", 0):
        problems.append(f"{kind} shares keys and values between layers, which per-layer eviction would break.")
    if getattr(decoder, "alibi", False) or kind in {"bloom", "mpt"}:
        problems.append(f"{kind} uses ALiBi, whose distances are lost once slots are dropped.")
    for rope_type in sorted(_rope_types(decoder) & {"dynamic", "longrope"}):
        problems.append(
            f"{kind} uses {rope_type} RoPE scaling, which rotates keys differently as the sequence grows, "
            "so kept keys would no longer match new queries."
        )
    if _has_multimodal_rope(decoder):
        problems.append(f"{kind} uses multi-axis RoPE positions (images, video); only text positions can be served.")
    if getattr(decoder, "use_bidirectional_attention", False):
        problems.append(f"{kind} attends in both directions; a cache can only be compressed under causal attention.")
    if isinstance(model, PreTrainedModel) and not getattr(model, "_supports_attention_backend", False):
        problems.append(f"{type(model).__name__} does not call attention through AttentionInterface.")
    return problems


def base_kernel(config: PreTrainedConfig, requested: str | None = None) -> str:
    """The attention kernel to drive: the requested one, or the one the model is set to.

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


def _rope_types(config: PreTrainedConfig) -> set[str]:
    found: set[str] = set()

    def visit(node: Any) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                if key in {"rope_type", "type"} and isinstance(value, str):
                    found.add(value)
                visit(value)

    visit(getattr(config, "rope_parameters", None))
    visit(getattr(config, "rope_scaling", None))
    return found


def _has_multimodal_rope(config: PreTrainedConfig) -> bool:
    nodes = [getattr(config, "rope_parameters", None), getattr(config, "rope_scaling", None)]
    return any(isinstance(node, dict) and "mrope_section" in node for node in nodes)
