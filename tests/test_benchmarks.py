"""Named benchmarks on 20 items each in their published schemas: prompts, extraction and scores as the public harness has
them. `tests/data/README.md` says where the recorded scores come from."""

from __future__ import annotations

import base64
import importlib.util
import json
import pickle
import random
import sys
import types
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from reasonkv.evaluate.manifest import Arguments
from reasonkv.tasks import TaskOptions, get_task
from reasonkv.tasks.base import TaskError
from reasonkv.tasks.data import DataTask
from reasonkv.tasks.declaration import standard_tasks
from reasonkv.tasks.grade import GRADERS

N = 20
LONGBENCH = standard_tasks()["longbench"].subsets
NOT_INSTALLED = ("edit", "longbench-rouge", "longbench-rouge-zh")  # recorded scores of the packages stand in
COMPARED = [name for name, one in LONGBENCH.items() if one["grade"] not in NOT_INSTALLED]
BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."
ANSWERS = [r"\frac{1}{2}", "033", r"\left(3, \frac{\pi}{2}\right)", "1,200", r"2\sqrt{3}", r"\text{(C)}", "x^2+1", r"50\%", "-7", r"\{1,2\}"]  # fmt: skip
OUTPUTS = [
    r"So \boxed{\frac{1}{2}}.", r"\boxed{0.5}", r"First \boxed{3}, then \boxed{33}", r"\boxed{(3, \pi/2)}", "It is 1200.",
    r"\boxed{\sqrt{12}}", r"\boxed{C}", r"\boxed{1+x^{2}}", r"\boxed{\frac12}", r"\boxed{-7} \boxed{", "none",
]  # fmt: skip


def saved(folder: Path, name: str, rows: Sequence[dict[str, Any]]) -> None:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def made(folder: Path, spec: str, rows: Sequence[dict[str, Any]], **options: Any) -> DataTask:
    """The task on a folder that holds these rows."""
    saved(folder, spec.partition(":")[2].partition(",")[0] or spec, rows)
    task = get_task(spec, TaskOptions(data_dir=folder, **options))
    assert isinstance(task, DataTask)
    return task


def lm_eval_folder() -> Path:
    return Path(pytest.importorskip("lm_eval").__file__).parent / "tasks"


