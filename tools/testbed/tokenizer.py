"""The testbed's word-level tokenizer: fewer than 200 words, separated by spaces.

All five families share it. A few words are reserved, so that a later testbed model can keep the same ids.
"""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from reasonkv.tasks.base import LABELS, LETTERS
from reasonkv.tasks.options import THINK_END

_FAMILY_MARKS = ("<program>", "<recall>", "<longdoc>", "<search>", "<arithmetic>")
_SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")
_SECTIONS = ("<think>", THINK_END, "<answer>", "</answer>")
_MARKS = (*"+-*/%=;:,.?!()[]|#", "<", ">", "->")
_WORDS = ("left", "all", "from", "to", "go", "back", "path", "dead", "end", "carry", "sum", "none")
_RESERVED = tuple(f"<reserved{number}>" for number in range(8))

VOCABULARY: tuple[str, ...] = (
    _SPECIAL_TOKENS + _FAMILY_MARKS + _SECTIONS + tuple("0123456789") + LETTERS + LABELS + _MARKS + _WORDS + _RESERVED
)
PAD, BOS, EOS, UNK = range(4)


def make_tokenizer(max_length: int = 4096) -> PreTrainedTokenizerFast:
    """The tokenizer; `decode(encode(text)) == text` for every text of the task families.

    Prompts are padded on the left. Nothing is added around a text: no beginning-of-sequence token,
    and the end-of-sequence token only where training writes it.
    """
    words = {word: index for index, word in enumerate(VOCABULARY)}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
