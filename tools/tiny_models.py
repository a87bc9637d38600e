"""A tiny model of every architecture that transformers can decode with, shrunk by the names of configuration fields."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, SiglipVisionConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY, LAYERS, HEADS, WIDTH, HEAD = 211, 4, 4, 64, 16
# By size, the fields that get it wherever a configuration has them (and does not leave them empty).
SIZES: list[tuple[int, str]] = [
    (VOCABULARY, "vocab_size"),
    (WIDTH, "hidden_size d_model n_embd model_dim dim word_embed_proj_dim embedding_size linear_attn_dim lru_width "
    "attention_hidden_size hidden_size_per_layer_input_total conv_dim block_dim decoder_hidden_size"),
    (96, "intermediate_size ffn_dim n_inner dff ffn_hidden_size inner_size decoder_ffn_dim encoder_ffn_dim "
    "block_ff_dim dense_intermediate_size mlp_hidden_size"),
    (LAYERS, "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers "
    "num_encoder_layers depth"),
    (HEADS, "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
    "linear_num_value_heads linear_num_heads"),
    (2, "num_key_value_heads num_experts_per_tok num_experts_per_token moe_top_k moe_topk top_k_experts "
    "linear_num_key_heads num_codebooks swa_num_key_value_heads num_global_key_value_heads"),
    (HEAD, "head_dim attention_head_dim d_kv d_head linear_key_head_dim linear_value_head_dim qk_nope_head_dim "
    "v_head_dim mamba_d_state mamba_d_head mamba_head_dim ssm_state_size state_size global_head_dim "
    "swa_head_dim swa_v_head_dim hidden_size_per_layer_input vocab_size_per_layer_input_dim sliding_window "
    "attention_window attention_chunk_size rotary_dim_head kv_channels"),
    (8, "qk_rope_head_dim mamba_n_heads mamba_num_heads n_mamba_heads_total mamba_chunk_size chunk_size ssm_num_heads "
    "patch_size rotary_dim adapter_rank index_topk index_head_dim"),
    (32, "q_lora_rank kv_lora_rank moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size "
    "moe_ffn_hidden_size shared_intermediate_size time_step_rank mamba_dt_rank image_size num_channels_hidden "
    "index_n_heads"),
    (4, "num_experts num_local_experts n_routed_experts moe_num_experts num_routed_experts laurel_rank expert_num"),
    (1, "n_group topk_group mamba_n_groups n_groups n_shared_experts moe_num_shared_experts num_nextn_predict_layers "
    "first_k_dense_replace num_kv_shared_layers"),
    (512, "max_position_embeddings n_positions n_ctx max_seq_len"),
    (0, "pad_token_id"),
    (3, "bos_token_id eos_token_id decoder_start_token_id"),
]  # fmt: skip
BY_NAME = {name: size for size, names in SIZES for name in names.split()}
# What no rule can know: fields that depend on each other, and layers of attention where the default has none.
AXES = {
    kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 4]}
    for kind in ("full_attention", "sliding_attention")
}
MIXED = ["linear_attention", "full_attention"] * 2
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"] * 2, "rope_parameters": AXES},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8}},
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_method": "greedy"},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "ernie4_5_moe": {"moe_k": 2},
    "falcon_h1": {"mamba_d_ssm": 128},
    "glm_moe_dsa": {"indexer_types": ["full", "shared"] * 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": MIXED},
    "hunyuan_v1_dense": {"head_dim": HEAD},
    "hunyuan_v1_moe": {"head_dim": HEAD},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": HEAD, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "musicgen": {"num_codebooks": 1},
    "musicgen_melody": {"num_codebooks": 1},
    "minimax": {"block_size": 8},  # a prompt of several blocks
    "mistral": {"sliding_window": None},  # as in all releases since 0.2
    "nemotron": {"num_key_value_heads": 2},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 128},
    "zaya": {"num_experts_per_tok": 1},
}


PARTS = ("musicgen", "musicgen_melody")  # decoders of models that no configuration builds by itself


def architectures() -> list[str]:
    """Return the model types of every architecture with a causal language model head, sorted."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    """Return a small configuration of a model type, with further changes."""
    config = _model_class(model_type).config_class() if model_type in PARTS else CONFIG_MAPPING[model_type]()
    made = _shrunk(config, EXCEPTIONS.get(model_type, {}) | changes)
    if model_type == "gemma3n":  # its own tower needs a package, and text does not pass through it
        vars(made)["vision_config"] = _other_tower(made.vision_config)
    return made


def tiny_model(model_type: str, **changes: Any) -> PreTrainedModel:
    """Return a small random model in float64, with attention far from uniform; the same weights every time."""
    torch.manual_seed(0)
    config = tiny_config(model_type, **changes)
    model = _model_class(model_type)(config) if model_type in PARTS else AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed" not in name:
                parameter.normal_(std=0.07)
            elif "sinks" in name or name.endswith("temp"):  # zero by default
                parameter.normal_()
    model = model.double().eval()
    model.set_experts_implementation("eager")  # the grouped kernel knows no float64
    return model


def _other_tower(own: PreTrainedConfig) -> PreTrainedConfig:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "image_size": 8, "patch_size": 4}
    tower = SiglipVisionConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)
    for name in ("rms_norm_eps", "vocab_size", "vocab_offset"):
        setattr(tower, name, getattr(own, name))
    return tower


def _model_class(model_type: str) -> type[PreTrainedModel]:
    found: type[PreTrainedModel] = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
    return found


def _shrunk(config: PreTrainedConfig, exceptions: dict[str, Any]) -> PreTrainedConfig:
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value, size = vars(config).get(field.name), BY_NAME.get(field.name)
        if isinstance(value, PreTrainedConfig):
            changes[field.name] = _shrunk(value, {})
        elif size is not None and isinstance(value, int) and not isinstance(value, bool) and (value > 0 or size == 0):
            changes[field.name] = size
        elif field.name in ("layer_types", "layers_block_type", "mlp_layer_types") and value:
            kinds = list(dict.fromkeys(value))
            changes[field.name] = [kinds[i % len(kinds)] for i in range(LAYERS)]
        elif field.name == "is_decoder":
            changes[field.name] = True
    if "kv_lora_rank" in changes:  # latent attention has one key head for every query head
        changes["num_key_value_heads"] = HEADS
    return type(config)(**(changes | exceptions))
