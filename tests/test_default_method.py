"""The method that serves a model whose user names none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import calibration, tiny_model
from transformers import GPT2Config, GPT2LMHeadModel, GPTJConfig, GPTJForCausalLM

from reasonkv import BudgetError, CompressedCache, generate_with
from reasonkv.calibration import CalibrationError, default_method, save_calibration


def test_a_budget_alone_takes_forecast_where_it_was_fitted_and_expected_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REASONKV_CACHE", str(tmp_path / "none"))
    model = tiny_model("qwen3", torch.float32)
    fitted, ids = calibration(model), torch.randint(5, 200, (1, 60))
    assert fitted.forecast is not None
    file = tmp_path / "stats.safetensors"
    save_calibration(file, fitted)
    for statistics, name in ((None, "expected"), (fitted, "forecast"), (file, "forecast")):
        with CompressedCache(model, tokens=32, interval=8, calibration=statistics) as cache:
            own = model.generate(ids, max_new_tokens=60, past_key_values=cache)
            assert cache.method.name == name and cache.rows[0].events > 0
        decode_with = generate_with(tokens=32, interval=8, calibration=statistics)
        assert torch.equal(model.generate(ids, max_new_tokens=60, custom_generate=decode_with), own)
    with CompressedCache(model) as cache:
        assert cache.method.name == "full"
    with pytest.raises(BudgetError, match="twice"):
        CompressedCache(model, budget=64, tokens=32)


def test_a_file_that_is_given_is_not_passed_over(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="There is no"):
        CompressedCache(tiny_model("llama"), tokens=64, calibration=tmp_path / "missing.safetensors")


def test_a_model_that_shows_no_queries_takes_one_that_reads_none() -> None:
    config = GPTJConfig(vocab_size=200, n_positions=256, n_embd=32, n_layer=2, n_head=2, rotary_dim=8)
    model = GPTJForCausalLM(config).eval()
    with CompressedCache(model, tokens=32, interval=8) as cache, torch.no_grad():
        model(torch.randint(5, 200, (1, 60)), past_key_values=cache)
        assert cache.method.name == "random"


def test_a_model_without_rotary_positions_has_a_default_too() -> None:
    config = GPT2Config(vocab_size=200, n_positions=256, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    with CompressedCache(model, tokens=32, interval=8) as cache, torch.no_grad():
        model(torch.randint(5, 200, (1, 60)), past_key_values=cache)
        assert cache.method == default_method(model) and cache.rows[0].events == 0
        for token in range(60):
            model(torch.tensor([[5 + token]]), past_key_values=cache)
        assert cache.rows[0].events > 0
