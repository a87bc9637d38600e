"""The testbed: a bundled model of 1.8M parameters that solves the generated tasks."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from reasonkv.identity import TESTBED_FOLDER

__all__ = ["load_testbed", "testbed_path"]


def testbed_path() -> Path:
    """Return the folder of the bundled model, an ordinary Hugging Face model folder."""
    return TESTBED_FOLDER


def load_testbed(
    dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Return the bundled model, in evaluation mode, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(TESTBED_FOLDER, dtype=dtype).to(device)
    return model.eval(), AutoTokenizer.from_pretrained(TESTBED_FOLDER)
