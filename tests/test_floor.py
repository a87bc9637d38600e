"""The floor model counts what hand-worked sums say: parameters, bytes and operations of small configurations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen3MoeConfig

from reasonkv.errors import ReasonKVError
from reasonkv.floor import GPUS, Rates, Work, compaction, decode_step, measure_rates, prompt_tokens, shape_of

BF16 = torch.bfloat16
SMALL: dict[str, Any] = {
    "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 2,
    "intermediate_size": 16, "vocab_size": 10, "dtype": BF16, "tie_word_embeddings": False,
}  # fmt: skip
# One layer: queries and output 8 x 8 each, keys and values 8 x 4 each, three matrices of 8 x 16, two norms of 8: 592.
DENSE, HEAD = 2 * 592 + 8, 80
CACHED = 2 * 2 * 2 * 2 * 2  # bytes a token: layers, keys and values, heads, dimensions, bytes of bfloat16
PER_SLOT = 2 * 4 * (2 + 2) * 2  # operations: a multiply-add, query heads, dimensions of key and value, layers


def small(**fields: Any) -> PreTrainedConfig:
    return LlamaConfig(**SMALL | fields)


def test_parameters_are_counted_without_weights() -> None:
    shape = shape_of(small())
    assert (shape.dense, shape.head, shape.parameters) == (DENSE, HEAD, DENSE + HEAD + 80)
    assert shape_of(small(tie_word_embeddings=True)).parameters == DENSE + 80  # a tied matrix is stored once
    assert shape_of(small(tie_word_embeddings=True)).head == HEAD  # and read as the output projection


def test_a_decode_step_reads_weights_once_and_every_slot_of_every_sequence() -> None:
    step = decode_step(small(), 3, 5, BF16)
    assert step.bytes == 2 * (DENSE + HEAD) + 3 * (5 + 1) * CACHED
    assert step.operations == 3 * 2 * (DENSE + HEAD) + 3 * 5 * PER_SLOT
    assert decode_step(small(), 3, 5, torch.float32).bytes == 2 * step.bytes
    assert decode_step(shape_of(small()), 3, 5, BF16) == step


def test_fewer_kv_heads_make_a_smaller_cache_and_the_same_operations() -> None:
    every, one = (shape_of(small(num_key_value_heads=heads)) for heads in (4, 1))
    assert every.kinds[0].bytes_per_token == 4 * one.kinds[0].bytes_per_token == 2 * CACHED
    assert every.operations_per_slot == one.operations_per_slot == (PER_SLOT,)


def test_a_block_of_tokens_attends_causally() -> None:
    block = prompt_tokens(small(), 2, 4, 7, BF16)
    assert block.bytes == 2 * (DENSE + HEAD) + 2 * (7 + 4 + 4) * CACHED
    assert block.operations == 2 * 4 * 2 * (DENSE + HEAD) + 2 * (8 + 9 + 10 + 11) * PER_SLOT


@pytest.mark.parametrize("held", [0, 1, 3, 9])
def test_a_sliding_window_bounds_what_is_read(held: int) -> None:
    config = MistralConfig(**SMALL | {"sliding_window": 4})
    block = prompt_tokens(config, 1, 3, held, BF16)
    pairs = sum(min(held + number, 4) for number in (1, 2, 3))
    assert block.operations == 3 * 2 * (DENSE + HEAD) + pairs * PER_SLOT
    assert block.bytes == 2 * (DENSE + HEAD) + (min(held + 3, 4 + 2) + 3) * CACHED


def test_a_mixture_computes_with_chosen_experts_and_reads_those_that_some_token_chose() -> None:
    config = Qwen3MoeConfig(**SMALL | {"num_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 3})
    shape = shape_of(config)
    assert shape.experts == 2 * 4 * 3 * 8 * 3 and shape.active == 0.25
    assert shape.active_parameters == shape.dense + shape.head + shape.experts / 4
    assert shape.weights_read(1) == shape.active_parameters
    assert shape.weights_read(2) == shape.dense + shape.head + shape.experts * (1 - 0.75**2)
    step = decode_step(config, 2, 1, BF16)
    assert step.operations == 2 * 2 * shape.active_parameters + 2 * PER_SLOT


def test_a_compaction_reads_and_writes_what_stays() -> None:
    assert compaction(small(), 3, 9, 5, BF16) == Work(2 * 3 * 5 * CACHED)
    assert compaction(small(), 3, 5, 5, BF16) == Work(0)


def test_the_slower_of_moving_and_computing_is_the_floor() -> None:
    assert Work(6, 10).seconds(Rates(2, 5)) == 3
    assert Work(6, 20).seconds(Rates(2, 5)) == 4


def test_this_machine_has_rates_and_a_data_sheet_has_peaks() -> None:
    found = measure_rates(torch.float32)
    assert found.bytes_per_second > 1e8 and found.operations_per_second > 1e8
    assert all(one.memory > 1e10 and one.bytes_per_second > 1e11 < one.operations_per_second for one in GPUS.values())


@pytest.mark.parametrize(
    ("work", "words"),
    [
        (lambda: decode_step(small(), 0, 5, BF16), "batch must be at least 1, not 0"),
        (lambda: decode_step(small(), 1, 0, BF16), "slots must be at least 1, not 0"),
        (lambda: prompt_tokens(small(), 1, 0, 5, BF16), "tokens must be at least 1, not 0"),
        (lambda: compaction(small(), 1, 4, 5, BF16), "cannot keep 5 of 4 slots"),
    ],
)
def test_impossible_amounts_are_one_sentence(work: Any, words: str) -> None:
    with pytest.raises(ReasonKVError, match=words):
        work()
