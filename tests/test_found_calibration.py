"""Where a model's calibration is found: its own, that of the model it was made from, and what comes with the package."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import batch, tiny_model

from reasonkv.calibration import (
    CalibrationError,
    cached_calibration,
    collect,
    files,
    find_calibration,
    load_calibration,
    save_calibration,
)
from reasonkv.identity import model_hash


def test_a_calibration_serves_adapted_and_quantised_forms_of_its_model_and_no_other_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setenv("REASONKV_CACHE", str(tmp_path))
    monkeypatch.setattr(files, "SHIPPED", tmp_path / "shipped")
    model = tiny_model("qwen3")
    found = collect(model, [batch([37, 37])[0]], name="base")
    assert found.model is not None
    cached = cached_calibration(found.model)
    save_calibration(cached, found)
    with torch.no_grad():  # as an adapter or a quantisation does
        model.model.layers[1].self_attn.q_proj.weight.mul_(1.01)
    assert find_calibration(model).digest == found.digest
    assert not recwarn.list
    cached.rename(tmp_path / "old.safetensors")
    save_calibration(cached, replace(found, norms=None))  # of a file that cannot tell
    with pytest.warns(UserWarning, match=r"other weights of the same shapes \(base\)"):
        assert find_calibration(model).digest == found.digest
    cached.unlink()
    save_calibration(tmp_path / "shipped" / "base.safetensors", replace(found, norms=None))
    with pytest.raises(CalibrationError, match="no calibration for this model"):
        find_calibration(model)  # what comes with the package must be the model's for certain
    save_calibration(tmp_path / "shipped" / "base.safetensors", found)
    assert find_calibration(model).digest == found.digest
    with torch.no_grad():  # another model
        model.model.layers[1].input_layernorm.weight.mul_(1.2)
    with pytest.raises(CalibrationError, match="no calibration for this model"):
        find_calibration(model)
    with pytest.warns(UserWarning, match=r"other weights of the same shapes \(base\)"):
        find_calibration(model, tmp_path / "old.safetensors")
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight.div_(1.2)
    model.config.rope_parameters["rope_theta"] = 5e5
    with pytest.raises(CalibrationError, match="no calibration for this model"):
        find_calibration(model)
    old = replace(found, frequencies=None)  # cannot tell what differs
    with pytest.raises(CalibrationError, match=f"hash is {found.model}, but this model's is {model_hash(model)}"):
        old.check(tiny_model("qwen3").config, model_hash(model))


def test_what_comes_with_the_package_is_whole_and_under_its_models_name() -> None:
    shipped = sorted(files.SHIPPED.iterdir())
    assert shipped
    for path in shipped:
        found = load_calibration(path)
        assert found.name is not None and files.shipped_for(found.name) == path
        assert found.forecast is not None and found.forecast.inputs == found.head_dim + 3  # sees no queries
        assert found.norms is not None and found.frequencies and found.verified
        assert found.source is not None and "benchmarks/questions.yaml" in found.source and "seed 5" in found.source
    assert sum(path.stat().st_size for path in shipped) < 2e6
    assert files.shipped_for("some/other-model") is None
