"""The testbed: a small model that really reasons, bundled with the package."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from .evaluation import evaluate_model
from .recipe import Course, Recipe, Stage
from .training import TrainingError, TrainingResult, train

__all__ = [
    "Course",
    "Recipe",
    "Stage",
    "TrainingError",
    "TrainingResult",
    "evaluate_model",
    "load_testbed",
    "testbed_path",
    "train",
]


def testbed_path() -> Path:
    """The folder of the bundled model: an ordinary Hugging Face model folder."""
    return Path(__file__).parent / "model"


def load_testbed(
    dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The bundled model, in evaluation mode, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(testbed_path(), dtype=dtype).to(device)
    return model.eval(), AutoTokenizer.from_pretrained(testbed_path())
