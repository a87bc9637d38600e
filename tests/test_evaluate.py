"""What generation runs promise: loops and divergence counted exactly, answers compared with full KV's own, and a run
that is killed continues to the records it would have had."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from test_decoding import generate
from tiny import TASK, tiny_loaded

from reasonkv.budget import Budget, BudgetError
from reasonkv.evaluate.cells import check_job, count_steps, make_config
from reasonkv.evaluate.decoding import Request
from reasonkv.evaluate.generate import first_divergence, repetition
from reasonkv.evaluate.job import BudgetOptions, GenerateJob, JobError, ReplayJob, Sampling, TuneJob
from reasonkv.evaluate.manifest import ResultsError
from reasonkv.evaluate.matching import mean_physical
from reasonkv.evaluate.records import AnswerRecord
from reasonkv.evaluate.run import run
from reasonkv.methods import MethodError
from reasonkv.tasks import TaskError, get_task

RULE = {"interval": 12, "sinks": 2, "recent": 8, "prompt": "on_top"}
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


# -- jobs -------------------------------------------------------------------------------------------------------------


def job(**changes: object) -> GenerateJob:
    values: dict = {
        "task": TASK, "methods": "random,keydiff", "budget": BudgetOptions(tokens=(24,), **RULE),
        "limit": 5, "batch_size": 2, "max_new_tokens": 40,
    }  # fmt: skip
    return GenerateJob(**(values | changes))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"samples": 2}, JobError, "Greedy decoding writes 2 equal samples"),
        ({"samples": 0}, JobError, "samples must be a whole number of at least 1, not 0"),
        ({"limit": 0}, JobError, "limit must be a whole number"),
        ({"task": ""}, JobError, "task names nothing"),
        ({"budget": BudgetOptions()}, JobError, "needs a budget"),
        ({"methods": "oracle"}, MethodError, "replay only"),
        ({"methods": "snapvk"}, MethodError, "did you mean"),
        ({"task": "programme"}, TaskError, "no task"),
        ({"methods": "snapkv:window=30"}, BudgetError, "24 tokens cannot hold"),
        ({"budget": BudgetOptions(mean_slots=(90,)), "methods": "quest"}, BudgetError, "Mean slots are matched"),
    ],
)
def test_jobs_that_make_no_sense_are_refused_in_one_sentence_before_a_model_loads(
    changes: dict, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words) as caught:
        check_job(job(**changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: BudgetOptions(tokens=(9,), mean_slots=(90,)), "one of tokens and mean_slots"),
        (lambda: BudgetOptions(tokens=(9,), window=64), "one of tokens and window"),
        (lambda: BudgetOptions(window=64, retention=()), "at least one retention"),
        (lambda: Sampling(-1.0), "temperature must be"),
        (lambda: Sampling(1.0, 0.0), "top_p must"),
        (lambda: TuneJob(task=TASK, budget=BudgetOptions(tokens=(9,))), "finds the budget itself"),
        (lambda: TuneJob(task=TASK, resolution=1.0), "above 1"),
        (lambda: make_config("rkv", BudgetOptions()), "rkv needs one budget"),
        (lambda: make_config("rkv", BudgetOptions(tokens=(90, 99))), "rkv needs one budget"),
        (lambda: make_config("full", BudgetOptions(tokens=(90,))), "full takes no budget"),
    ],
)
def test_options_that_contradict_each_other_are_one_sentence(make: object, words: str) -> None:
    with pytest.raises(JobError, match=words):
        make()  # type: ignore[operator]


def test_every_bounded_method_meets_every_budget_and_full_kv_answers_first() -> None:
    labels = [one.label for one in check_job(job(methods="keydiff,full,random", budget=BudgetOptions(tokens=(90, 99))))]
    assert labels == ["full", "keydiff @ 90", "keydiff @ 99", "random @ 90", "random @ 99"]
    assert [one.label for one in check_job(job(methods="full", budget=BudgetOptions()))] == ["full"]
    windows = BudgetOptions(window=64, window_buffer=16, retention=(0.25, 0.5))
    assert [one.label for one in check_job(ReplayJob(task=TASK, methods="kara", budget=windows))][:1] == [
        "kara @ 16 of every 64"
    ]
    means = BudgetOptions(mean_slots=(100, 120), **RULE)
    assert count_steps(job(budget=means)) == 1 + 2 * 2
    assert count_steps(ReplayJob(task=[TASK, "recall"], methods="full,random", budget=means)) == 2 * (1 + 1 + 2)


# -- runs -------------------------------------------------------------------------------------------------------------


def timeless(records: list[AnswerRecord]) -> dict[str, AnswerRecord]:
    found = {record.key: record.model_copy(update={"seconds": 0.0}) for record in records}
    assert len(found) == len(records)
    return found


def test_full_kv_answers_first_and_everyone_is_compared_with_it(tmp_path: Path) -> None:
    loaded = tiny_loaded()
    records = run(job(methods=("keydiff", "full")), loaded, tmp_path)
    assert [record.method for record in records] == ["full"] * 5 + ["keydiff"] * 5
    full = {record.example: record for record in records if record.method == "full"}
    assert all(record.first_divergence is None and record.events == 0 for record in full.values())
    prompt = loaded.tokenizer(get_task(TASK).problem(3).prompt, return_tensors="pt").input_ids[0]
    tokens = generate(loaded.model, Request(prompt, 40))
    assert full[3].output == loaded.tokenizer.decode(tokens, skip_special_tokens=True)
    assert any(record.first_divergence for record in records if record.method == "keydiff")
    assert {record.truncated for record in records} == {True}
    assert {record.output_tokens for record in records} == {40}
    bounded = [record for record in records if record.method == "keydiff"]
    assert all(record.physical_peak <= record.prompt_tokens + 24 + 12 for record in bounded)


def test_without_a_limit_a_method_may_write_a_quarter_more_than_full_kv_s_longest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reasonkv.evaluate.run.FULL_LIMIT", 30)
    records = run(job(max_new_tokens=None, limit=2), tiny_loaded(), tmp_path)
    lengths = {name: {r.output_tokens for r in records if r.method == name} for name in ("full", "keydiff")}
    assert lengths == {"full": {30}, "keydiff": {math.ceil(1.25 * 30) + 32}}
    assert all(record.truncated for record in records)


def test_wherever_files_are_cut_the_rerun_gives_the_same_records_and_another_job_is_refused(tmp_path: Path) -> None:
    sampled = {"samples": 2, "sampling": SAMPLING, "limit": 3}
    whole = run(job(**sampled), tiny_loaded(), tmp_path)
    assert len(timeless(whole)) == 3 * 2 * 3
    path, outputs = tmp_path / "records.jsonl", next(tmp_path.glob("outputs-*.jsonl"))
    data, written = path.read_bytes(), outputs.read_bytes()
    for share in (1.0, 0.0, 0.11, 0.5, 0.999):
        path.write_bytes(data[: int(len(data) * share)])
        outputs.write_bytes(written[: int(len(written) * max(share, 0.4))])
        assert timeless(run(job(**sampled), tiny_loaded(), tmp_path)) == timeless(whole)
        assert share < 1 or path.read_bytes() == data, "a rerun of a whole run writes nothing"
    for changes in ({"samples": 1}, {"sampling": Sampling(0.5)}, {"max_new_tokens": 41}):
        with pytest.raises(ResultsError, match="another command"):
            run(job(**(sampled | changes)), tiny_loaded(), tmp_path)


def test_the_batch_changes_no_answer(tmp_path: Path) -> None:
    loaded = tiny_loaded(torch.float64)
    small, large = (
        run(job(samples=2, sampling=SAMPLING, limit=3, batch_size=size), loaded, tmp_path / str(size))
        for size in (2, 6)
    )
    assert timeless(small) == timeless(large)
    texts = {(r.example, r.sample): r.output for r in small if r.method == "full"}
    assert len(set(texts.values())) == 6


def test_equal_mean_lengths_are_solved_from_full_kv_s_outputs(tmp_path: Path) -> None:
    prompt = len(get_task(TASK).problem(0).prompt.split())
    budget = BudgetOptions(mean_slots=(prompt + 16,), **(RULE | {"interval": 4}))
    records = run(job(methods="keydiff", budget=budget), tiny_loaded(), tmp_path)
    (fields,) = {json.dumps(r.budget) for r in records if r.budget}
    found = Budget.from_dict(json.loads(fields))
    full = [r for r in records if r.method == "full"]
    lengths = [r.prompt_tokens + r.output_tokens - 1 for r in full]
    mean = mean_physical(found, [r.prompt_tokens for r in full], lengths)
    assert mean == pytest.approx(prompt + 16, rel=0.02)
