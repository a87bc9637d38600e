"""Questions of one's own in every job: what is asked, what is read, and when results mean nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from command_line import run as run_command

from reasonkv.evaluate.generate import decode, graded, opens_thinking, render, thinking_tokens
from reasonkv.evaluate.job import BudgetOptions, GenerateJob, JobError, ReplayJob
from reasonkv.evaluate.run import run
from reasonkv.evaluate.sanity import sanity_warnings
from reasonkv.models import load_model
from reasonkv.tasks import TaskError, TaskOptions, get_task, task_catalogue
from reasonkv.tasks.data import data_task

BUDGET = BudgetOptions(tokens=(96,), interval=32, recent=16)
DATA = TaskOptions(prompt="{question}", answer="answer", grade="exact")


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model("testbed")


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled family's own problems as a file of questions."""
    path = tmp_path_factory.mktemp("data") / "program.jsonl"
    problems = [get_task("program").problem(example) for example in range(3)]
    path.write_text("".join(json.dumps({"question": p.prompt, "answer": p.answer}) + "\n" for p in problems) + "{bad\n")
    return path


def test_a_file_of_questions_gives_what_the_bundled_task_gives(model: Any, questions: Path, tmp_path: Path) -> None:
    shared: dict[str, Any] = {"methods": ("full", "random"), "budget": BUDGET, "limit": 3}
    ours = run(GenerateJob(task=[str(questions)], options=DATA, **shared), model, tmp_path / "a")
    theirs = run(GenerateJob(task=["program"], **shared), model, tmp_path / "b")
    assert [one.output for one in ours] == [one.output for one in theirs]
    assert [one.correct for one in ours] == [one.correct for one in theirs]
    assert all(one.score == float(one.correct) and one.extracted is not None for one in ours if not one.truncated)
    assert all(0 < (one.thinking_tokens or 0) < one.output_tokens for one in ours if not one.truncated)
    again = run(GenerateJob(task=[str(questions)], options=DATA, **shared), model, tmp_path / "a")
    assert again == ours  # resumed, nothing new


def test_a_replay_of_questions_takes_as_many_as_there_are(model: Any, questions: Path, tmp_path: Path) -> None:
    job = ReplayJob(task=[str(questions)], methods=("full", "random"), budget=BUDGET, limit=50, options=DATA)
    records = run(job, model, tmp_path / "out")
    assert sorted(one.example for one in records) == [0, 0, 1, 1, 2, 2]


def test_the_command_line_asks_questions_of_a_file(questions: Path, tmp_path: Path) -> None:
    arguments = [
        "evaluate",
        "--task",
        str(questions),
        "--prompt",
        "{question}",
        "--grade",
        "exact",
        "--methods",
        "random",
    ]
    arguments += ["--budgets", "96", "--limit", "2", "--out", str(tmp_path / "out")]
    done = run_command(*arguments)
    assert done.exit_code == 0, done.stderr
    assert "the first prompt" in done.stderr and "line 4 is no JSON" in done.stderr
    assert "accuracy" in done.stdout
    for wrong, words in ((["--prompt", "{nothing}"], "nothing"), (["--grade", "vibes"], "no grader")):
        refused = run_command(*arguments[:-1], tmp_path / "other", *wrong)
        assert refused.exit_code == 2 and words in refused.stderr


def test_tasks_are_listed_and_near_names_are_named() -> None:
    assert {"program", "FILE.jsonl", "gym:NAME", "niah", "gsm8k"} <= set(task_catalogue())
    listed = run_command("tasks")
    assert listed.exit_code == 0 and "gsm8k" in listed.stdout
    with pytest.raises(TaskError, match="did you mean 'gsm8k'"):
        get_task("gsm8")
    with pytest.raises(TaskError, match="key=value"):
        get_task("niah:length")


class _Tokenizer:
    """What `render` asks of a tokenizer."""

    chat_template = "yes"

    def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> str:
        if any(one["role"] == "system" and one["content"] == "no" for one in messages):
            raise ValueError("System role not supported")
        thinking = {None: "", True: "+think", False: "-think"}[options.get("enable_thinking")]
        return "".join(f"<{one['role']}>{one['content']}" for one in messages) + f"<assistant{thinking}>"

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        return "".join(map(chr, tokens))


