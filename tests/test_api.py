"""The public API: budgets as keywords, generation in one line, honest words about memory, and its types."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import batch, tiny_model
from transformers import PreTrainedModel, PreTrainedTokenizerFast, pipeline

import reasonkv
from reasonkv import (
    Budget,
    BudgetError,
    CompressedCache,
    MethodError,
    SnapKV,
    UnsupportedModelError,
    Window,
    generate_with,
)
from reasonkv.methods.catalogue import CATALOGUE

USER = """
from typing import assert_type

import reasonkv
from reasonkv import CASK, RKV, Budget, CompressedCache, Method, SnapKV, StreamingLLM, Window, generate_with, get_method


def use(model: object) -> None:
    method = SnapKV(window=16)
    assert_type(method.window, int)
    cache = CompressedCache(model, method, tokens=512, interval=64, prompt="count", seed=1)
    stats = cache.stats()
    assert_type(stats.rows[0].length, int)
    assert_type(stats.bytes_in_use, int)
    CompressedCache(model, RKV(), keep=0.25).detach()
    CompressedCache(model, "snapkv:window=16", Budget(512, recent=16))
    CompressedCache(model, CASK(), Window(512))
    assert_type(get_method("streaming"), Method)
    decode = generate_with(StreamingLLM(), tokens=512, seed=3)
    assert decode.stats is None or decode.stats.rows
    raise reasonkv.ReasonKVError("typed")