@pytest.fixture(scope="module")
def lm_eval_longbench() -> Any:
    """lm-eval's LongBench scorers, with characters in place of jieba's words."""
    stubs = {name: types.ModuleType(name) for name in ("jieba", "fuzzywuzzy", "rouge")}
    stubs["jieba"].cut = lambda text, cut_all: list(text)  # type: ignore[attr-defined]
    stubs["fuzzywuzzy"].fuzz = stubs["rouge"].Rouge = None  # type: ignore[attr-defined]
    spec = importlib.util.spec_from_file_location("metrics", lm_eval_folder() / "longbench" / "metrics.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        for name, stub in stubs.items():
            patch.setitem(sys.modules, name, stub)
        spec.loader.exec_module(module)
    return module


def longbench_rows(subset: str) -> list[dict[str, Any]]:
    draw = random.Random(subset)
    classes = ["Food", "Food other", "Date", "体育", "体育 其他"]
    rows = []
    for number in range(N):
        answer = {
            "trec": draw.choice(classes), "lsht": draw.choice(classes), "passage_count": str(draw.randint(1, 30)),
            "passage_retrieval_en": f"Paragraph {number + 1}", "passage_retrieval_zh": f"段落{number + 1}",
        }.get(subset, f"the answer {number} of {draw.randint(0, 99)}")  # fmt: skip
        rows.append(
            {
                "input": f"What is {number}?", "context": f"A text {{with}} braces, {number}.\n\nAnd more.",
                "answers": [answer, f"another {number}"] if "answer" in answer else [answer], "length": 100 + number,
                "dataset": subset, "language": "zh" if subset.endswith("zh") else "en",
                "all_classes": classes if subset in ("trec", "lsht") else None, "_id": f"{number:048x}",
            }
        )  # fmt: skip
    return rows


@pytest.mark.parametrize("subset", LONGBENCH)
def test_longbench_prompts_and_limits_are_the_published_ones(subset: str, tmp_path: Path) -> None:
    """lm-eval writes the same prompts, but with another field name and without spaces at the end."""
    loader = type("Loader", (yaml.SafeLoader,), {})
    loader.add_constructor("!function", lambda one, node: one.construct_scalar(node))
    theirs = yaml.load((lm_eval_folder() / "longbench" / f"{subset}.yaml").read_text(), loader)
    task, rows = made(tmp_path, f"longbench:{subset}", longbench_rows(subset)), longbench_rows(subset)
    assert task.size == N and task.declared.max_new_tokens == theirs["generation_kwargs"]["max_gen_toks"]
    for example, row in enumerate(rows):
        wanted = theirs["doc_to_text"].replace("{{context}}", row["context"]).replace("{{question}}", row["input"])
        assert task.problem(example).prompt.split() == wanted.split()
    from_mirror = [{"question" if key == "input" else key: value for key, value in row.items()} for row in rows]
    assert made(tmp_path, f"longbench:{subset}", from_mirror).problem(3) == task.problem(3)
    needs_no_chat = subset in ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p")
    assert task.prompt_options(TaskOptions()).chat == ("off" if needs_no_chat else "auto")


@pytest.mark.parametrize("subset", COMPARED)
def test_longbench_scores_are_lm_evals(subset: str, tmp_path: Path, lm_eval_longbench: Any) -> None:
    rule = standard_tasks()["longbench"].subset(subset).grade
    name = {
        "f1": "qa_f1", "longbench-f1-zh": "qa_f1_zh", "longbench-count": "count",
        "longbench-retrieval": "retrieval_zh" if subset.endswith("zh") else "retrieval",
        "longbench-classification": "classification",
    }[str(rule)]  # fmt: skip
    rows, draw = longbench_rows(subset), random.Random(1)
    task, scores = made(tmp_path, f"longbench:{subset}", rows), []
    for example, row in enumerate(rows):
        output = draw.choice(["", "\n"]) + draw.choice(
            [row["answers"][0], "Food other or Date", "4 or 12", "an answer"]
        )
        output += draw.choice(["", "\nAnd 7 more.", " 12 of those"])
        first = output.lstrip("\n").split("\n")[0] if subset in ("trec", "lsht", "triviaqa") else output
        scorer = getattr(lm_eval_longbench, f"{name}_score")
        wanted = max(scorer(first, answer, all_classes=row["all_classes"]) for answer in row["answers"])
        scores.append(task.grade(task.problem(example), output).score)
        assert scores[-1] == pytest.approx(wanted, abs=1e-12), output
    assert 0 < sum(scores) < N


def test_f1_rouge_and_edit_similarity_are_those_of_the_packages_that_longbench_uses() -> None:
    recorded = json.loads((Path(__file__).parent / "data" / "longbench_scores.json").read_text())
    assert len(recorded) == N
    for one in recorded:
        for grader, output, answer, key in (
            ("f1", "output", "answer", "f1"), ("longbench-rouge", "output", "answer", "rouge"),
            ("longbench-f1-zh", "output_zh", "answer_zh", "f1_zh"), ("edit", "code", "line", "edit"),
            ("longbench-rouge-zh", "output_zh", "answer_zh", "rouge_zh"),
        ):  # fmt: skip
            assert GRADERS[grader](one[output], [one[answer]], {}).score == pytest.approx(one[key], abs=1e-12)


def test_longbench_v2_asks_and_reads_as_published(tmp_path: Path) -> None:
    rows = [
        {
            "_id": str(number), "question": f"Which, {number}?\n", "answer": "ABCD"[number % 4], "context": " A text.\n",
            "domain": "d", "length": "short", "difficulty": "easy", **{f"choice_{one}": f" {one}{number}" for one in "ABCD"},
        }
        for number in range(N)
    ]  # fmt: skip
    task = made(tmp_path, "longbench-v2", rows)
    assert task.problem(1).prompt == (
        "Please read the following text and answer the question below.\n\n<text>\nA text.\n</text>\n\nWhat is the correct "
        "answer to this question: Which, 1?\nChoices:\n(A) A1\n(B) B1\n(C) C1\n(D) D1\n\nFormat your response as follows: "
        '"The correct answer is (insert answer here)".'
    )
    for output, read in (
        ("The correct answer is (B).", "B"), ("**The correct answer is C**", "C"), ("(A)", None),
        ("The correct answer is D, or The correct answer is (A)", "A"),
    ):  # fmt: skip
        grades = [task.grade(task.problem(example), output) for example in range(N)]
        assert {grade.extracted for grade in grades} == {read}
        assert [grade.score for grade in grades] == [float(row["answer"] == read) for row in rows]


def livecodebench_rows() -> list[dict[str, Any]]:
    """Sums of numbers: every other one as a function, and every third one with packed private tests."""
    rows = []
    for number in range(N):
        as_function = number % 2 == 1
        cases = [(number, 1), (number, 2)]
        tests = [
            {"input": f"{a}\n{b}", "output": str(a + b), "testtype": "functional" if as_function else "stdin"}
            for a, b in cases
        ]
        hidden = json.dumps(tests[1:])
        packed = base64.b64encode(zlib.compress(pickle.dumps(hidden))).decode()
        rows.append(
            {
                "question_title": "Sum", "question_content": f"Add two numbers, variant {number}.", "platform": "leetcode",
                "question_id": f"q{number}", "contest_id": "c", "contest_date": "2025-01-04T00:00:00", "difficulty": "easy",
                "starter_code": "class Solution:\n    def add(self, a: int, b: int) -> int:\n        " if as_function else "",
                "public_test_cases": json.dumps(tests[:1]), "private_test_cases": packed if number % 3 == 0 else hidden,
                "metadata": json.dumps({"func_name": "add"} if as_function else {}),
            }
        )  # fmt: skip
    return rows


def test_livecodebench_asks_as_published_and_runs_public_and_private_tests(tmp_path: Path) -> None:
    task = made(tmp_path, "livecodebench", livecodebench_rows())
    head = (
        "You are an expert Python programmer. You will be given a question (problem specification) and will generate a "
        "correct Python program that matches the specification and passes all tests.\n\n### Question:\nAdd two numbers, "
    )
    tail = "\n```\n\n### Answer: (use the provided format with backticks)\n\n"
    starter = "\n```python\nclass Solution:\n    def add(self, a: int, b: int) -> int:\n        "
    for example in range(N):
        prompt = task.problem(example).prompt
        assert prompt.startswith(f"{head}variant {example}.\n\n### Format: ")
        assert prompt.endswith(
            (starter if example % 2 else "writes output to STDOUT.\n```python\n# YOUR CODE HERE") + tail
        )
    program = "```python\nprint(int(input()) + int(input()))\n```"
    function = (
        "Try\n```\nold\n```\n```python\nclass Solution:\n    def add(self, a: int, b: int) -> int:\n        {}\n```"
    )
    right = [program, function.format("return reduce(operator.add, [a, b])")]  # without imports
    assert [task.grade(task.problem(example), right[example % 2]).score for example in range(6)] == [1.0] * 6
    for example, wrong in (
        (0, program.replace("print(", "print(1 if False else ").replace("+", "-")),
        (0, "```python\nprint(float(input()) + 1)\n```"),  # passes the public test alone
        (1, function.format("return a + 1")),
        (1, function.format("import os; os._exit(0)")),
        (2, "```python\nwhile True: print('x' * 1000)\n```"),
    ):
        assert task.grade(task.problem(example), wrong).score == 0.0
    assert task.grade(task.problem(0), "```python\nprint(float(input()) + float(input()))\n```").score == 1.0
    assert task.grade(task.problem(0), "no code").extracted is None


def test_damaged_tests_of_livecodebench_are_a_note_and_not_the_end_of_a_run(tmp_path: Path) -> None:
    task = made(tmp_path, "livecodebench", [{**livecodebench_rows()[0], "private_test_cases": "!"}])
    grade = task.grade(task.problem(0), "```python\n1\n```")
    assert grade.score == 0.0 and grade.error is not None and "cannot be read" in grade.error


@pytest.mark.parametrize(
    ("name", "field"),
    [("math500", "problem"), ("aime24", "problem"), ("aime25", "problem"), ("aime26", "problem"), ("hmmt25", "problem"), ("amc23", "question")],
)  # fmt: skip
def test_mathematics_is_asked_with_a_box_and_scored_by_math_verify(name: str, field: str, tmp_path: Path) -> None:
    math_verify = pytest.importorskip("math_verify")
    rows = [{field: f"Find {{x}}_{number}.", "answer": ANSWERS[number % len(ANSWERS)]} for number in range(N)]
    task = made(tmp_path, name, rows)
    for example, row in enumerate(rows):
        problem, output = task.problem(example), OUTPUTS[example % len(OUTPUTS)]
        assert (problem.prompt, problem.answer) == (row[field] + BOXED, row["answer"])
        gold = math_verify.parse(f"\\boxed{{{row['answer']}}}")
        wanted = math_verify.verify(gold, math_verify.parse(output)) if "none" not in output else False
        assert task.check(problem, f"<think>\\boxed{{9}}</think>{output}") == wanted, (row["answer"], output)


def gsm8k_rows(count: int, first: int = 0) -> list[dict[str, str]]:
    return [
        {"question": f"Tom has {n} boxes with {n + 900} apples. How many?", "answer": f"{n}*{n + 900}=<<1>>\n#### {n * (n + 900):,}"}
        for n in range(first, first + count)
    ]  # fmt: skip


def test_gsm8k_with_examples_is_asked_and_read_as_lm_eval_does(tmp_path: Path) -> None:
    instance = pytest.importorskip("lm_eval.api.instance")
    from lm_eval.api.task import ConfigurableTask

    rows, examples = gsm8k_rows(N, 30), gsm8k_rows(8)
    saved(tmp_path, "gsm8k-fewshot_train", examples)
    ours = made(tmp_path, "gsm8k-fewshot", rows)
    declared = yaml.safe_load((lm_eval_folder() / "gsm8k" / "gsm8k.yaml").read_text())
    files = {"train": str(tmp_path / "gsm8k-fewshot_train.jsonl"), "test": str(tmp_path / "gsm8k-fewshot.jsonl")}
    declared |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
    theirs = ConfigurableTask(config={**declared, "fewshot_config": {"sampler": "first_n"}, "metadata": None})
    scores = []
    for example, row in enumerate(theirs.test_docs()):
        problem = ours.problem(example)
        assert problem.prompt == theirs.fewshot_context(row, num_fewshot=5)
        answer = row["answer"].split("#### ")[1]
        output = [answer, f"So ${answer}.", f"{answer}.00", f"{answer} apples, or 12", "none", f"#### {answer}"][
            example % 6
        ]
        asked = instance.Instance("generate_until", row, ("", {}), 0)
        asked.resps, theirs._instances = [output], [asked]
        theirs.apply_filters()
        wanted = theirs.process_results(row, [asked.filtered_resps["flexible-extract"]])["exact_match"]
        scores.append(ours.grade(problem, output).score)
        assert scores[-1] == float(wanted), output
    assert 0 < sum(scores) < N
    assert list(ours.declared.stop) == declared["generation_kwargs"]["until"]


def test_examples_come_from_a_file_and_never_hold_the_question_itself(tmp_path: Path) -> None:
    saved(tmp_path, "mine", gsm8k_rows(3))
    options = TaskOptions(prompt="Q: {question}", answer="answer", shots=2, shots_from=tmp_path / "mine.jsonl")
    task = get_task(str(tmp_path / "mine.jsonl"), options)
    first, second, third = gsm8k_rows(3)
    assert task.problem(0).prompt == (
        f"Q: {second['question']} {second['answer']}\n\nQ: {third['question']} {third['answer']}\n\nQ: {first['question']}"
    )
    assert Arguments.of({"options": options.to_dict()}).options == options
    with pytest.raises(TaskError, match="--shots-from"):
        get_task(str(tmp_path / "mine.jsonl"), TaskOptions(shots=2))


def test_a_long_prompt_is_cut_in_the_middle(tmp_path: Path) -> None:
    class Words:
        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[str]]:
            return {"input_ids": text.split(" ")}

        def decode(self, ids: list[str], skip_special_tokens: bool) -> str:
            return " ".join(ids)

    row = longbench_rows("qasper")[0] | {"context": "word " * 500}
    task = made(tmp_path, "longbench:qasper,length=100", [row]).for_tokenizer(Words())
    prompt = task.problem(0).prompt
    assert len(prompt.split(" ")) == 99  # the two halves meet in one word
    assert prompt.startswith("You are given a scientific article") and prompt.endswith("What is 0?\n\nAnswer:")


