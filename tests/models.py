"""Tiny random models of every supported family, and the batches the tests feed them."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from transformers import (
    AutoModelForCausalLM,
    AXK1Config,
    CohereConfig,
    DeepseekV2Config,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    Gemma4TextConfig,
    Glm4Config,
    Glm4MoeLiteConfig,
    GptOssConfig,
    LlamaConfig,
    LongcatFlashConfig,
    MiniCPM3Config,
    Mistral4Config,
    Mistral4ForCausalLM,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    YoutuConfig,
)

from reasonkv.calibration import Calibration
from reasonkv.network import FORECAST_FEATURES, Network
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
SHARED = {  # the last two layers read the keys and values of the two before
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "sliding_window": 16,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
}
LATENT = {
    **COMMON,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 22,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 10,
}
LATENT_YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 1024,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
EXPERTS = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
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
    "gemma2": Gemma2Config(**{**COMMON, **HEAD, **MIXED}, query_pre_attn_scalar=16, attn_logit_softcapping=2.0),
    "gemma3n": Gemma3nTextConfig(
        **{**COMMON, **HEAD, **SHARED, "intermediate_size": [96] * 6},
        activation_sparsity_pattern=[0.0] * 6,
        altup_num_inputs=2,
        laurel_rank=8,
    ),
    "gemma4": Gemma4TextConfig(**{**COMMON, **HEAD, **SHARED}, global_head_dim=32),
    "glm4": Glm4Config(**COMMON, **HEAD, partial_rotary_factor=0.5),
    "cohere": CohereConfig(**COMMON),
    "deepseek_v2": DeepseekV2Config(**LATENT, **EXPERTS, topk_method="greedy"),
    "deepseek_v3": DeepseekV3Config(**LATENT, **EXPERTS, rope_parameters=LATENT_YARN),
    "glm4_moe_lite": Glm4MoeLiteConfig(**LATENT, **EXPERTS),
    "axk1": AXK1Config(**LATENT, **EXPERTS),
    "youtu": YoutuConfig(**LATENT),
    "minicpm3": MiniCPM3Config(**LATENT),
    "mistral4": Mistral4Config(
        **LATENT,
        **EXPERTS,
        rope_parameters={**LATENT_YARN, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 32},
    ),
    "longcat_flash": LongcatFlashConfig(
        **{name: value for name, value in LATENT.items() if name not in {"num_hidden_layers", "intermediate_size"}},
        num_layers=2,
        head_dim=8,
        n_routed_experts=4,
        moe_topk=2,
        zero_expert_num=1,
        ffn_hidden_size=64,
        expert_ffn_hidden_size=32,
    ),
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
    config = copy.deepcopy(CONFIGS[family])
    own = family == "mistral4"  # transformers lists it among models of images
    model = Mistral4ForCausalLM(config) if own else AutoModelForCausalLM.from_config(config)
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
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    network = Network.fresh(config.num_hidden_layers, heads, head_dim + FORECAST_FEATURES, 4, seed=6)
    network = replace(network, out_HU=torch.randn(network.out_HU.shape, generator=generator))
    return Calibration(torch.view_as_complex(mean), modulus, square, head_dim=head_dim, forecast=network)
