"""What evaluation promises: loops and divergence counted exactly, a summary that can be checked by hand, and a run that
continues to the records it would have had."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from test_cli import run, sentence
from tiny import TASK, save_tiny, tiny_loaded

from reasonkv import Budget, BudgetError, MethodError, get_method
from reasonkv.evaluate.accuracy import summarize_answers
from reasonkv.evaluate.answers import AnswerRecord, read_answers
from reasonkv.evaluate.evaluator import EvaluateError, EvaluateJob, run_evaluate
from reasonkv.evaluate.generate import Sampling, generate_rows
from reasonkv.evaluate.manifest import ResultsError
from reasonkv.evaluate.matching import mean_physical
from reasonkv.evaluate.records import RecordError, append_records
from reasonkv.evaluate.results import load_results
from reasonkv.evaluate.statistics import clustered_mean
from reasonkv.evaluate.text import first_divergence, repetition
from reasonkv.report.answers_table import answers_caption, answers_tables
from reasonkv.tasks import get_task

BUDGET = Budget(24, interval=12, sinks=2, recent=8, prompt="on_top")
SAMPLING = Sampling(temperature=0.9, top_p=0.9)


# -- text -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "share"),
    [
        ([], 0.0),
        ([1], 0.0),
        ([1, 1], 0.0),
        ([1, 1, 1], 1.0),
        ([5, 1, 1, 1, 6], 0.6),
        ([1, 2, 1, 2, 3], 0.0),
        ([1, 2, 1, 2, 1, 2], 1.0),
        ([9, 1, 2, 1, 2, 1, 2, 1, 8, 7], 0.7),  # the unfinished fourth repeat counts
        ([1, 2, 3, 9, 1, 2, 3, 9, 1, 2, 3], 0.0),  # two repeats and a half
        ([1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 3, 6], 0.0),  # comes back, but not at once
        ([1, 1, 1, 2, 3, 2, 3, 2, 3, 4], 0.9),
        ([1, 1, 1, 1, 2, 2], 4 / 6),
        (list(range(64)) * 3, 1.0),
        (list(range(65)) * 3, 0.0),  # a longer period than counts
        ([7, *list(range(64)) * 3, 8, 9, 10], 192 / 196),
    ],
)
def test_repetition_is_the_share_of_tokens_in_exact_immediate_loops(tokens: list[int], share: float) -> None:
    assert repetition(tokens) == pytest.approx(share, abs=1e-12)


def slow_repetition(tokens: list[int]) -> float:
    inside = [False] * len(tokens)
    for period in range(1, 65):
        for start in range(len(tokens) - 3 * period + 1):
            stop = start + period
            while stop < len(tokens) and tokens[stop] == tokens[stop - period]:
                stop += 1
            if stop - start >= 3 * period:
                inside[start:stop] = [True] * (stop - start)
    return sum(inside) / len(tokens)


def test_repetition_equals_a_direct_search_on_random_texts() -> None:
    generator = torch.Generator().manual_seed(1)
    for words in (2, 2, 3, 3, 4):
        tokens = torch.randint(0, words, (80,), generator=generator).tolist()
        tokens += tokens[:20] * 3 + [9]
        assert repetition(tokens) == pytest.approx(slow_repetition(tokens), abs=1e-12)


def test_divergence_is_the_first_token_that_differs_or_where_one_output_ends() -> None:
    assert first_divergence([1, 2, 3], [1, 2, 3]) is None
    assert first_divergence([1, 2, 3], [1, 9, 3]) == 1
    assert first_divergence([1, 2], [1, 2, 3]) == first_divergence([1, 2, 3], [1, 2]) == 2
    assert first_divergence([], [1]) == 0
    assert first_divergence([4], [5, 6]) == 0


# -- summary ----------------------------------------------------------------------------------------------------------


def answer(example: int = 0, **changes: object) -> AnswerRecord:
    values: dict = {
        "run": "0123456789ab", "method": "snapkv", "options": get_method("snapkv").options(),
        "budget": Budget(128, prompt="count").to_dict(), "task": "program", "example": example, "sample": 0, "seed": 0,
        "prompt_tokens": 90, "output_tokens": 800, "correct": True, "truncated": False, "repetition": 0.0,
        "first_divergence": None, "output": "a", "physical_mean": 170.25, "physical_peak": 255.0,
        "physical_terminal": 200.0, "saved_ratio_terminal": 0.8, "bytes_held": 25, "bytes_peak": 30, "bytes_full": 100,
        "events": 5, "tokens_dropped": 640, "guards": {}, "seconds": 0.5,
    }  # fmt: skip
    return AnswerRecord(**(values | changes))


def cell(name: str, right: list[list[int]], **changes: object) -> list[AnswerRecord]:
    """Answers of one method; `right[example][sample]`."""
    budget = None if name == "full" else Budget(128, prompt="count").to_dict()
    options = get_method(name).options()
    return [
        answer(example, sample=sample, correct=bool(one), method=name, options=options, budget=budget, **changes)
        for example, row in enumerate(right)
        for sample, one in enumerate(row)
    ]


def test_the_summary_s_numbers_by_hand() -> None:
    full, random, rkv = [[1, 1], [1, 1], [1, 0]], [[0, 0], [1, 0], [0, 0]], [[1, 0], [1, 1], [0, 0]]
    answers = [*cell("full", full), *cell("random", random), *cell("rkv", rkv, truncated=True, output_tokens=10)]
    answers[-1] = dataclasses.replace(answers[-1], first_divergence=30, repetition=0.6)
    answers[-2] = dataclasses.replace(answers[-2], first_divergence=10)
    rows = {row.method: row for row in summarize_answers(answers)}
    row = rows["rkv"]
    assert (row.n, row.answers, row.tokens) == (3, 6, 128)
    assert row.estimates["correct"].mean == 0.5
    # cluster sums of (x - 0.5): 0, 1, -1; sqrt(3 / 2 * 2) / 6
    assert row.estimates["correct"].se == pytest.approx(math.sqrt(3) / 6)
    assert row.estimates["correct"] == clustered_mean([1, 0, 1, 1, 0, 0], [0, 0, 1, 1, 2, 2])
    assert row.estimates["truncated"].mean == 1
    assert row.estimates["output_tokens"].mean == 10
    assert row.estimates["repetition"].mean == pytest.approx(0.1)
    assert row.estimates["diverged"].mean == pytest.approx(2 / 6)
    assert row.median_divergence == 20
    assert row.estimates["saved_bytes"].mean == 0.75
    assert row.versus_full is not None
    assert row.versus_full.mean == pytest.approx(0.5 - 5 / 6)
    assert row.versus_full.pairs == 6
    assert row.versus_full.low <= row.versus_full.mean <= row.versus_full.high
    assert row.versus_random is not None
    assert row.versus_random.mean == pytest.approx(0.5 - 1 / 6)
    assert rows["full"].versus_full is None
    assert rows["full"].versus_random is None
    assert rows["random"].versus_random is None
    assert rows["random"].versus_full is not None
    assert rows["full"].median_divergence is None
    json.dumps([row.to_dict() for row in rows.values()], allow_nan=False)


def test_random_at_another_budget_is_no_baseline() -> None:
    answers = [
        *cell("random", [[1], [0]]),
        *(dataclasses.replace(one, budget=Budget(128, prompt="on_top").to_dict()) for one in cell("rkv", [[1], [1]])),
    ]
    rows = {row.method: row for row in summarize_answers(answers)}
    assert rows["rkv"].versus_random is None
    assert rows["rkv"].versus_full is None


def test_the_table_and_its_caption_say_what_was_counted() -> None:
    from rich.console import Console

    answers = [*cell("full", [[1, 1], [1, 0]]), *cell("random", [[0, 1], [0, 0]])]
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for table in answers_tables(summarize_answers(answers)):
        console.print(table)
    text = console.export_text()
    for word in ("full", "random", "accuracy %", "vs full", "75.0 ±25.0", "-50 [", "2 (4)"):
        assert word in text
    caption = answers_caption(answers, Sampling(0.6, 0.95))
    for word in ("program 2", "2 samples each at temperature 0.6", "clustered by problem", "may be dropped", "Seed 0."):
        assert word in caption
    assert "greedy" in answers_caption(cell("full", [[1], [0]]))


# -- files ------------------------------------------------------------------------------------------------------------


def test_an_answer_comes_back_exactly_and_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    written = [answer(0), answer(0, sample=1, first_divergence=3, output="x\ny \u2028 “z”"), answer(1, budget=None)]
    append_records(path, written)
    assert read_answers(path) == written
    assert len({one.key for one in written}) == 3
    whole = path.read_bytes()
    for line, reason in (
        (json.dumps(dataclasses.asdict(answer(5)) | {"correct": "yes"}), "'correct' is not a whole number"),
        (json.dumps({"correct": True}), "has no field"),
        (answer(0).to_json(), "repeats line 1"),
    ):
        path.write_bytes(whole + line.encode() + b"\n")
        with pytest.raises(RecordError, match=reason) as caught:
            read_answers(path)
        assert "line 4" in str(caught.value)


def test_results_are_read_back_whichever_command_wrote_them(tmp_path: Path) -> None:
    for name, words in (("none", "There is no results folder"), ("empty", "holds no results")):
        if name == "empty":
            (tmp_path / name).mkdir()
        with pytest.raises(ResultsError, match=words):
            load_results(tmp_path / name)
    records = run_evaluate(job(), tiny_loaded(), tmp_path / "answers")
    found = load_results(tmp_path / "answers")
    assert found.answers == records
    assert found.records == []
    assert found.manifest["command"] == "evaluate"
    (tmp_path / "answers" / "records.jsonl").write_bytes(b"")
    with pytest.raises(ResultsError, match="no results yet"):
        load_results(tmp_path / "answers")
    (tmp_path / "answers" / "records.jsonl").write_bytes(b"{torn\n")
    with pytest.raises(RecordError, match="line 1"):
        load_results(tmp_path / "answers")
    (tmp_path / "answers" / "manifest.json").write_text("[]")
    with pytest.raises(ResultsError, match="manifest"):
        load_results(tmp_path / "answers")


# -- runs -------------------------------------------------------------------------------------------------------------


def job(**changes: object) -> EvaluateJob:
    values: dict = {
        "tasks": [TASK], "methods": [get_method(name) for name in ("random", "keydiff")], "budgets": [BUDGET],
        "limit": 5, "batch_size": 2, "max_new_tokens": 40,
    }  # fmt: skip
    return EvaluateJob(**(values | changes))


def timeless(records: list[AnswerRecord]) -> dict[str, AnswerRecord]:
    found = {record.key: dataclasses.replace(record, seconds=0.0) for record in records}
    assert len(found) == len(records)
    return found


def test_full_kv_answers_first_and_everyone_is_compared_with_it(tmp_path: Path) -> None:
    loaded = tiny_loaded()
    records = run_evaluate(job(methods=[get_method("keydiff"), get_method("full")]), loaded, tmp_path)
    assert [record.method for record in records] == ["full"] * 5 + ["keydiff"] * 5
    full = {record.example: record for record in records if record.method == "full"}
    assert all(record.first_divergence is None and record.events == 0 for record in full.values())
    prompt = loaded.tokenizer(get_task(TASK).problem(3).prompt, return_tensors="pt").input_ids[0]
    (tokens,) = generate_rows(loaded.model, [prompt], 40)
    assert full[3].output == loaded.tokenizer.decode(tokens, skip_special_tokens=True)
    assert any(record.first_divergence for record in records if record.method == "keydiff")
    assert {record.truncated for record in records} == {True}
    assert {record.output_tokens for record in records} == {40}
    bounded = [record for record in records if record.method == "keydiff"]
    assert all(record.physical_peak <= record.prompt_tokens + 24 + 12 for record in bounded)


def test_without_a_limit_a_method_may_write_a_quarter_more_than_full_kv_s_longest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reasonkv.evaluate.evaluator.FULL_LIMIT", 30)
    records = run_evaluate(job(max_new_tokens=None, limit=2), tiny_loaded(), tmp_path)
    lengths = {name: {r.output_tokens for r in records if r.method == name} for name in ("full", "keydiff")}
    assert lengths == {"full": {30}, "keydiff": {math.ceil(1.25 * 30) + 32}}
    assert all(record.truncated for record in records)


def test_a_rerun_writes_nothing_and_wherever_files_are_cut_it_gives_the_same_records(tmp_path: Path) -> None:
    made = job(samples=2, sampling=SAMPLING, limit=3)
    whole = run_evaluate(made, tiny_loaded(), tmp_path)
    assert len(timeless(whole)) == 3 * 2 * 3
    path, outputs = tmp_path / "records.jsonl", next(tmp_path.glob("outputs-*.jsonl"))
    data, written = path.read_bytes(), outputs.read_bytes()
    assert timeless(run_evaluate(made, tiny_loaded(), tmp_path)) == timeless(whole)
    assert path.read_bytes() == data
    for share in (0.0, 0.11, 0.5, 0.999):
        path.write_bytes(data[: int(len(data) * share)])
        outputs.write_bytes(written[: int(len(written) * max(share, 0.4))])
        assert timeless(run_evaluate(made, tiny_loaded(), tmp_path)) == timeless(whole)
    for changes in ({"samples": 1}, {"sampling": Sampling(0.5)}, {"max_new_tokens": 41}):
        with pytest.raises(ResultsError, match="another command"):
            run_evaluate(dataclasses.replace(made, **changes), tiny_loaded(), tmp_path)


def test_the_batch_changes_no_answer(tmp_path: Path) -> None:
    loaded = tiny_loaded(torch.float64)
    made = job(samples=2, sampling=SAMPLING, limit=3)
    small = run_evaluate(made, loaded, tmp_path / "small")
    large = run_evaluate(dataclasses.replace(made, batch_size=6), loaded, tmp_path / "large")
    assert timeless(small) == timeless(large)
    texts = {(r.example, r.sample): r.output for r in small if r.method == "full"}
    assert len(set(texts.values())) == 6


def test_equal_mean_lengths_are_solved_from_full_kv_s_outputs(tmp_path: Path) -> None:
    prompt = len(get_task(TASK).problem(0).prompt.split())
    budget = dataclasses.replace(BUDGET, interval=4)
    made = job(methods=[get_method("keydiff")], budgets=[budget], mean_slots=[prompt + 16])
    records = run_evaluate(made, tiny_loaded(), tmp_path)
    (fields,) = {json.dumps(r.budget) for r in records if r.budget}
    found = Budget.from_dict(json.loads(fields))
    full = [r for r in records if r.method == "full"]
    lengths = [r.prompt_tokens + r.output_tokens - 1 for r in full]
    mean = mean_physical(found, [r.prompt_tokens for r in full], lengths)
    assert mean == pytest.approx(prompt + 16, rel=0.02)


def test_jobs_that_make_no_sense_are_refused_in_one_sentence() -> None:
    with pytest.raises(EvaluateError, match="Greedy decoding writes 2 equal samples"):
        job(samples=2)
    with pytest.raises(EvaluateError, match="needs a budget"):
        job(budgets=[])
    with pytest.raises(MethodError, match="replay only"):
        job(methods=[get_method("oracle")])
    with pytest.raises(BudgetError, match="24 tokens cannot hold"):
        job(methods=[get_method("snapkv:window=30")]).cells()
    assert [one.label for one in job(methods=[], budgets=[]).cells()] == ["full"]


# -- command line -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("models") / "tiny"))


def evaluate(model: str, out: Path, *extra: object) -> tuple[int, str, str]:
    basis = ["--task", TASK, "--methods", "random,keydiff", "--budgets", "24", "--limit", "2", "--interval", "12"]
    more = ["--sinks", "2", "--recent", "8", "--prompt-policy", "on_top", "--max-new-tokens", "40", "--batch-size", "2"]
    return run("evaluate", "--model", model, *basis, *more, "--out", out, *extra)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--samples", "3"], "Greedy decoding writes 3 equal samples; give --temperature"),
        (["--samples", "0"], "--samples"),
        (["--temperature", "-1"], "--temperature"),
        (["--max-new-tokens", "0"], "--max-new-tokens"),
        (["--methods", "full,snapvk"], "did you mean 'snapkv'?"),
        (["--methods", "full,oracle"], "replay only"),
        (["--budgets", "9"], "9 tokens cannot hold 2 sinks and 8 recent"),
        (["--mean-slots", "200"], "Give either --budgets or --mean-slots."),
        (["--task", "programme"], "There is no task 'programme'"),
        (["--limit", "0"], "--limit must be at least 1"),
        (["--prompt-policy", "keep", "--budgets", "60"], "leave no room in 60 tokens"),
        (["--model", "/no/such/folder"], "There is no folder /no/such/folder"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    model: str, tmp_path: Path, arguments: list[str], words: str
) -> None:
    code, stdout, stderr = evaluate(model, tmp_path / "out", *arguments)
    assert words in sentence(code, stdout, stderr)
    assert code == 2


def test_evaluate_prints_a_table_and_json_and_refuses_another_command_s_folder(model: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, stdout, stderr = evaluate(model, out)
    assert code == 0
    for word in ("full", "random", "keydiff", "accuracy %", "Records:", "clustered by problem"):
        assert word in stdout
    assert "keydiff @ 24: 2 in" in stderr
    code, stdout, _ = evaluate(model, out, "--json")
    rows = json.loads(stdout)["rows"]
    assert [(row["method"], row["tokens"], row["n"]) for row in rows] == [
        ("full", None, 2),
        ("random", 24, 2),
        ("keydiff", 24, 2),
    ]
    assert rows[2]["versus_random"]["pairs"] == 2
    code, stdout, stderr = evaluate(model, out, "--seed", "1")
    assert "seed 0, not 1" in sentence(code, stdout, stderr)


def test_full_kv_alone_needs_no_budget(model: str, tmp_path: Path) -> None:
    arguments = [
        "--task",
        TASK,
        "--methods",
        "full",
        "--limit",
        "2",
        "--max-new-tokens",
        "8",
        "--out",
        tmp_path / "out",
    ]
    code, stdout, _ = run("evaluate", "--model", model, *arguments, "--json")
    assert code == 0
    assert [row["method"] for row in json.loads(stdout)["rows"]] == ["full"]
    assert "Give either --budgets" in run("evaluate", "--task", TASK, "--out", tmp_path / "other")[2]
