"""What `reasonkv frontier` and `reasonkv tune` promise: usable budgets from folders, searches, one sentence for mistakes."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from command_line import Result, run, sentence
from tiny import TASK, save_tiny

from reasonkv.budget import Budget
from reasonkv.evaluate.manifest import MANIFEST, Manifest
from reasonkv.evaluate.records import RECORDS, AnswerRecord, ReplayRecord, append_records
from reasonkv.methods import CATALOGUE
from reasonkv.report.style import FIXED, styles

PNG = b"\x89PNG"
N = 16


def frontier(*arguments: object) -> Result:
    return run("frontier", *arguments)


def fields(example: int, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "run": "0123456789ab", "method": "rkv", "options": {}, "budget": None, "task": "program", "example": example,
        "seed": 0, "prompt_tokens": 90, "output_tokens": 800, "physical_mean": 200.0, "physical_peak": 300.0,
        "physical_terminal": 250.0, "saved_ratio_terminal": 0.7, "bytes_held": 10, "bytes_peak": 12, "bytes_full": 100,
        "events": 5, "tokens_dropped": 640, "seconds": 0.5,
    }  # fmt: skip
    return values | changes


def record(example: int, **changes: Any) -> ReplayRecord:
    scores = {"trace_correct": True, "top1": 0.75, "top5": 0.9, "nll": 0.3, "kl": 1e-9, "first_mismatch": None}
    return ReplayRecord(**(fields(example) | scores | changes))


def answer(example: int, correct: bool, budget: dict[str, Any] | None) -> AnswerRecord:
    own = {
        "sample": 0,
        "correct": correct,
        "truncated": False,
        "repetition": 0.0,
        "first_divergence": None,
        "output": "7",
    }
    method = {"method": "rkv" if budget else "full", "budget": budget, "events": 5 if budget else 0}
    return AnswerRecord(**(fields(example) | own | method))


def full(**changes: Any) -> list[ReplayRecord]:
    return [record(i, method="full", events=0, **({"top1": 1.0} | changes)) for i in range(N)]


def cell(method: str, tokens: int, top1: float, **changes: Any) -> list[ReplayRecord]:
    budget = Budget(tokens=tokens, recent=8, prompt="on_top").to_dict()
    values = {"method": method, "budget": budget, "bytes_held": tokens * 100, **changes}
    return [record(i, top1=min(1.0, top1 + 0.01 * (i % 2)), **values) for i in range(N)]


def folder(path: Path, records: Sequence[ReplayRecord | AnswerRecord], command: str = "replay") -> Path:
    path.mkdir()
    manifest = Manifest(command=command, arguments={}, model={"name": "tiny", "hash": "0" * 16}, device="CPU")
    manifest.write(path / MANIFEST)
    append_records(path / RECORDS, records)
    return path


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return folder(
        tmp_path / "results",
        [
            *full(), *cell("random", 64, 0.5), *cell("random", 128, 0.7), *cell("random", 256, 0.8),
            *cell("keydiff", 64, 0.6), *cell("keydiff", 128, 0.9), *cell("keydiff", 256, 0.97),
            *cell("knorm", 256, 0.99, events=0),
        ],
    )  # fmt: skip


# -- results folders --------------------------------------------------------------------------------------------------


def test_usable_budgets_crossings_and_regimes_are_shown(results: Path) -> None:
    code, out, err = frontier(results, "--target", "0.9x")
    assert (code, err) == (0, "")
    assert "program: usable budget for top1 >= 0.9 x full KV" in out
    assert re.search(r"random\s+64 to 256\s+16\s+> 256\s+> 256\s+not reached", out)
    assert re.search(r"keydiff\s+64 to 256\s+16\s+12\d\s+\[12\d, 12\d\]\s+reached", out)
    assert re.search(r"knorm\s+-\s+-\s+-\s+-\s+no compressed record", out)
    assert re.search(r"keydiff@128 > random@256\s+90.50 : 80.50\s+10.00\s+\[10.00, 10.00\]\s+16\s+\S+\s+yes", out)
    assert re.search(r"program\s+96\s+0\s+16", out)
    assert "Only compressed records count; left out: 16 uncompressed of 112 bounded records." in out


def test_fidelity_is_measured_by_kl_and_top1_and_a_target_that_random_keeps_is_said(results: Path) -> None:
    code, out, _ = frontier(results)
    assert code == 0
    assert out.index("usable budget for kl <= 0.05") < out.index("usable budget for top1 >= 0.99")
    data = json.loads(frontier(results, "--json").stdout)
    assert (data["target"], data["others"]["top1"]["target"]) == ("kl <= 0.05", "top1 >= 0.99")
    assert "even random" not in frontier(results, "--target", "0.9").stdout
    told = " ".join(frontier(results, "--target", "0.75").stdout.split())
    assert re.search(r"On program even random keeps top1 >= 0.75 from 1[67]\d on", told)


def test_fewer_than_eight_examples_have_no_interval(tmp_path: Path) -> None:
    few = [*full()[:4], *cell("random", 64, 0.5)[:4], *cell("keydiff", 64, 0.7)[:4], *cell("keydiff", 128, 0.9)[:4]]
    out = frontier(folder(tmp_path / "few", few), "--target", "0.8").stdout
    assert re.search(r"keydiff\s+64 to 128\s+4\s+\d+\s+-\s+reached", out)
    data = json.loads(frontier(tmp_path / "few", "--between", "keydiff > random", "--target", "0.8", "--json").stdout)
    (pair,) = data["crossings"]
    assert (pair["difference"]["low"], pair["difference"]["high"], pair["holds"]) == (None, None, False)


def test_two_named_methods_are_compared_at_equal_and_smaller_budgets_only(results: Path) -> None:
    code, out, err = frontier(results, "--metric", "top1", "--between", "keydiff > random")
    assert (code, err) == (0, "")
    shown = re.findall(r"keydiff@\d+ > random@\d+", out)
    assert shown == [f"keydiff@{ours} > random@{theirs}" for ours in (64, 128, 256) for theirs in (64, 128, 256)
                     if ours <= theirs]  # fmt: skip
    assert "surely better than random in 3 of 3 pairs at the same budget, and in 1 of 3 pairs at a smaller one" in out
    data = json.loads(frontier(results, "--metric", "top1", "--between", "keydiff > random", "--json").stdout)
    assert data["between"] == ["keydiff", "random"]
    losing = next(one for one in data["crossings"] if one["label"] == "keydiff@64 > random@128")
    assert not losing["holds"]
    assert losing["difference"]["high"] < 0


def test_json_has_everything_and_the_same_numbers(results: Path) -> None:
    code, out, _ = frontier(results, "--target", "0.9x", "--json")
    assert code == 0
    data = json.loads(out)
    assert (data["metric"], data["axis"], data["figure"]) == ("top1", "tokens", None)
    usable = {one["method"]: one for one in data["usable"]}
    assert usable["keydiff"]["tokens"] == pytest.approx(128, rel=0.05)
    assert usable["random"]["status"] == "not reached"
    assert data["regimes"] == {"program": {"compressed": 96, "uncompressed": 16}}
    assert {one["label"] for one in data["crossings"] if one["holds"]} == {"keydiff@128 > random@256"}
    assert {(one["method"], one["tokens"]) for one in data["points"]} >= {("keydiff", 64), ("knorm", 256)}


def test_other_axes_and_metrics(results: Path) -> None:
    data = json.loads(frontier(results, "--target", "0.9x", "--axis", "bytes_held", "--json").stdout)
    found = {one["method"]: one["tokens"] for one in data["usable"] if "tokens" in one}
    assert found["keydiff"] == pytest.approx(12_800, rel=0.05)
    assert json.loads(frontier(results, "--metric", "kl", "--json").stdout)["target"] == "kl <= 0.05"


def test_accuracy_is_the_metric_of_an_evaluation(tmp_path: Path) -> None:
    budgets = [Budget(tokens=tokens, recent=8, prompt="on_top").to_dict() for tokens in (64, 128)]
    answers = [answer(i, True, None) for i in range(N)]
    answers += [answer(i, i < N // 2, budgets[0]) for i in range(N)] + [answer(i, True, budgets[1]) for i in range(N)]
    code, out, _ = frontier(folder(tmp_path / "answers", answers, "evaluate"), "--json")
    assert code == 0
    data = json.loads(out)
    assert data["metric"] == "accuracy"
    assert 64 < data["usable"][0]["tokens"] < 128
    assert data["warnings"] == []


def test_budgets_that_mean_nothing_are_called_so(tmp_path: Path) -> None:
    budget = Budget(tokens=64, recent=8, prompt="on_top").to_dict()
    answers = [answer(i, False, given) for given in (None, budget) for i in range(N)]
    code, out, _ = frontier(folder(tmp_path / "answers", answers, "evaluate"))
    assert code == 0
    assert "Warning: full KV answers 0% of program right (n = 16), so accuracies at any budget mean nothing." in out


def test_folders_of_one_kind_are_joined_and_budget_rules_told_apart(results: Path, tmp_path: Path) -> None:
    counted = [Budget(tokens=tokens, prompt="count").to_dict() for tokens in (64 + 4, 128)]
    other = [record(i, budget=budget, method="streaming") for budget in counted for i in range(N)]
    more = folder(tmp_path / "more", [*cell("streaming", 128, 0.95), *other])
    code, out, _ = frontier(results, more, "--target", "0.9")
    assert code == 0
    assert "keydiff" in out and "streaming" in out
    assert "prompt=count" in out and "prompt=on_top" in out


def test_the_figure_is_drawn_from_compressed_records_only(results: Path, tmp_path: Path) -> None:
    code, out, _ = frontier(results, "--figure", tmp_path / "frontier.png")
    assert code == 0
    assert "Figure:" in out
    assert (tmp_path / "frontier.png").read_bytes().startswith(PNG)
    idle = folder(tmp_path / "idle", cell("rkv", 512, 1.0, events=0))
    assert "No record is compressed" in sentence(frontier(idle, "--target", "0.9", "--figure", tmp_path / "none.png"))


def test_a_relative_target_where_full_kv_has_nothing_is_not_called_usable(tmp_path: Path) -> None:
    code, out, _ = frontier(folder(tmp_path / "zero", [*full(top1=0.0), *cell("rkv", 64, 0.0)]), "--target", "0.95x")
    assert code == 0
    assert re.search(r"rkv\s+-\s+-\s+-\s+-\s+full KV's top1 is 0", out)


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("frontier", "Give results folders"),
        ("frontier nowhere", "There is no results folder nowhere"),
        ("frontier RESULTS --metric accuracy", "not accuracy"),
        ("frontier RESULTS --metric bleu", '"bleu" for --metric; choose from'),
        ("frontier RESULTS --target lots", "not 'lots'"),
        ("frontier RESULTS --metric kl --target 0.9x", "absolute"),
        ("frontier RESULTS --axis time", '"time" for --axis; choose from'),
        ("frontier RESULTS --between rkv", "takes two methods"),
        ("frontier RESULTS --between rkv>random", "'rkv'"),
        ("frontier RESULTS --figure RESULTS", "is a folder"),
        ("frontier RESULTS --task program", "`reasonkv tune` searches for budgets now"),
        ("tune --task program", "Give --out a value"),
        ("tune --task program --methods full --out RESULTS/x", "bounded method"),
        ("tune --task program --methods rkv --out RESULTS/x --resolution 1", "above 1"),
        ("tune --task program --methods rkv --out RESULTS/x --budgets 64", "Unknown option: --budgets"),
        ("tune --task program --methods oracle --out RESULTS/x --metric accuracy", "oracle"),
        ("tune --task program --methods quest --out RESULTS/x", "quest drops nothing"),
    ],
)
def test_mistakes_are_one_sentence(results: Path, arguments: str, words: str) -> None:
    assert words in sentence(run(*(one.replace("RESULTS", str(results)) for one in arguments.split())))


def test_full_kv_alone_and_relative_targets_without_it_are_refused(tmp_path: Path) -> None:
    assert "full KV alone" in sentence(frontier(folder(tmp_path / "alone", full())))
    without = folder(tmp_path / "without", cell("rkv", 64, 0.5))
    assert "add full to --methods" in sentence(frontier(without, "--target", "0.95x"))


def test_a_damaged_record_fails_with_1(results: Path) -> None:
    with (results / RECORDS).open("a") as file:
        file.write("{\n")
    assert "line 129" in sentence(frontier(results), code=1)


# -- searches ---------------------------------------------------------------------------------------------------------

SEARCH = ["--task", TASK, "--methods", "streaming,random", "--limit", 2, "--batch-size", 2, "--max-new-tokens", 30,
          "--sinks", 2, "--recent", 8, "--resolution", 1.5]  # fmt: skip


def test_a_search_runs_reports_and_resumes(tmp_path: Path) -> None:
    model, out = save_tiny(tmp_path / "tiny"), tmp_path / "search"
    command = ["tune", *SEARCH, "--model", model, "--out", out, "--target", "0.9x", "--interval"]
    code, said, err = run(*command, 4)
    assert code == 0
    assert "usable budget for top1 >= 0.9 x full KV" in said
    assert re.search(r"streaming @ 10: top1 0\.\d+, (kept|missed)", err)
    lines = (out / RECORDS).read_bytes()
    code, again, _ = run(*command, 4, "--json")
    assert code == 0
    data = json.loads(again)
    assert [one["method"] for one in data["searches"]] == ["streaming", "random"]
    assert data["searches"][0]["probes"][0]["tokens"] == 10
    assert (out / RECORDS).read_bytes() == lines
    assert frontier(out, "--json").exit_code == 0  # the folder is one like any other
    assert said.count("CompressedCache(model, ") == sum(one["tokens"] is not None for one in data["searches"])
    assert "interval=4" in sentence(run(*command, 8))


# -- styles -----------------------------------------------------------------------------------------------------------


def test_every_catalogue_method_has_one_style_whatever_stands_beside_it() -> None:
    bounded = [name for name in CATALOGUE if name != "full"]
    assert set(bounded) <= set(FIXED)
    assert styles(bounded) == {name: FIXED[name] for name in bounded}
    assert styles(["rkv"])["rkv"] == styles(["new", "snapkv", "rkv"])["rkv"]
    assert styles(["snapkv:window=16"])["snapkv:window=16"] == FIXED["snapkv"]


def test_forty_names_and_variants_are_all_different() -> None:
    names = [*FIXED, *(f"new{i}" for i in range(25)), "rkv:variant=vase", "rkv:window=4", "new3:a=1"]
    found = styles(names)
    assert list(found) == names
    assert len(set(found.values())) == len(names)
    assert found["rkv:variant=vase"].colour == found["rkv"].colour
    assert styles(names) == found
