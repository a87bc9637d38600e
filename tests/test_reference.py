"""Reference attention is what the model's own attention weights say, for every row, layer and range of queries."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from models import VOCABULARY, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from reasonkv.evaluate.chunks import TraceRow
from reasonkv.evaluate.reference import FullAttention

SHAPES = [(20, 30), (7, 12), (33, 1), (1, 61)]


def make_rows(shapes: list[tuple[int, int]], seed: int = 0) -> list[TraceRow]:
    generator = torch.Generator().manual_seed(seed)
    return [
        TraceRow(*(torch.randint(5, VOCABULARY, (count,), generator=generator) for count in shape)) for shape in shapes
    ]


def eager_weights(model: PreTrainedModel, row: TraceRow) -> list[Tensor]:
    """The model's own attention weights of a plain forward without a cache, [H, L, L] per layer, group mean."""
    ids = torch.cat([row.prompt_P, row.output_T[:-1]])
    kernel = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(ids[None], output_attentions=True).attentions
    model.set_attn_implementation(kernel)
    H = model.config.num_key_value_heads
    return [layer[0].unflatten(0, (H, -1)).mean(1) for layer in weights]


def expected(weights_HLL: Tensor, start: int, end: int, reduce: str) -> Tensor:
    part = weights_HLL[:, start:end, :end]
    if start == end:
        return part.new_zeros(part.shape[0], end).float()
    return (part.sum(1) if reduce == "sum" else part.amax(1)).float()


@pytest.mark.parametrize(
    ("family", "kernel"),
    [("llama", "sdpa"), ("qwen3", "eager"), ("qwen3", "sdpa"), ("gemma3", "sdpa"), ("gpt_oss", "eager")],
)
def test_it_equals_the_models_own_eager_attention_in_a_ragged_batch(family: str, kernel: str) -> None:
    model = tiny_model(family, torch.float32, kernel)
    rows = make_rows(SHAPES)
    reference = FullAttention.collect(model, rows)
    assert model.config._attn_implementation == kernel
    assert reference.lengths == [row.fed for row in rows]
    assert reference.layers == ([1, 3] if family in {"gemma3", "gpt_oss"} else [0, 1, 2])
    for number, row in enumerate(rows):
        weights = eager_weights(model, row)
        for layer in reference.layers:
            for start, end in ((0, row.fed), (row.fed // 2, row.fed), (3, 7), (row.fed, row.fed), (0, 1)):
                for reduce in ("sum", "max"):
                    found = reference.received(layer, number, start, end, reduce)  # type: ignore[arg-type]
                    assert found.dtype == torch.float32
                    want = expected(weights[layer], start, end, reduce)
                    torch.testing.assert_close(found, want, rtol=0, atol=1e-5)


def test_a_row_of_a_batch_equals_the_row_alone() -> None:
    model = tiny_model("qwen3")
    rows = make_rows(SHAPES)
    together = FullAttention.collect(model, rows)
    for number, row in enumerate(rows):
        alone = FullAttention.collect(model, [row])
        for layer in range(3):
            for reduce in ("sum", "max"):
                left = together.received(layer, number, 2, row.fed, reduce)  # type: ignore[arg-type]
                right = alone.received(layer, 0, 2, row.fed, reduce)  # type: ignore[arg-type]
                torch.testing.assert_close(left, right, rtol=0, atol=1e-6)


@pytest.mark.parametrize("reduce", ["sum", "max"])
def test_ranges_that_cross_remembered_blocks_equal_the_whole_matrix(reduce: str) -> None:
    model = tiny_model("llama")
    (row,) = make_rows([(150, 301)])
    reference = FullAttention.collect(model, [row])
    weights = eager_weights(model, row)
    for start, end in ((0, 450), (1, 449), (63, 64), (64, 128), (60, 200), (128, 450), (448, 450), (100, 120)):
        for layer in (0, 2):
            found = reference.received(layer, 0, start, end, reduce)  # type: ignore[arg-type]
            torch.testing.assert_close(found, expected(weights[layer], start, end, reduce), rtol=0, atol=1e-5)
    for start, end in pairwise([100, 164, 228, 230, 450]):
        found = reference.received(1, 0, start, end, reduce)  # type: ignore[arg-type]
        assert found.shape == (2, end)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected(weights[1], start, end, reduce), rtol=0, atol=1e-5)


def test_every_query_pays_one_in_all() -> None:
    model = tiny_model("qwen3")
    reference = FullAttention.collect(model, make_rows([(40, 80)]))
    torch.testing.assert_close(reference.received(0, 0, 50, 119).sum(-1), torch.full((2,), 69.0))


def test_a_long_trace_stays_within_bounds() -> None:
    """Nothing of the size of queries x keys is ever made: 2,000 tokens of three layers fit in far less."""
    model = tiny_model("qwen3", torch.float32)
    (row,) = make_rows([(100, 1901)])
    reference = FullAttention.collect(model, [row])
    largest = 0

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.untyped_storage().nbytes())
            return out

    with Largest():
        for layer in range(3):
            for start in range(128, 2000, 512):
                reference.received(layer, 0, start, 2000)
    assert largest <= 8 * 2**20
    remembered = sum(block.numel() * 4 for block in reference._blocks.values())
    assert remembered <= 3 * 32 * 2 * 2000 * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0, 0, 9), "Layer 0 is not a full-attention layer; those are [1, 3]."),
        ((1, 2, 0, 9), "There is no row 2; the reference has 1."),
        ((1, 0, 0, 99), "Row 0 has 49 tokens; 0 to 99 is no range of them."),
        ((1, 0, 9, 8), "Row 0 has 49 tokens; 9 to 8 is no range of them."),
    ],
)
def test_a_question_it_cannot_answer_is_one_sentence(arguments: tuple[int, int, int, int], message: str) -> None:
    reference = FullAttention.collect(tiny_model("gemma3"), make_rows([(20, 30)]))
    with pytest.raises(ValueError, match=r"row|Row|Layer") as caught:
        reference.received(*arguments)
    assert str(caught.value) == message
