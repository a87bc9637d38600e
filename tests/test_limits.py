"""What works around a compressed cache and what is one sentence: every row of docs/limits.md."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from models import tiny_model
from slot_views import random_view

from reasonkv import (
    Budget,
    BudgetError,
    CompressedCache,
    ReasonKVError,
    SnapKV,
    generate_with,
    get_method,
    method_names,
)
from reasonkv.methods import received
from reasonkv.runtimes.transformers import UnsupportedModelError

IDS = torch.randint(5, 200, (1, 60), generator=torch.Generator().manual_seed(0))
OPTIONS: dict[str, Any] = {"tokens": 24, "interval": 4, "recent": 8}


def with_cache(**asked: Any) -> torch.Tensor:
    model = tiny_model("llama", torch.float32)
    with CompressedCache(model, SnapKV(window=8), **OPTIONS) as cache:
        out: torch.Tensor = model.generate(IDS, past_key_values=cache, max_new_tokens=12, **asked)
    return out


def in_one_line(**asked: Any) -> torch.Tensor:
    decode = generate_with(SnapKV(window=8), **OPTIONS)
    out: torch.Tensor = tiny_model("llama", torch.float32).generate(
        IDS, custom_generate=decode, max_new_tokens=12, **asked
    )
    return out


@pytest.mark.parametrize("run", [with_cache, in_one_line])
@pytest.mark.parametrize(
    ("asked", "rows"),
    [
        ({}, 1),
        ({"do_sample": True, "num_return_sequences": 2}, 2),
        ({"num_beams": 2}, 1),
        ({"num_beams": 2, "do_sample": True}, 1),
    ],
)
def test_greedy_decoding_sampling_and_beams_work(run: Any, asked: dict[str, Any], rows: int) -> None:
    assert run(**asked).shape == (rows, 72)


@pytest.mark.parametrize("asked", [{"prompt_lookup_num_tokens": 3}, {"assistant_early_exit": 2}])
def test_assisted_decoding_is_one_sentence(asked: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError, match="cannot be rolled back"):
        with_cache(**asked)
    with pytest.raises(UnsupportedModelError, match="cannot do assisted generation"):
        in_one_line(**asked)


def test_an_assistant_is_refused_by_the_cache_and_changes_nothing_in_one_line() -> None:
    assistant = tiny_model("llama", torch.float32)
    with pytest.raises(UnsupportedModelError, match="cannot be rolled back"):
        with_cache(assistant_model=assistant)
    assert torch.equal(in_one_line(assistant_model=assistant), in_one_line())


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive search"),
        ({"dola_layers": "low"}, "dola generation"),
        ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5}, "group beam search"),
        ({"num_beams": 3, "force_words_ids": [[7]]}, "constrained beam search"),
    ],
)
def test_what_transformers_moved_to_the_hub_is_one_sentence(asked: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match="trust_remote_code"):
        with_cache(**asked)
    with pytest.raises(UnsupportedModelError, match=f"cannot do {words}"):
        in_one_line(**asked)


def test_a_static_cache_is_refused_or_ignored_and_nothing_is_compiled() -> None:
    with pytest.raises(ValueError, match="cache_implementation"):
        with_cache(cache_implementation="static")
    assert torch.equal(in_one_line(cache_implementation="static"), in_one_line())
    model = tiny_model("llama", torch.float32)
    with CompressedCache(model, SnapKV(window=8), **OPTIONS) as cache:
        assert not cache.is_compileable


def test_a_prompt_in_chunks_needs_its_length_only_where_it_cannot_be_known() -> None:
    with pytest.raises(BudgetError, match="prompt_lengths"):
        with_cache(prefill_chunk_size=30)
    assert in_one_line(prefill_chunk_size=30).shape == (1, 72)


@pytest.mark.parametrize("run", [with_cache, in_one_line])
@pytest.mark.parametrize("asked", [{"output_attentions": True, "return_dict_in_generate": True}, {"use_cache": False}])
def test_attention_weights_and_no_cache_are_one_sentence(run: Any, asked: dict[str, Any]) -> None:
    with pytest.raises(ReasonKVError):
        run(**asked)


# ------------------------------------------------------------------------------------------------------------- budgets


@pytest.mark.parametrize("tokens", [0.25, 64.0, "512", True, 0, -3, [64], float("nan"), "many", b"64"])
def test_a_budget_of_a_wrong_type_is_one_sentence(tokens: Any) -> None:
    model = tiny_model("llama", torch.float32)
    for make in (CompressedCache, lambda _, *given: generate_with(*given)):
        with pytest.raises(BudgetError, match="tokens must be a whole number of at least 1") as raised:
            make(model, SnapKV(window=8), tokens)
        assert ("keep=0.25" in str(raised.value)) == (tokens == 0.25)
    with pytest.raises(BudgetError, match="snapkv needs a budget"):
        CompressedCache(model, SnapKV(window=8), None)
    with pytest.raises(BudgetError, match="keep must be a number between 0 and 1"):
        CompressedCache(model, SnapKV(window=8), keep="half")  # type: ignore[arg-type]


def test_whole_numbers_of_numpy_and_torch_are_budgets() -> None:
    expected = Budget(64)
    assert Budget(np.int64(64)) == Budget(torch.tensor(64)) == expected  # type: ignore[arg-type]
    assert Budget(keep=np.float32(0.25)).keep == 0.25  # type: ignore[arg-type]


@pytest.mark.parametrize("tokens", [1, 2, 5, 16, 67])
def test_every_method_runs_at_a_small_budget(tokens: int) -> None:
    model = tiny_model("llama", torch.float32)
    for name in method_names():
        method = get_method(name)
        if not method.bounded or method.needs.calibration or method.needs.selects or method.needs.future:
            continue
        with CompressedCache(model, method, tokens, interval=4, prompt="count") as cache, torch.no_grad():
            model(IDS, past_key_values=cache)
            for column in range(14):
                model(IDS[:, column : column + 1], past_key_values=cache)
            assert cache.stats().rows[0].events > 0


# ------------------------------------------------------------------------------------------------ texts of one cache


def test_a_shorter_text_without_a_reset_is_one_sentence_and_works_after_it() -> None:
    model = tiny_model("llama", torch.float32)
    with CompressedCache(model, SnapKV(window=8), **OPTIONS) as cache:
        long = model.generate(IDS, past_key_values=cache, max_new_tokens=6)
        with pytest.raises(UnsupportedModelError, match=r"call cache\.reset\(\) before another text"):
            model.generate(IDS[:, :30], past_key_values=cache, max_new_tokens=6)
        more = model.generate(torch.cat([long, IDS[:, :5]], 1), past_key_values=cache, max_new_tokens=2)
        assert more.shape == (1, 73)
        cache.reset()
        assert model.generate(IDS[:, :30], past_key_values=cache, max_new_tokens=6).shape == (1, 36)


def test_a_text_past_the_models_context_warns_once() -> None:
    model = tiny_model("llama", torch.float32)
    model.config.max_position_embeddings = 64
    with CompressedCache(model, SnapKV(window=8), **OPTIONS) as cache, torch.no_grad():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(IDS, past_key_values=cache)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for column in range(9):
                model(IDS[:, column : column + 1], past_key_values=cache)
    (only,) = [str(one.message) for one in seen]
    assert "65 tokens" in only and "was made for 64" in only


# ----------------------------------------------------------------------------------------------------------- a prompt


def test_h2o_sums_a_prompts_attention_without_a_matrix_of_all_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    view, attend = random_view(1, 2, 90, group=1, queries=0), received.attend
    products: list[int] = []

    def counted(queries: torch.Tensor, keys: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        products.append(queries.shape[2] * queries.shape[3] * keys.shape[2])
        return attend(queries, keys, *rest, **options)

    monkeypatch.setattr(received, "attend", counted)
    N = view.positions_BHN.shape[-1]
    queries = torch.randn(1, 2, N, 16, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(received, "_ROWS_AT_ONCE", 8)
    found = received.received(view, queries, torch.ones(1, N, dtype=torch.bool))
    assert max(products) <= 8 * N and sum(products) < 0.6 * N * N
    logits = (queries @ view.keys_BHND.mT * view.scaling).masked_fill(torch.ones(N, N).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(found, logits.softmax(-1).sum(2), rtol=1e-5, atol=1e-5)
