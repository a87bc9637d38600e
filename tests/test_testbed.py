"""What the testbed promises: a tokenizer that loses nothing, training that survives a kill, and a
bundled model that really solves its tasks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM

from reasonkv import testbed
from reasonkv.tasks import get_task, task_names
from reasonkv.testbed import load_testbed
from tools.testbed import training as training_module
from tools.testbed.__main__ import app
from tools.testbed.attention import training_attention
from tools.testbed.data import make_batch
from tools.testbed.evaluation import evaluate_model, generate
from tools.testbed.initial import initialise
from tools.testbed.recipe import Recipe
from tools.testbed.tokenizer import EOS, UNK, VOCABULARY, make_tokenizer
from tools.testbed.training import Progress, TrainingError, train

FAMILIES = task_names()
COURSES = list(Recipe.bundled().courses)
ALL_SPECS = [
    *task_names(),
    "recall:where=prompt",
    "longdoc:mode=passage",
    "arithmetic:operation=add,digits=80",
    "search:nodes=48,extra=100",
]


@pytest.mark.parametrize("spec", ALL_SPECS)
def test_tokenizer_round_trips_every_task_text_without_unknown_words(spec: str) -> None:
    tokenizer = make_tokenizer()
    for split in ("test", "train"):
        for example in range(50):
            problem = get_task(spec).problem(example, split=split)
            for text in (problem.prompt, problem.trace, problem.answer):
                ids = tokenizer(text, add_special_tokens=False)["input_ids"]
                assert UNK not in ids
                assert len(ids) == len(text.split())
                assert tokenizer.decode(ids) == text


def test_vocabulary_is_small_and_has_room_for_the_families_to_come() -> None:
    assert len(VOCABULARY) == len(set(VOCABULARY)) < 200
    assert {"<search>", "<arithmetic>", "<think>", "</think>"} <= set(VOCABULARY)
    tokenizer = make_tokenizer()
    assert tokenizer.padding_side == "left"
    assert tokenizer.convert_ids_to_tokens(list(range(len(VOCABULARY)))) == list(VOCABULARY)


def test_special_tokens_can_be_stripped_and_the_answer_still_be_read() -> None:
    tokenizer = make_tokenizer()
    task = get_task("program")
    problem = task.problem(0)
    ids = [*tokenizer(problem.trace, add_special_tokens=False)["input_ids"], EOS, 0, 0]
    assert task.check(problem, tokenizer.decode(ids))
    assert task.check(problem, tokenizer.decode(ids, skip_special_tokens=True))


@pytest.mark.parametrize("family", COURSES)
def test_a_batch_predicts_exactly_the_trace_and_the_end(family: str) -> None:
    recipe = Recipe.bundled()
    batch = make_batch(recipe, family, step=7, stage=0)
    rows, length = batch.ids.shape
    assert torch.equal(batch.ids.flatten()[batch.at + 1], batch.targets)
    assert len(batch.kinds) == len(batch.targets)
    assert (batch.targets == EOS).sum() == rows
    think = VOCABULARY.index("<think>")
    starts = [int((row == think).nonzero()[0, 0]) for row in batch.ids]
    first = torch.stack([batch.at[batch.at // length == row][0] % length for row in range(rows)])
    assert first.tolist() == starts
    again = make_batch(recipe, family, step=7, stage=0)
    assert torch.equal(batch.ids, again.ids)
    assert not torch.equal(batch.ids[0, :40], make_batch(recipe, family, 8, 0).ids[0, :40])


def test_every_family_has_courses_whose_stages_its_dials_allow() -> None:
    courses = Recipe.bundled().courses
    assert {name.partition("/")[0] for name in courses} == set(task_names())
    for name, course in courses.items():
        assert course.every >= 1
        for stage in range(len(course.stages)):
            batch = make_batch(Recipe.bundled(), name, step=1, stage=stage)
            assert batch.ids.shape[1] <= 4096
            assert batch.ids.shape[0] == 1 or batch.ids.numel() <= course.stages[stage].tokens


def test_training_problems_are_never_test_problems() -> None:
    recipe = Recipe.smoke()
    tokenizer = make_tokenizer()
    tested = {get_task("program:lines=4,constants=2").problem(i).prompt for i in range(200)}
    for step in range(20):
        for row in make_batch(recipe, "program", step, 0).ids:
            text = tokenizer.decode(row)
            assert text.split(" <think>")[0] + " <think>" not in tested


@pytest.mark.parametrize("length", [7, 256, 300, 1000])
def test_training_attention_is_causal_attention(length: int) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, length, 16, dtype=torch.float64) for heads in (4, 2, 2))
    ours, _ = training_attention(torch.nn.Identity(), query, key, value, None, scaling=0.25)
    stock = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=0.25, enable_gqa=True
    )
    assert torch.allclose(ours, stock.transpose(1, 2), atol=1e-12)


def test_first_heads_start_out_looking_back_one_two_three_and_four_tokens() -> None:
    torch.manual_seed(0)
    config = Recipe.bundled().model_config()
    config._attn_implementation = "eager"
    model = Qwen3ForCausalLM(config)
    initialise(model)
    ids = torch.randint(4, len(VOCABULARY), (1, 2000))
    weights_HTT = model(ids, output_attentions=True).attentions[0][0]
    for head in range(4):
        assert torch.diagonal(weights_HTT[head], -(head + 1)).min() > 0.95


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


def log_of(folder: Path) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def test_a_killed_run_resumes_to_the_same_weights_and_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(Recipe.smoke(), tmp_path / "whole")
    steps = 0
    real_step = training_module._step

    def step_then_die(*arguments: object) -> None:
        nonlocal steps
        steps += 1
        if steps == 7:  # three steps past the checkpoint at 4
            raise KeyboardInterrupt
        real_step(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(training_module, "_step", step_then_die)
    with pytest.raises(KeyboardInterrupt):
        train(Recipe.smoke(), tmp_path / "killed")
    monkeypatch.setattr(training_module, "_step", real_step)
    with (tmp_path / "killed" / "training_log.jsonl").open("a") as log:
        log.write('{"step": 6, "tok')  # a kill in the middle of a line
    (tmp_path / "killed" / ".step-000008.tmp").mkdir()  # and one in the middle of a checkpoint
    resumed = train(Recipe.smoke(), tmp_path / "killed")
    expected, found = weights_of(whole.model_path), weights_of(resumed.model_path)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert log_of(tmp_path / "killed") == log_of(tmp_path / "whole")
    assert [line["step"] for line in log_of(tmp_path / "whole")] == list(range(1, 9))
    assert resumed.curve_path.stat().st_size > 1000
    assert not (tmp_path / "killed" / ".step-000008.tmp").exists()


def test_training_shows_progress_and_ends_when_the_minutes_given_are_counted(tmp_path: Path) -> None:
    console = Console(record=True, width=120, force_terminal=True)
    recipe = replace(Recipe.smoke(), steps=100_000, log_every=1)
    result = train(recipe, tmp_path, minutes=0.02, console=console)
    assert result.progress.step < recipe.steps
    assert result.progress.seconds >= 1.2  # counted by the run itself, so it holds on any machine
    half_done = Progress(step=10, seconds=30.0)
    assert training_module._share_done(recipe, half_done, minutes=1.0) == 0.5
    assert training_module._share_done(recipe, half_done, minutes=None) == 10 / recipe.steps
    shown = console.export_text()
    for word in ("program", "longdoc", "retrieval", "arithmetic", "answer", "tokens/s"):
        assert word in shown


def test_the_tool_trains_and_answers_a_mistake_with_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        app(["--recipe", "smoke", "--out", str(tmp_path / "run")])
    assert not ended.value.code
    assert f"Model: {tmp_path / 'run' / 'model'}" in capsys.readouterr().out
    (tmp_path / "thesis.txt").write_text("")
    with pytest.raises(SystemExit) as ended:
        app(["--recipe", "smoke", "--out", str(tmp_path)])
    assert ended.value.code == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_unusable_folders_are_refused_in_one_sentence(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("")
    other = tmp_path / "other"
    train(replace(Recipe.smoke(), steps=1), other)
    cases = [
        (file, {}, "cannot be used"),
        (file / "below", {}, "cannot be used"),
        (full, {}, "not empty"),
        (other, {"resume": False}, "already holds a training run"),
    ]
    for out, options, words in cases:
        with pytest.raises(TrainingError, match=words) as caught:
            train(Recipe.smoke(), out, **options)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
    with pytest.raises(TrainingError, match="does not fit this recipe"):
        train(replace(Recipe.smoke(), hidden=128), other)
    assert (full / "thesis.txt").exists()


def test_a_damaged_checkpoint_is_refused_in_one_sentence(tmp_path: Path) -> None:
    train(replace(Recipe.smoke(), steps=1), tmp_path)
    (tmp_path / "step-000001" / "optimizer.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(TrainingError, match="damaged"):
        train(replace(Recipe.smoke(), steps=2), tmp_path)


def test_bundled_model_is_an_ordinary_small_model_folder() -> None:
    folder = testbed.testbed_path()
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"} <= names
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 12_000_000
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert isinstance(model, Qwen3ForCausalLM)
    assert model.config.head_dim == 64
    assert model.config.max_position_embeddings == 4096
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert tokenizer.get_vocab() == {word: index for index, word in enumerate(VOCABULARY)}
    assert tokenizer.padding_side == "left"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == EOS
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id


@pytest.mark.parametrize("family", FAMILIES)
def test_bundled_model_solves_unseen_default_problems(family: str) -> None:
    model, tokenizer = load_testbed()
    right, asked, error = evaluate_model(model, tokenizer, get_task(family), limit=4, seed=11)
    assert asked == 4
    assert right >= 3, f"{right} of {asked} +- {error}"


def test_a_left_padded_batch_gives_the_outputs_of_single_rows() -> None:
    model, tokenizer = load_testbed()
    problems = [get_task(f"program:lines={lines},constants=2").problem(0) for lines in (6, 12)]
    both = generate(model, tokenizer, problems)
    alone = [generate(model, tokenizer, [problem])[0] for problem in problems]
    assert [text.split(" <eos>")[0] for text in both] == [text.split(" <eos>")[0] for text in alone]
