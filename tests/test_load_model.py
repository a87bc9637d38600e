"""`load_model`: a dtype that fits the machine, offloaded weights, adapters, and a sentence for what cannot be loaded."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import peft
import pytest
import torch
from tiny import TASK, save_tiny
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel, TorchAoConfig

from reasonkv import CompressedCache, checkpoints
from reasonkv.calibration import CalibrationError, save_calibration
from reasonkv.calibration.queries import collect
from reasonkv.checkpoints import ModelError
from reasonkv.evaluate.job import BudgetOptions, ReplayJob, TraceSettings
from reasonkv.evaluate.run import run
from reasonkv.models import load_model
from reasonkv.testbed import testbed_path as bundled_folder
from tools.slot_oracle import RecordingCache


def large_model(folder: Path, dtype: torch.dtype) -> str:
    """Save a model of 20.5M parameters, nearly all of them in its embedding, with the bundled tokenizer."""
    shape = {"vocab_size": 160_000, "hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 1}
    config = LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True)
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    for file in bundled_folder().glob("token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return str(folder)


@pytest.mark.parametrize(
    ("checkpoint", "has_bfloat16", "expected"),
    [
        (torch.bfloat16, True, "bfloat16"),
        (torch.bfloat16, False, "float32"),
        (torch.float32, True, "float32"),
    ],
)
def test_auto_is_the_checkpoints_bfloat16_where_a_cpu_multiplies_in_it(
    tmp_path: Path, checkpoint: torch.dtype, has_bfloat16: bool, expected: str
) -> None:
    name = large_model(tmp_path, checkpoint)
    assert load_model(name, device="cpu", has_bfloat16=lambda: has_bfloat16).dtype == expected
    assert load_model(name, "float32", "cpu", has_bfloat16=lambda: has_bfloat16).dtype == "float32"


def test_auto_leaves_small_models_on_a_cpu_in_float32() -> None:
    assert load_model("testbed", device="cpu", has_bfloat16=lambda: True).dtype == "float32"


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the kernel's list of mapped files")
def test_weights_on_a_cpu_are_not_read_through_the_file(tmp_path: Path) -> None:
    model = load_model(large_model(tmp_path, torch.float32), device="cpu").model
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    mapped = [tuple(int(end, 16) for end in one[0].split("-")) for one in maps if one[-1].endswith(".safetensors")]
    assert not [name for name, weight in model.named_parameters()
                for start, end in mapped if start <= weight.data_ptr() < end]  # fmt: skip
    assert model.lm_head.weight is model.model.embed_tokens.weight  # still tied


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    return save_tiny(tmp_path / "model")


def generated(model: PreTrainedModel, method: str) -> tuple[list[int], list[Tensor]]:
    """What a method writes after 60 tokens, and the slots it keeps at the end."""
    ids = torch.arange(60)[None] % 50 + 5
    with CompressedCache(model, method, tokens=24, interval=8, prompt="count", sinks=2, recent=8) as cache:
        out = model.generate(ids, past_key_values=cache, max_new_tokens=40, min_new_tokens=40, do_sample=False)
        positions = [row for layer in cache.compressed_layers for row in layer.slot_positions()]
    return out[0].tolist(), positions


@pytest.mark.parametrize("method", ["cask", "triattention", "defensivekv", "quest"])
def test_offloaded_weights_change_nothing(folder: Path, method: str) -> None:
    """Every weight is on disk, so it is a meta tensor whenever its module does not run."""
    whole = load_model(str(folder), device="cpu")
    away = load_model(str(folder), device_map='{"": "disk"}')
    assert any(parameter.is_meta for parameter in away.model.parameters()) and away.hash == whole.hash
    (text, kept), (text_away, kept_away) = generated(whole.model, method), generated(away.model, method)
    assert text == text_away and all(map(torch.equal, kept, kept_away))


def test_a_replay_runs_on_an_offloaded_model(folder: Path, tmp_path: Path) -> None:
    job = ReplayJob(task=[TASK], methods=["full", "triattention"], budget=BudgetOptions(tokens=[64]), limit=2,
                    traces=TraceSettings(max_new_tokens=24))  # fmt: skip
    whole = run(job, load_model(str(folder), device="cpu"), tmp_path / "whole")
    away = run(job, load_model(str(folder), device_map='{"": "disk"}'), tmp_path / "away")
    assert [one.kl for one in whole] == [one.kl for one in away]


def test_a_lora_folder_is_its_base_model_with_the_adapter_in_its_weights(folder: Path, tmp_path: Path) -> None:
    plain = load_model(str(folder), device="cpu")
    adapted = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder),
        peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj"], init_lora_weights=False),
    ).eval()
    adapted.save_pretrained(tmp_path / "lora")
    ids = torch.arange(20)[None] + 5
    with torch.no_grad():
        expected = adapted(ids).logits
        for found in (
            load_model(str(tmp_path / "lora"), device="cpu"),  # which names its base model
            load_model(str(folder), device="cpu", adapter=str(tmp_path / "lora")),
        ):
            assert type(found.model) is type(plain.model) and found.hash != plain.hash
            torch.testing.assert_close(found.model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert (expected - plain.model(ids).logits).abs().max() > 1e-2
    with pytest.raises(CalibrationError, match=f"--model {tmp_path / 'lora'}"):  # the base model's would be wrong
        CompressedCache(load_model(str(tmp_path / "lora"), device="cpu").model, "triattention", tokens=64)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_folder_loads_is_exact_and_takes_the_calibration_of_its_base_model(
    folder: Path, tmp_path: Path, bits: int
) -> None:
    config = torchao_config(bits)
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=config).save_pretrained(tmp_path / "small")
    for file in folder.glob("token*"):
        (tmp_path / "small" / file.name).write_bytes(file.read_bytes())
    loaded = load_model(str(tmp_path / "small"), device="cpu")
    assert type(loaded.model.model.layers[0].self_attn.q_proj.weight).__module__.startswith("torchao")
    ids, seen = torch.arange(60)[None] % 50 + 5, torch.ones(1, 80, dtype=torch.long)
    limits = {"tokens": 24, "interval": 8, "prompt": "count", "sinks": 2, "recent": 8}
    for method in ("triattention", "cask:mass=none", "defensivekv"):  # the last one reads weights
        options = {"kernel": "reference", "calibration": folder / "reasonkv_calibration.safetensors"}
        with RecordingCache(loaded.model, method, mask_BL=seen, **limits, **options) as cache:
            loaded.model.generate(ids, past_key_values=cache, max_new_tokens=20, min_new_tokens=20, do_sample=False)
        assert cache.rows[0].events > 1 and cache.worst <= 1e-5  # its numbers are float32


def torchao_config(bits: int) -> TorchAoConfig:
    quantization = pytest.importorskip("torchao.quantization")
    if bits == 8:
        return TorchAoConfig(quantization.Int8WeightOnlyConfig())
    return TorchAoConfig(quantization.IntxWeightOnlyConfig(torch.int4, quantization.PerGroup(32)))


def test_an_adapter_takes_the_calibration_of_its_base_model_and_another_rotation_does_not(
    folder: Path, tmp_path: Path
) -> None:
    given = folder / "reasonkv_calibration.safetensors"
    base = AutoModelForCausalLM.from_pretrained(folder)
    save_calibration(given, collect(base, [torch.randint(5, 60, (1, 40))]))
    peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)).save_pretrained(
        tmp_path / "lora"
    )
    adapted = load_model(str(tmp_path / "lora"), device="cpu").model
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # its norms are those of the base model
        CompressedCache(adapted, "triattention", tokens=64, calibration=given).detach()
    edited(folder, "config.json", rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    with pytest.raises(CalibrationError, match=r"RoPE type|rotary frequencies"):
        CompressedCache(load_model(str(folder), device="cpu").model, "triattention", tokens=64, calibration=given)


def edited(folder: Path, name: str, **changes: object) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_cannot_be_loaded_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    lora = tmp_path / "lora"
    lora.mkdir()
    (lora / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "./gone"}')
    (tmp_path / "bad.gguf").write_bytes(b"no such format")
    for given, options, sentence in (
        (tmp_path / "none.gguf", {}, "There is no file"),
        (tmp_path / "bad.gguf", {}, "cannot be loaded"),
        (lora, {}, "The base model of the adapter .* cannot be used: There is no folder ./gone"),
        (lora, {"adapter": "x"}, "is an adapter itself"),
        (folder, {"adapter": str(lora)}, "cannot be merged"),
        (folder, {"device_map": "{model}"}, "no JSON object"),
    ):
        with pytest.raises(ModelError, match=sentence):
            load_model(str(given), device="cpu", **options)
    edited(folder, "config.json", quantization_config={"quant_method": "hqq", "quant_config": {}})
    with pytest.raises(ModelError, match=r"needs a package that is not installed here \(ImportError: .*hqq"):
        load_model(str(folder), device="cpu")


@pytest.mark.parametrize("package", ["accelerate", "gguf", "peft"])
def test_a_missing_package_is_named_with_its_extra(
    folder: Path, tmp_path: Path, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "any.gguf").touch()
    given = {"accelerate": {"device_map": "auto"}, "gguf": {}, "peft": {"adapter": "x"}}[package]
    found = checkpoints.find_spec
    monkeypatch.setattr(checkpoints, "find_spec", lambda name: None if name == package else found(name))
    with pytest.raises(ModelError, match=rf'needs the package {package}; run pip install "reasonkv\[models\]"'):
        load_model(str(tmp_path / "any.gguf" if package == "gguf" else folder), **given)
