"""Shared fixtures."""

from __future__ import annotations

import pytest
import torch
from browser import open_page
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

__all__ = ["open_page"]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Tests run side by side; two threads each would only fight over the cores."""
    torch.set_num_threads(1)


@pytest.fixture
def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose words are `w<id>`, for the tiny random models."""
    words = {f"w{i}": i for i in range(211)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", pad_token="w0", bos_token="w1")
