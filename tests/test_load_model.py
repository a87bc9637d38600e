"""`load_model` chooses a dtype that fits the machine, and never another one for the bundled model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from reasonkv.models import load_model
from reasonkv.testbed import testbed_path


def large_model(folder: Path, dtype: torch.dtype) -> str:
    """Save a model of 20.5M parameters, nearly all of them in its embedding, with the bundled tokenizer."""
    shape = {"vocab_size": 160_000, "hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 1}
    config = LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True)
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    for file in testbed_path().glob("token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return str(folder)


@pytest.mark.parametrize(
    ("checkpoint", "has_bfloat16", "expected"),
    [
        (torch.bfloat16, True, "bfloat16"),
        (torch.bfloat16, False, "float32"),
        (torch.float32, True, "float32"),
    ],
)
def test_auto_is_the_checkpoints_bfloat16_where_a_cpu_multiplies_in_it(
    tmp_path: Path, checkpoint: torch.dtype, has_bfloat16: bool, expected: str
) -> None:
    name = large_model(tmp_path, checkpoint)
    assert load_model(name, device="cpu", has_bfloat16=lambda: has_bfloat16).dtype == expected
    assert load_model(name, "float32", "cpu", has_bfloat16=lambda: has_bfloat16).dtype == "float32"


def test_auto_leaves_small_models_on_a_cpu_in_float32() -> None:
    assert load_model("testbed", device="cpu", has_bfloat16=lambda: True).dtype == "float32"