@pytest.mark.parametrize(
    ("options", "from_data", "expected"),
    [
        (TaskOptions(), True, ("<user>hi<assistant>", False)),
        (TaskOptions(system="be brief", thinking="off"), True, ("<system>be brief<user>hi<assistant-think>", False)),
        (TaskOptions(thinking="on"), True, ("<user>hi<assistant+think>", False)),
        (TaskOptions(chat="off"), True, ("hi", True)),
        (TaskOptions(), False, ("hi", False)),
        (TaskOptions(chat="on"), False, ("<user>hi<assistant>", False)),
    ],
)
def test_a_question_reaches_the_model_in_its_chat_template(
    options: TaskOptions, from_data: bool, expected: tuple[str, bool]
) -> None:
    tokenizer: Any = _Tokenizer()
    assert render(tokenizer, "hi", options, from_data=from_data) == expected


def test_thinking_that_the_prompt_opened_and_that_never_ends_is_no_answer() -> None:
    tokenizer: Any = _Tokenizer()
    task = data_task("t", [{"question": "6 x 7?", "answer": "42"}], TaskOptions(grade="number"))
    ids = tokenizer("so it is 42", add_special_tokens=False)["input_ids"]
    for prompt, opened in (("<think>", True), ("<think>x</think>", False), ("hi", False)):
        assert opens_thinking(tokenizer, torch.tensor(list(map(ord, prompt))), "</think>") is opened
        found = graded(task, task.problem(0), decode(tokenizer, ids), opened)
        assert found["output"] == "so it is 42"
        assert thinking_tokens(tokenizer, ids, "</think>", opened) == len(ids) * opened
        assert found["score"] == (0 if opened else 1)
    ended = tokenizer("so</think>42", add_special_tokens=False)["input_ids"]
    assert graded(task, task.problem(0), decode(tokenizer, ended), opened=True)["score"] == 1
    assert thinking_tokens(tokenizer, ended, "</think>", opened=True) == len("so</think>")


def test_a_template_that_refuses_is_one_sentence() -> None:
    tokenizer: Any = _Tokenizer()
    with pytest.raises(TaskError, match="System role"):
        render(tokenizer, "hi", TaskOptions(system="no"))
    tokenizer.chat_template = None
    assert render(tokenizer, "hi") == ("hi", True)
    with pytest.raises(TaskError, match="no chat template"):
        render(tokenizer, "hi", TaskOptions(chat="on"))


@pytest.mark.parametrize(("text", "tokens"), [("ab</think>cd", 10), ("abcd", 0), ("<think>ab", 9)])
def test_thinking_and_answer_tokens_are_counted_apart(text: str, tokens: int) -> None:
    tokenizer: Any = _Tokenizer()
    assert thinking_tokens(tokenizer, [ord(letter) for letter in text], "</think>") == tokens


def test_results_warn_where_full_kv_itself_fails() -> None:
    def frame(**columns: Any) -> pd.DataFrame:
        usual = {"method": "full", "task": "t", "correct": 1.0, "truncated": False, "repetition": 0.0, "score": 1.0}
        return pd.DataFrame([usual | {"extracted": "1", "grader_error": None} | columns] * 4)

    assert sanity_warnings(frame()) == []
    for columns, words in (
        ({"correct": 0.0}, "0% of t right"),
        ({"truncated": True}, "cut off"),
        ({"repetition": 0.9}, "loop"),
        ({"extracted": None}, "could be read"),
        ({"grader_error": "broken"}, "grader failed on 4"),
    ):
        (sentence,) = sanity_warnings(frame(**columns))
        assert words in sentence
    (sentence,) = sanity_warnings(frame(trace_correct=False))
    assert "traces of t are 0% right" in sentence


def test_options_that_contradict_are_refused(questions: Path) -> None:
    with pytest.raises(JobError):
        GenerateJob(task=[], options=DATA)
