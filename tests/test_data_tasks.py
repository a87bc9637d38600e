"""Tasks from data, their graders, and the limits under which unread code runs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from reasonkv.tasks import get_task
from reasonkv.tasks.base import UNREAD, TaskError, after_thinking
from reasonkv.tasks.data import compile_template, data_task
from reasonkv.tasks.declaration import standard_tasks
from reasonkv.tasks.grade import GRADERS, get_grader, last_box, last_number
from reasonkv.tasks.hub import standard_task
from reasonkv.tasks.needle import KINDS, needle_task
from reasonkv.tasks.options import TaskOptions
from reasonkv.tasks.rows import read_rows
from reasonkv.tasks.sandbox import call_function, run_python


def test_a_line_that_is_no_json_is_skipped_and_named(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text('{"question": "a", "answer": 1}\n{bad\n\n[1]\n{"question": "b", "answer": ["2", "two"]}\n')
    rows, skipped = read_rows(path)
    assert [row["question"] for row in rows] == ["a", "b"]
    assert [line.split(" is")[0] for line in skipped] == ["line 2", "line 4"]


@pytest.mark.parametrize("suffix", [".json", ".csv", ".parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    import pandas

    frame = pandas.DataFrame({"question": ["a", "b"], "answer": ["x", "y"]})
    path = tmp_path / f"q{suffix}"
    {
        ".json": lambda: path.write_text(json.dumps(frame.to_dict("records"))),
        ".csv": lambda: frame.to_csv(path, index=False),
        ".parquet": lambda: frame.to_parquet(path),
    }[suffix]()
    assert read_rows(path) == (frame.to_dict("records"), [])


@pytest.mark.parametrize("name", ["missing.jsonl", "broken.json", "broken.parquet"])
def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path: Path, name: str) -> None:
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "broken.parquet").write_bytes(b"no parquet")
    with pytest.raises(TaskError) as caught:
        read_rows(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_braces_of_latex_in_data_and_template_stay() -> None:
    row = {"q": r"What is \frac{1}{2}? {x}"}
    assert compile_template(r"{q} Answer in \boxed{}.")(row) == r"What is \frac{1}{2}? {x} Answer in \boxed{}."
    assert compile_template(r"{{ q }} \frac{a}{b}")(row) == r"What is \frac{1}{2}? {x} \frac{a}{b}"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (TaskOptions(prompt="{ask}"), "no field 'ask'"),
        (TaskOptions(prompt="{{ ask }}"), "'ask' is undefined"),
        (TaskOptions(prompt="{{ ask"), "no Jinja"),
        (TaskOptions(prompt="@nowhere.txt"), "nowhere.txt cannot be read"),
        (TaskOptions(answer="solved"), "no field 'solved'"),
        (TaskOptions(grade="vibes"), "no grader 'vibes'"),
        (TaskOptions(grade="nowhere.py:f"), "no file nowhere.py"),
    ],
)
def test_options_that_do_not_fit_the_data_are_refused_before_a_model_is_loaded(
    options: TaskOptions, words: str
) -> None:
    with pytest.raises(TaskError, match=words):
        data_task("q", [{"question": "a", "answer": "1"}], options)


def test_prompt_answer_and_grader_are_guessed_from_the_fields() -> None:
    task = data_task("q", [{"question": "2 + 2?", "answer": 4}], TaskOptions())
    problem = task.problem(0)
    assert (problem.prompt, problem.answer) == ("2 + 2?", "4")
    assert task.check(problem, "2 + 2 is 4.")
    with pytest.raises(TaskError, match="--prompt"):
        data_task("q", [{"text": "a", "answer": "1"}], TaskOptions())


def test_another_seed_takes_the_problems_in_another_order() -> None:
    task = data_task("q", [{"question": str(n), "answer": n} for n in range(20)], TaskOptions())
    assert [task.problem(n).prompt for n in range(20)] == [str(n) for n in range(20)]
    shuffled = [task.problem(n, seed=1) for n in range(20)]
    assert sorted(int(one.prompt) for one in shuffled) == list(range(20)) != [int(one.prompt) for one in shuffled]
    assert all(task.check(one, one.prompt) for one in shuffled)


def test_training_problems_of_a_file_come_from_its_end() -> None:
    task = data_task("q", [{"question": str(n), "answer": n} for n in range(20)], TaskOptions())
    trained = [task.problem(n, split="train") for n in range(3)]
    assert [one.prompt for one in trained] == ["19", "18", "17"]
    assert all(task.check(one, one.prompt) for one in trained)


@pytest.mark.parametrize(
    ("output", "part"),
    [
        ("<think>3</think> 4", " 4"),
        ("3</think> 4", " 4"),
        ("<think>a</think>b</think>c", "c"),
        ("<think> 3", None),
        ("4", "4"),
    ],
)
def test_only_what_follows_thinking_is_graded(output: str, part: str | None) -> None:
    assert after_thinking(output) == part


@pytest.mark.parametrize(
    ("text", "box", "number"),
    [
        (r"so \boxed{\frac{1}{2}} and", r"\frac{1}{2}", "2"),
        (r"\boxed{3} no, \boxed{4}", "4", "4"),
        (r"\boxed{5} then \boxed{6", "5", "6"),
        (r"\boxed{\boxed{7}} } \fbox {8", "7", "8"),
        ("costs $1,234.50.", None, "1234.50"),
        ("about -7 or 1e3", None, "1e3"),
        ("none", None, None),
    ],
)
def test_boxes_and_numbers_are_read(text: str, box: str | None, number: str | None) -> None:
    assert (last_box(text), last_number(text)) == (box, number)


def test_a_loop_of_open_boxes_is_read_in_one_pass() -> None:
    assert last_box(r"\boxed{9}" + r"\boxed{" * 200_000) == "9"  # a search from every box would take an hour


@pytest.mark.parametrize(
    ("grader", "output", "answers", "score"),
    [
        ("math", r"\boxed{\frac{1}{2}}", ["0.5"], 1),
        ("math", r"\boxed{(3, \pi/2)}", [r"\left(3, \frac{\pi}{2}\right)"], 1),
        ("math", "I get 1,234.", ["1234"], 1),
        ("math", r"\boxed{2} but the answer is 3", ["3"], 0),
        ("number", "The answer is: 12 apples, which leaves 3.", ["3"], 1),
        ("number", "Answer: 12\nThere were 3 before.", ["12.0"], 1),
        ("exact", "So.\nAnswer: **New  york**.", ["New York"], 1),
        ("exact", "<answer>a</answer> is it", ["a"], 1),
        ("choice", "(B) is wrong. The answer is (C).", ["C"], 1),
        ("choice", "A) no\nB) yes\n\nB", ["B"], 1),
        ("contains", "7 and 8", ["7", "9"], 0.5),
        ("f1", "The cat, sat!", ["a cat sat down"], 0.8),
        ("rouge", "the cat sat", ["the cat sat"], 1),
        ("edit", "\n# note\nreturn x", ["return x"], 1),
        ("code", "Here:\n```python\ndef f(x):\n    return x + 1\n```", ["assert f(1) == 2"], 1),
        ("code", "```python\ndef f(x):\n    return x\n```", ["assert f(1) == 2"], 0),
    ],
)
def test_graders(grader: str, output: str, answers: list[str], score: float) -> None:
    grade = get_grader(grader)(output, answers, {})
    assert grade.score == pytest.approx(score)
    assert grade.extracted is not None


def test_mathematics_is_graded_outside_the_main_thread_too() -> None:
    with ThreadPoolExecutor() as pool:
        grade = pool.submit(get_grader("math"), r"\boxed{\frac{2}{4}}", ["0.5"], {}).result()
    assert (grade.score, grade.error) == (1.0, None)


@pytest.mark.parametrize("grader", ["math", "number", "exact", "choice", "contains", "f1", "rouge", "code"])
def test_an_output_without_an_answer_is_unread_and_not_wrong(grader: str) -> None:
    assert get_grader(grader)("", ["1"], {}) == UNREAD


def test_a_grader_of_a_file_scores_and_its_failure_is_a_note(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "def half(output, answers, row): return [0.5, output[:2]]\n"
        "def broken(output, answers, row): return 1 / 0\n"
        "def wild(output, answers, row): return 7\n"
    )
    assert get_grader(f"{path}:half")("abc", ["x"], {}).extracted == "ab"
    for name, words in (("broken", "ZeroDivisionError"), ("wild", "from 0 to 1"), ("absent", "no attribute")):
        grade = get_grader(f"{path}:{name}")("abc", ["x"], {})
        assert (grade.score, grade.extracted) == (0.0, None)
        assert grade.error is not None and words in grade.error


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'while True: pass'])\nwhile True: pass",
        "block = bytearray(2 ** 31)",
        "import os\nwhile True: os.fork()",
        "import socket\nsocket.create_connection(('192.0.2.1', 80), timeout=1)",
        "open('/tmp/reasonkv-big', 'wb').write(bytes(2 ** 25))",
    ],
    ids=["loops", "children", "memory", "forks", "network", "files"],
)
def test_unread_code_cannot_hang_the_run_or_reach_the_network(code: str) -> None:
    finished = run_python(code, seconds=2, megabytes=512)
    assert not finished.ok and finished.error


def test_a_grader_that_hangs_and_code_that_writes_without_end_cost_their_time_and_no_memory(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def hangs(*given):\n    while True: pass\n")
    with pytest.raises(TaskError, match="stopped after 1 s"):
        call_function(str(tmp_path / "mine.py"), "hangs", [], seconds=1)
    assert len(run_python("while True: print('x' * 10000)", seconds=2).output) <= 2**20


def test_what_unread_code_forks_ends_with_it() -> None:
    mark = f"forked-by-{os.getpid()}"
    code = f"# {mark}\nimport os, time\nfor _ in range(20):\n    if os.fork() == 0:\n        time.sleep(100)\nprint(1)"
    run_python(code, seconds=2)
    alive = [path for path in Path("/proc").glob("[0-9]*/cmdline") if mark.encode() in _bytes(path)]
    assert alive == []


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it has just ended
        return b""


def test_a_dataset_without_network_is_one_sentence_that_names_the_file_to_give(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*given: object, **named: object) -> None:
        raise ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub (ConnectTimeout)\nand more")

    monkeypatch.setattr("datasets.load_dataset", refused)
    for spec in ("gsm8k", "longbench:qasper", "hub:openai/gsm8k,config=main"):
        with pytest.raises(TaskError, match=r"--data-dir with a file (gsm8k|qasper)\.jsonl") as caught:
            get_task(spec)
        assert "\n" not in str(caught.value) and "Couldn't reach" in str(caught.value)


def test_named_benchmarks_read_a_folder_where_there_is_no_network(tmp_path: Path) -> None:
    fixtures = {
        "gsm8k": {"question": "How many?", "answer": "Two and two.\n#### 1,200"},
        "MATH-500": {"problem": "x?", "answer": r"\frac{1}{2}"},
        "aime24": {"problem": "x?", "answer": "033"},
        "gpqa": {"Question": "Which?", "Correct Answer": "r"} | {f"Incorrect Answer {n}": f"w{n}" for n in (1, 2, 3)},
    }
    for name, row in fixtures.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    options = TaskOptions(data_dir=tmp_path)
    for name, output in {
        "gsm8k": r"\boxed{1200}", "math500": r"\boxed{0.5}", "aime24": r"\boxed{33}", "gpqa-diamond": None,
    }.items():  # fmt: skip
        task = standard_task(name, options)
        problem = task.problem(0)
        assert task.check(problem, output or f"Answer: {problem.answer}"), name
        if name == "gpqa-diamond":
            assert f"{problem.answer}) r" in problem.prompt
    assert {"gsm8k", "math500", "amc23", "aime24", "aime25", "aime26", "hmmt25", "gpqa-diamond"} <= set(
        standard_tasks()
    )
    with pytest.raises(TaskError, match=r"amc23\.jsonl"):
        standard_task("amc23", options)


@pytest.mark.parametrize("kind", KINDS)
def test_needles_fill_the_length_and_their_answers_are_in_the_text(kind: str) -> None:
    class Words:
        def __call__(self, text: str, add_special_tokens: bool) -> object:
            return type("Encoded", (), {"input_ids": text.split()})

    task = needle_task(f"ruler:{kind},length=400", {"length": "400"}).for_tokenizer(Words())
    problem, other = task.problem(0), task.problem(0, seed=1)
    assert 380 <= len(problem.prompt.split()) <= 400
    assert problem == task.problem(0) and problem.prompt != other.prompt
    assert all(answer in problem.prompt for answer in problem.answer.split("\n"))
    assert task.grade(problem, problem.answer).score == 1
    assert task.grade(problem, problem.answer.split("\n")[0]).score == 1 / len(problem.answer.split("\n"))


def test_a_needle_lies_at_its_depth() -> None:
    for depth in (0, 50, 100):
        prompt = needle_task("niah", {"length": "2000", "depth": str(depth)}).problem(0).prompt
        assert prompt.index("One of the special") / len(prompt) == pytest.approx(depth / 100, abs=0.05)
    with pytest.raises(TaskError, match="length"):
        needle_task("niah", {"length": "12"})


def test_generators_of_reasoning_gym_score_their_own_answers() -> None:
    pytest.importorskip("reasoning_gym")
    from reasonkv.tasks.gym import gym_task

    for name in ("gsm_symbolic", "chain_sum", "word_sorting", "syllogism", "needle_haystack"):
        task = gym_task(f"gym:{name}", {})
        problem = task.problem(2, seed=5)
        assert task.grade(problem, f"Well.\nAnswer: {problem.answer}").score == 1, name
        assert task.grade(problem, "no idea") == UNREAD
        tested = {task.problem(example, seed=5).prompt for example in range(3)}
        trained = task.problem(1, seed=5, split="train")
        assert trained.prompt not in tested and task.grade(trained, f"Answer: {trained.answer}").score == 1, name
    many = gym_task("gym:gsm_symbolic,per_prompt=4", {"per_prompt": "4"})
    problem = many.problem(1)
    answers = problem.answer.split("\n")
    said = [f"\\boxed{{{answer}}}" for answer in answers]
    assert many.grade(problem, "\n".join(said)).score == 1
    assert many.grade(problem, "\n".join([r"\boxed{77}", *said[1:], *said])).score == 1  # the repeated answers count
    assert many.grade(problem, "\n".join([*said, *said[:2]])).score == 1  # cut off while it repeats
    assert many.grade(problem, rf"\boxed{{-77}} \boxed{{{answers[1]} \text{{ apples}}}}").score == 0.25
    for spec, given, words in (("gym:foo", {}, "'foo'"), ("gym:chain_sum", {"x": "1"}, "these options")):
        with pytest.raises(TaskError, match=words):
            gym_task(spec, given)


def test_rows_that_cannot_be_asked_or_graded_are_left_out_and_named(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"question": f"{n}?", "answer": n} for n in range(20)]
    rows[2] = {"question": "2?"}
    rows[5], rows[7] = {"answer": 5}, {"answer": 7}
    rows[9]["answer"], rows[11]["answer"] = " ", []
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = get_task(str(tmp_path / "rows.jsonl"), TaskOptions(prompt="{question}", answer="answer", grade="exact"))
    assert task.size == 15
    assert [sentence.partition(":")[0] for sentence in task.skipped] == [
        "row 3",
        "row 6 and 1 more",
        "row 10",
        "row 12",
    ]
    assert [task.problem(example).prompt for example in range(3)] == ["0?", "1?", "3?"]


@pytest.mark.parametrize(
    "raised", [lambda: 1 / 0, lambda: (_ for _ in ()).throw(TaskError("The package is gone."))], ids=["defect", "refusal"]
)  # fmt: skip
def test_what_a_grader_raises_is_a_note_of_one_output(raised: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:  # fmt: skip
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "a", "answer": "b"}))
    monkeypatch.setitem(GRADERS, "exact", lambda *_: raised())
    task = get_task(str(tmp_path / "rows.jsonl"), TaskOptions(grade="exact"))
    grade = task.grade(task.problem(0), "b")
    assert grade.score == 0.0 and grade.error is not None and grade.extracted is None
