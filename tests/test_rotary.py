"""Rotations equal the models' own, can be undone exactly, and refuse what cannot be undone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import COMMON
from torch import Tensor, nn
from transformers import Gemma3TextConfig, GptOssConfig, LlamaConfig, Phi3Config, PreTrainedConfig, Qwen3Config
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.llama import modeling_llama
from transformers.models.phi3 import modeling_phi3
from transformers.models.qwen3 import modeling_qwen3

from reasonkv.rotary import Rotary, RotaryError

LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 1024,
}
GEMMA = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
LAYERS = {"head_dim": 32, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
CASES: list[tuple[PreTrainedConfig, Any, str | None]] = [
    (LlamaConfig(**COMMON), modeling_llama, None),
    (LlamaConfig(**COMMON, rope_parameters=LINEAR), modeling_llama, None),
    (LlamaConfig(**COMMON, rope_parameters=LLAMA3), modeling_llama, None),
    (LlamaConfig(**COMMON, rope_parameters=YARN), modeling_llama, None),
    (Qwen3Config(**COMMON, head_dim=32), modeling_qwen3, None),
    (Qwen3Config(**COMMON, head_dim=32, rope_parameters=YARN), modeling_qwen3, "full_attention"),
    (Gemma3TextConfig(**COMMON, **LAYERS, rope_parameters=GEMMA), modeling_gemma3, "full_attention"),
    (Gemma3TextConfig(**COMMON, **LAYERS, rope_parameters=GEMMA), modeling_gemma3, "sliding_attention"),
    (Phi3Config(**COMMON, partial_rotary_factor=0.5), modeling_phi3, None),
    (GptOssConfig(**COMMON, head_dim=32), modeling_gpt_oss, "full_attention"),
]
NAMES = [
    "llama-default", "llama-linear", "llama-llama3", "llama-yarn", "qwen3-default", "qwen3-yarn",
    "gemma3-full", "gemma3-sliding", "phi3-partial", "gpt-oss-yarn",
]  # fmt: skip


def model_rotary(config: PreTrainedConfig, module: Any, layer_type: str | None, x: Tensor, positions: Tensor) -> Tensor:
    """What the model's own rotary module and function make of `x`."""
    name = type(config).__name__.removesuffix("Config").removesuffix("Text") + "RotaryEmbedding"
    embedding: nn.Module = getattr(module, name)(config)
    cos, sin = embedding(x, positions, layer_type) if "Gemma3" in name else embedding(x, positions)
    rotated: Tensor = module.apply_rotary_pos_emb(x, x, cos, sin)[1]
    return rotated


def sample(config: PreTrainedConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    x = torch.randn(2, 3, 7, head_dim, generator=torch.Generator().manual_seed(0)).to(dtype)
    return x, torch.tensor([[0, 1, 2, 100, 1000, 2047, 4095], [5, 6, 7, 8, 9, 10, 11]])


@pytest.mark.parametrize(("config", "module", "layer_type"), CASES, ids=NAMES)
def test_rotation_equals_the_models_own(config: PreTrainedConfig, module: Any, layer_type: str | None) -> None:
    x, positions = sample(config, torch.float32)
    rotary = Rotary.from_config(config, layer_type)
    expected = model_rotary(config, module, layer_type, x, positions)
    torch.testing.assert_close(rotary.rotate(x, positions[:, None]), expected, atol=2e-6, rtol=0)
    torch.testing.assert_close(rotary.unrotate(expected, positions[:, None]), x, atol=2e-6, rtol=0)
    there = positions.flip(1)
    moved = rotary.rerotate(expected, positions[:, None], there[:, None])
    torch.testing.assert_close(moved, model_rotary(config, module, layer_type, x, there), atol=4e-6, rtol=0)


@pytest.mark.parametrize(("config", "module", "layer_type"), CASES, ids=NAMES)
def test_round_trips_are_exact_in_float64(config: PreTrainedConfig, module: Any, layer_type: str | None) -> None:
    x, positions = sample(config, torch.float64)
    positions = positions[:, None].expand(2, 3, 7) * 31  # up to 126,945
    rotary = Rotary.from_config(config, layer_type)
    rotated = rotary.rotate(x, positions)
    assert rotated.dtype == torch.float64
    torch.testing.assert_close(rotary.unrotate(rotated, positions), x, atol=1e-12, rtol=0)
    moved = rotary.rerotate(rotated, positions, positions + 12345)
    torch.testing.assert_close(moved, rotary.rotate(x, positions + 12345), atol=1e-11, rtol=0)
    back = rotary.rerotate(moved, positions + 12345, positions)
    torch.testing.assert_close(back, rotated, atol=1e-12, rtol=0)


def test_scaling_of_yarn_is_undone_and_dimensions_beyond_the_rotated_ones_pass() -> None:
    yarn = Rotary.from_config(CASES[3][0])
    x = torch.randn(1, 1, 1, 16, dtype=torch.float64)
    rotated = yarn.rotate(x, torch.tensor([9]))
    assert yarn.scaling > 1.1
    torch.testing.assert_close(rotated.norm(), x.norm() * yarn.scaling)
    partial = Rotary.from_config(CASES[8][0])
    assert torch.equal(partial.rotate(x, torch.tensor([9]))[..., 8:], x[..., 8:])


def test_low_precision_comes_back_in_its_dtype_rounded_once() -> None:
    rotary, (x, positions) = Rotary.from_config(CASES[0][0]), sample(CASES[0][0], torch.bfloat16)
    rotated = rotary.rotate(x, positions[:, None])
    assert rotated.dtype == torch.bfloat16
    assert torch.equal(rotated, rotary.rotate(x.float(), positions[:, None]).bfloat16())


def test_reading_a_config_leaves_it_as_it_was() -> None:
    config = LlamaConfig(**COMMON, rope_parameters=dict(YARN))
    before = config.to_dict()
    Rotary.from_config(config)
    assert config.to_dict() == before


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "factor": 2.0,
}


@pytest.mark.parametrize(
    ("config", "layer_type", "words"),
    [
        (
            LlamaConfig(**COMMON, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
            None,
            "'dynamic'",
        ),
        (Phi3Config(**COMMON, rope_parameters=LONGROPE, original_max_position_embeddings=512), None, "'longrope'"),
        (Gemma3TextConfig(**COMMON, **LAYERS, rope_parameters=GEMMA), None, "name one of full_attention, sliding"),
        (LlamaConfig(**COMMON, rope_parameters={**LINEAR, "rope_type": "spiral"}), None, "'spiral' is not"),
    ],
    ids=["dynamic", "longrope", "no-layer-type", "unknown"],
)
def test_what_cannot_be_right_is_refused_in_one_sentence(
    config: PreTrainedConfig, layer_type: str | None, words: str
) -> None:
    with pytest.raises(RotaryError, match=words) as caught:
        Rotary.from_config(config, layer_type)
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)
