"""Tiny random models of every supported family, and the batches the tests feed them."""

from __future__ import annotations

import copy

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from reasonkv.calibration import Calibration
from reasonkv.rotary import Rotary

VOCABULARY = 211
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
HEAD = {"head_dim": 16}
MIXED = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 16,
}

CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**COMMON),
    "qwen2": Qwen2Config(**COMMON),
    "qwen3": Qwen3Config(**COMMON, **HEAD),
    "qwen3_moe": Qwen3MoeConfig(
        **COMMON, **HEAD, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, decoder_sparse_step=1
    ),
    "mistral": MistralConfig(**COMMON, **HEAD, sliding_window=None),
    "phi3": Phi3Config(**COMMON),
    "gemma3": Gemma3TextConfig(**{**COMMON, **HEAD, **MIXED}, query_pre_attn_scalar=16),
    "gpt_oss": GptOssConfig(
        **{**COMMON, **HEAD, **MIXED},
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
}


def tiny_model(family: str, dtype: torch.dtype = torch.float64, kernel: str | None = None) -> PreTrainedModel:
    """A random model of a family, the same weights every time."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[family]))
    with torch.no_grad():  # larger than the usual initialisation, so that attention is far from uniform
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed" not in name:
                parameter.normal_(std=0.07)
            elif "sinks" in name:
                parameter.normal_()
    model = model.to(dtype).eval()
    if dtype == torch.float64:
        model.set_experts_implementation("eager")  # the grouped kernel knows no float64
    if kernel is not None:
        model.set_attn_implementation(kernel)
    return model


def batch(lengths: list[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Left-padded ids [B, n], 2-D mask and position ids for rows of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.randint(5, VOCABULARY, (len(lengths), width), generator=generator)
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, width - length :] = 1
    ids = ids.masked_fill(mask == 0, 0)
    return ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)


def calibration(model: PreTrainedModel) -> Calibration:
    """Random query statistics of the right shape, the same every time."""
    config, generator = model.config, torch.Generator().manual_seed(5)
    rotary = Rotary.from_config(config, "full_attention")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = (config.num_hidden_layers, config.num_attention_heads, len(rotary.inv_freq))
    mean = torch.randn(*shape, 2, generator=generator)
    modulus = mean.norm(dim=-1) + torch.rand(shape, generator=generator)
    square = modulus**2 + torch.rand(shape, generator=generator)
    return Calibration(torch.view_as_complex(mean), modulus, square, head_dim=head_dim)