"""
MISTAKES = {
    "CompressedCache(None, SnapKV(), tokens='512')": "arg-type",
    "CompressedCache(None, SnapKV(), tokns=512)": "call-arg",
    "generate_with(SnapKV(), prompt='none')": "arg-type",
    "SnapKV(windw=3)": "call-arg",
    "reasonkv.NoMethod()": "attr-defined",
}


def mypy(folder: Path, source: str) -> str:
    """What strict mypy says about a user's file, with this package's sources followed."""
    (folder / "mypy.ini").write_text(
        "[mypy]\nstrict = true\n"
        "[mypy-transformers.*,torch.*,numpy.*,safetensors.*]\nfollow_imports = skip\nignore_missing_imports = true\n"
        "[mypy-reasonkv.*]\nignore_errors = true\n"
    )
    (folder / "user.py").write_text(source)
    ran = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--cache-dir", "cache", "user.py"],
        cwd=folder, capture_output=True, text=True, env={"MYPYPATH": str(Path(reasonkv.__file__).parents[1]), "PATH": ""},
    )  # fmt: skip
    return ran.stdout + ran.stderr


def test_a_users_file_is_typed_and_mistakes_in_it_are_found(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    said = mypy(tmp_path, USER + "".join(f"\n{line}" for line in MISTAKES))
    first = USER.count("\n") + 2
    for number, (line, kind) in enumerate(MISTAKES.items()):
        assert f"user.py:{first + number}: error:" in said and f"[{kind}]" in said, (line, said)
    assert said.count("error:") == len(MISTAKES), said


def test_every_method_is_exported_under_its_class_name() -> None:
    for name, entry in CATALOGUE.items():
        found = getattr(reasonkv, entry.path.split(":")[1])
        assert found.name == name
        assert found.__name__ in reasonkv.__all__ and found.__name__ in dir(reasonkv)
    with pytest.raises(AttributeError, match="NoMethod"):
        _ = reasonkv.NoMethod


def test_import_brings_no_torch() -> None:
    code = "import sys, reasonkv; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def decode(model: PreTrainedModel, ids: torch.Tensor, new: int = 60, **options: object) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False,
            pad_token_id=0, **options,
        )  # type: ignore[misc,operator]  # fmt: skip
    return out


def test_keywords_make_the_budget_that_budget_makes() -> None:
    model = tiny_model("qwen3", torch.float32)
    for fields, expected in (
        ({"tokens": 96, "interval": 8, "prompt": "count"}, Budget(96, interval=8, prompt="count")),
        ({"keep": 0.5}, Budget(keep=0.5)),
        ({"budget": 96, "sinks": 1}, Budget(96, sinks=1)),
        ({"budget": Window(256)}, Window(256)),
        ({"budget": Budget(96)}, Budget(96)),
    ):
        with CompressedCache(model, "random", **fields) as cache:  # type: ignore[arg-type]
            assert cache.budget == expected
    assert Budget(96).prompt == "on_top"
    for wrong, words in (
        ({"budget": Budget(96), "interval": 8}, "given twice"),
        ({"budget": 96, "tokens": 8}, "given twice"),
        ({"budget": 0.5}, "give keep=0.5"),
        ({}, "needs a budget, such as tokens=512 or keep=0.25"),
    ):
        with pytest.raises(BudgetError, match=words) as error:
            CompressedCache(model, "random", **wrong)  # type: ignore[arg-type]
        assert "\n" not in str(error.value)
    for arguments in ((model, 5), (model, SnapKV)):
        with pytest.raises(MethodError, match=r"A method is a name such as 'snapkv' or an object such as SnapKV"):
            CompressedCache(*arguments, 96)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModelError, match="give the model itself, not 'Qwen/Qwen3-4B'"):
        CompressedCache("Qwen/Qwen3-4B", "random", 96)  # type: ignore[arg-type]
    for wrong in ({"seed": "a"}, {"max_length": 0.5}, {"prompt_lengths": ["7"]}, {"row_seeds": 3.0}):
        with pytest.raises(BudgetError, match=f"{next(iter(wrong))} must be "):
            CompressedCache(model, "random", 96, **wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="'tokns'"):
        CompressedCache(model, "random", tokns=5)  # type: ignore[call-arg]


def test_a_default_window_shrinks_with_the_budget_and_a_set_one_must_fit() -> None:
    model = tiny_model("qwen3", torch.float32)
    ids, _, _ = batch([20])
    for name in ("snapkv", "adakv", "chunkkv", "pyramidkv", "vase-attnv", "random-attention"):
        with CompressedCache(model, name, tokens=16, interval=8) as cache:
            decode(model, ids, past_key_values=cache)
            row = cache.stats().rows[0]
            assert row.events > 3 and row.physical_terminal < 20 + 16 + 8
            assert cache.method.needs.recent == 8
    with pytest.raises(BudgetError, match="cannot hold 4 sinks and 63 recent tokens"):
        CompressedCache(model, SnapKV(window=63), tokens=64)


@pytest.mark.parametrize("method", ["quest", "seer", "pyramidkv"])
def test_methods_that_cannot_keep_a_share_say_so(method: str) -> None:
    with pytest.raises((BudgetError, MethodError), match="cannot keep a share of the length; give it tokens"):
        generate_with(method, keep=0.25)


def test_a_share_grows_with_the_text_and_never_beyond_what_it_is_allowed() -> None:
    model = tiny_model("qwen3", torch.float32)
    ids, _, _ = batch([100])
    for options in ({}, {"max_length": 500}):
        with CompressedCache(model, "keydiff", keep=0.25, interval=16, recent=8, prompt="count", **options) as cache:  # type: ignore[arg-type]
            decode(model, ids, 400, past_key_values=cache)
            row, storage = cache.stats().rows[0], cache.compressed_layers[0].storage
            assert row.length == 499 and row.events > 10
            assert 499 // 4 - 4 <= row.physical_terminal < 499 // 4 + 16
            assert storage is not None and storage.allocated >= row.physical_terminal
            if options:
                assert storage.allocated == 500 // 4 + 16


def test_generate_with_decodes_what_a_cache_decodes() -> None:
    model = tiny_model("qwen3", torch.float32)
    ids, _, _ = batch([20])
    with CompressedCache(model, SnapKV(window=6), tokens=24, interval=8) as cache:
        expected = decode(model, ids, past_key_values=cache)
    for size in ({"tokens": 24, "interval": 8}, {"budget": Budget(24, interval=8)}):
        custom = generate_with(SnapKV(window=6), **size)  # type: ignore[arg-type]
        assert custom.stats is None
        assert torch.equal(decode(model, ids, custom_generate=custom), expected)
        assert custom.stats is not None and custom.stats.rows[0].events > 3
    assert model.config._attn_implementation == "sdpa", "the model is given back"
    with pytest.raises(BudgetError, match="whole number"):
        generate_with(SnapKV(), tokens="512")  # type: ignore[arg-type]
    with pytest.raises(MethodError):
        generate_with("oracle", tokens=512)


def test_generate_with_works_through_a_pipeline(word_tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model("qwen3", torch.float32)
    make = pipeline("text-generation", model=model, tokenizer=word_tokenizer)
    prompt, options = " ".join(f"w{i}" for i in range(5, 25)), {"max_new_tokens": 40, "min_new_tokens": 40}
    custom = generate_with("keydiff", tokens=16, interval=8)
    text = make(prompt, custom_generate=custom, do_sample=False, **options)[0]["generated_text"]
    assert text.startswith(prompt) and len(text) > len(prompt)
    assert custom.stats is not None
    row = custom.stats.rows[0]
    assert row.length == row.prompt + 39 and row.events > 1


def test_repr_tells_lengths_compactions_and_two_numbers_of_bytes() -> None:
    model = tiny_model("qwen3", torch.float32)
    ids, mask, _ = batch([50, 20])
    with CompressedCache(model, "keydiff", tokens=24, interval=8, recent=4, prompt="count") as cache:
        assert repr(cache) == "CompressedCache(keydiff, 24 tokens: empty)"
        with torch.no_grad():
            model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=60, min_new_tokens=60)
        stats = cache.stats()
        slot = 3 * 2 * ((16 + 16) * 4 + 4)  # layers, KV heads, key and value and token index
        assert stats.bytes_in_use == (27 + 31) * slot
        assert stats.bytes_allocated == 2 * 32 * 3 * 2 * (16 + 16) * 4
        assert stats.bytes_in_use <= stats.bytes_allocated + stats.bytes_beside
        said = repr(cache)
        assert "tokens seen 109 and 79, tokens kept 27 and 31, compactions 8 and 6, in use" in said
        assert len(said) < 200 and "\n" not in said
        assert "<td>109 and 79</td>" in cache._repr_html_()
        cache.batch_repeat_interleave(3)
        assert "tokens seen 79 to 109 in 6 sequences" in repr(cache)


def test_storage_grows_in_a_few_steps_and_not_after_the_first_compaction() -> None:
    model = tiny_model("qwen3", torch.float32)
    ids, _, _ = batch([20])
    sizes: dict[int, int] = {}
    with torch.no_grad(), CompressedCache(model, "keydiff", tokens=600, interval=64, prompt="count") as cache:
        for step in range(850):
            model(ids[:, step % 20, None], past_key_values=cache)
            storage = cache.compressed_layers[0].storage
            assert storage is not None
            sizes.setdefault(storage.allocated, step)
            if step == 50:
                assert storage.allocated == 256, "a short answer allocates little"
        assert list(sizes) == [256, 514, 664]
        assert cache.rows[0].events > 2
    budget = {"tokens": 100, "interval": 50, "trigger": "grid", "prompt": "count"}
    with torch.no_grad(), CompressedCache(model, "keydiff", **budget) as cache:  # type: ignore[arg-type]
        addresses = set()
        for step in range(300):
            model(ids[:, step % 20, None], past_key_values=cache)
            storage = cache.compressed_layers[0].storage
            if cache.rows[0].events and storage is not None:
                addresses.add((storage.keys.data_ptr(), storage.values.data_ptr(), storage.allocated))
        assert len(addresses) == 1, "everything is allocated at the first compaction"