def test_a_yaml_file_declares_a_task_over_a_file_beside_it(tmp_path: Path) -> None:
    saved(tmp_path, "rows", gsm8k_rows(N))
    (tmp_path / "mine.yaml").write_text(
        "dataset: rows.jsonl\nprompt: 'Say {question}'\nanswer: \"{{ answer.split('#### ')[1] }}\"\ngrade: number\n"
        "extract: 'is ([0-9,]+)'\nsampling: {temperature: 0.5}\nmax_new_tokens: 9\nchat: false\n"
    )
    task = get_task(str(tmp_path / "mine.yaml"))
    assert isinstance(task, DataTask)
    assert task.problem(0).prompt == "Say Tom has 0 boxes with 900 apples. How many?" and task.size == N
    assert task.check(task.problem(2), "it is 1,804, not 7") and not task.check(task.problem(2), "1,804")
    assert (task.declared.sampling, task.declared.max_new_tokens) == ({"temperature": 0.5}, 9)
    for text, words in (
        ("dataset: rows.jsonl\nprompts: a", "key 'prompts'"), ("prompt: a", "names no dataset"), ("[1]", "keys and values"),
        ("dataset: none.jsonl", "no file"), ("a: [", "as YAML"), ("dataset: rows.jsonl\nextract: '('", "regular expression"),
    ):  # fmt: skip
        (tmp_path / "mine.yaml").write_text(text)
        with pytest.raises(TaskError, match=words) as caught:
            get_task(str(tmp_path / "mine.yaml"))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "words"),
    [("longbench", "no subset ''; its subsets are narrativeqa"), ("longbench:foo", "no subset 'foo'"), ("gsm8k:foo", "has no subsets"),
     ("longbench:qasper,depth=1", "length=TOKENS"), ("longbench:qasper,length=many", "whole number")],
)  # fmt: skip
def test_subsets_and_options_that_there_are_not_are_one_sentence(spec: str, words: str) -> None:
    with pytest.raises(TaskError, match=words):
        get_task(spec)
