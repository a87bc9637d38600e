"""A tiny random model with the testbed's words: what the replay and command-line tests run on."""

from __future__ import annotations

from pathlib import Path

import torch
from models import calibration
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Qwen3ForCausalLM

from reasonkv.calibration import save_calibration
from reasonkv.identity import model_hash
from reasonkv.models import LoadedModel
from tools.testbed.recipe import Recipe
from tools.testbed.tokenizer import make_tokenizer

TASK = "program:lines=12,constants=2"  # prompts of about a hundred tokens


def tiny_model(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Random weights, large enough that attention is far from uniform and dropping slots changes the output."""
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Recipe.smoke().model_config())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return model.to(dtype).eval()


def tiny_loaded(dtype: torch.dtype = torch.float32) -> LoadedModel:
    """The same as `load_model` would give it."""
    model = tiny_model(dtype)
    tokenizer: PreTrainedTokenizerBase = make_tokenizer()
    return LoadedModel("tiny", model, tokenizer, model_hash(model))


def save_tiny(folder: Path) -> Path:
    """A model folder for the command line."""
    model = tiny_model()
    model.save_pretrained(folder)
    save_calibration(folder / "reasonkv_calibration.safetensors", calibration(model))
    make_tokenizer().save_pretrained(folder)
    return folder
