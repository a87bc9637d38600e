"""What `reasonkv frontier` and its figures promise: usable budgets from folders, searches, and one sentence for mistakes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from test_records import record
from tiny import TASK, save_tiny
from typer.testing import CliRunner

from reasonkv.budget import Budget
from reasonkv.cli import app
from reasonkv.evaluate.answers import AnswerRecord
from reasonkv.evaluate.manifest import Manifest
from reasonkv.evaluate.records import Record, append_records
from reasonkv.methods import CATALOGUE
from reasonkv.report.marks import marks
from reasonkv.report.style import FIXED, styles

PNG = b"\x89PNG"
N = 16


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["frontier", *(str(argument) for argument in arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def folder(
    path: Path, records: list[Record] | list[AnswerRecord], command: str = "replay", **arguments: object
) -> Path:
    path.mkdir()
    Manifest(command, arguments, {"name": "tiny", "hash": "0" * 16}, "CPU", {}, "today").write(path / "manifest.json")
    append_records(path / "records.jsonl", records)
    return path


def cell(method: str, tokens: int, top1: float, **changes: object) -> list[Record]:
    budget = Budget(tokens, recent=8, prompt="on_top").to_dict()
    values = {"method": method, "options": {}, "budget": budget, "bytes_held": tokens * 100, **changes}
    return [record(i, top1=top1 + 0.01 * (i % 2), **values) for i in range(N)]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    full = [record(i, method="full", options={}, budget=None, events=0, top1=1.0) for i in range(N)]
    return folder(
        tmp_path / "results",
        [
            *full, *cell("random", 64, 0.5), *cell("random", 128, 0.7), *cell("random", 256, 0.8),
            *cell("keydiff", 64, 0.6), *cell("keydiff", 128, 0.9), *cell("keydiff", 256, 0.97),
            *cell("knorm", 256, 0.99, events=0),
        ],
    )  # fmt: skip


def answer(example: int, correct: bool, budget: dict[str, object] | None) -> AnswerRecord:
    return AnswerRecord(
        run="0123456789ab", method="rkv" if budget else "full", options={}, budget=budget, task="program",
        example=example, sample=0, seed=0, prompt_tokens=90, output_tokens=800, correct=correct, truncated=False,
        repetition=0.0, first_divergence=None, output="7", physical_mean=200.0, physical_peak=300.0,
        physical_terminal=250.0, saved_ratio_terminal=0.7, bytes_held=10, bytes_peak=12, bytes_full=100,
        events=5 if budget else 0, tokens_dropped=600, guards={}, seconds=0.5,
    )  # fmt: skip


# -- results folders --------------------------------------------------------------------------------------------------


def test_usable_budgets_crossings_and_regimes_are_shown(results: Path) -> None:
    code, out, err = run(results, "--target", "0.9x")
    assert (code, err) == (0, "")
    assert "program: usable budget for top1 >= 0.9 x full KV" in out
    assert re.search(r"random\s+64 to 256\s+16\s+> 256\s+> 256\s+not reached", out)
    assert re.search(r"keydiff\s+64 to 256\s+16\s+12\d\s+\[12\d, 12\d\]\s+reached", out)
    assert re.search(r"knorm\s+-\s+-\s+-\s+-\s+no decode-active record", out)
    assert re.search(r"keydiff@128 > random@256\s+90.50 : 80.50\s+10.00\s+\[10.00, 10.00\]\s+16\s+\S+\s+yes", out)
    assert re.search(r"program\s+96\s+0\s+16", out)
    assert "Only decode-active records count; left out: 16 uncompressed of 112 bounded records." in out


def test_two_named_methods_are_compared_at_equal_and_smaller_budgets_only(results: Path) -> None:
    code, out, err = run(results, "--between", "keydiff > random")
    assert (code, err) == (0, "")
    shown = re.findall(r"keydiff@\d+ > random@\d+", out)
    assert shown == [f"keydiff@{ours} > random@{theirs}" for ours in (64, 128, 256) for theirs in (64, 128, 256)
                     if ours <= theirs]  # fmt: skip
    assert "surely better than random in 3 of 3 pairs at the same budget, and in 1 of 3 pairs at a smaller one" in out
    code, out, _ = run(results, "--between", "keydiff > random", "--json")
    assert json.loads(out)["between"] == ["keydiff", "random"]
    losing = next(one for one in json.loads(out)["crossings"] if one["label"] == "keydiff@64 > random@128")
    assert not losing["holds"]
    assert losing["difference"]["high"] < 0


def test_json_has_everything_and_the_same_numbers(results: Path) -> None:
    code, out, _ = run(results, "--target", "0.9x", "--json")
    assert code == 0
    data = json.loads(out)
    assert (data["metric"], data["axis"], data["figure"]) == ("top1", "tokens", None)
    usable = {one["method"]: one for one in data["usable"]}
    assert usable["keydiff"]["tokens"] == pytest.approx(128, rel=0.05)
    assert usable["random"]["status"] == "not reached"
    assert data["regimes"] == {"program": {"decode-active": 96, "uncompressed": 16}}
    held = {one["label"] for one in data["crossings"] if one["holds"]}
    assert held == {"keydiff@128 > random@256"}
    assert {(one["method"], one["tokens"]) for one in data["points"]} >= {("keydiff", 64), ("knorm", 256)}


def test_other_axes_and_metrics(results: Path) -> None:
    _, out, _ = run(results, "--target", "0.9x", "--axis", "bytes_held", "--json")
    found = {one["method"]: one["tokens"] for one in json.loads(out)["usable"] if "tokens" in one}
    assert found["keydiff"] == pytest.approx(12_800, rel=0.05)
    _, out, _ = run(results, "--metric", "kl", "--json")
    assert json.loads(out)["target"] == "kl <= 0.05"


def test_accuracy_is_the_metric_of_an_evaluation(tmp_path: Path) -> None:
    budgets = [Budget(tokens, recent=8, prompt="on_top").to_dict() for tokens in (64, 128)]
    answers = [answer(i, True, None) for i in range(N)]
    answers += [answer(i, i < N // 2, budgets[0]) for i in range(N)] + [answer(i, True, budgets[1]) for i in range(N)]
    made = folder(tmp_path / "answers", answers, "evaluate")
    code, out, _ = run(made, "--json")
    assert code == 0
    data = json.loads(out)
    assert data["metric"] == "accuracy"
    assert 64 < data["usable"][0]["tokens"] < 128


def test_folders_of_one_kind_are_joined(results: Path, tmp_path: Path) -> None:
    more = folder(tmp_path / "more", cell("streaming", 128, 0.95))
    code, out, _ = run(results, more, "--json", "--target", "0.9")
    assert code == 0
    assert {one["method"] for one in json.loads(out)["usable"]} >= {"streaming", "keydiff"}


def test_budget_rules_are_told_apart(results: Path, tmp_path: Path) -> None:
    counted = [Budget(tokens, recent=8, prompt="count").to_dict() for tokens in (64, 128)]
    more = folder(
        tmp_path / "more", [record(i, budget=b, method="random", options={}) for b in counted for i in range(N)]
    )
    _, out, _ = run(results, more)
    assert "prompt=count" in out
    assert "prompt=on_top" in out


def test_the_figure_is_drawn_from_decode_active_records_only(results: Path, tmp_path: Path) -> None:
    code, out, _ = run(results, "--figure", tmp_path / "frontier.png")
    assert code == 0
    assert "Figure:" in out
    assert (tmp_path / "frontier.png").read_bytes().startswith(PNG)
    idle = folder(tmp_path / "idle", cell("rkv", 512, 1.0, events=0))
    code, _, err = run(idle, "--target", "0.9", "--figure", tmp_path / "none.png")
    assert code == 2
    assert err.startswith("Error: No record is decode-active")


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "Give results folders, or --task"), (["nowhere"], "There is no results folder nowhere"),
        (["RESULTS", "--metric", "accuracy"], "not accuracy"), (["RESULTS", "--metric", "bleu"], "must be one of"),
        (["RESULTS", "--target", "lots"], "not 'lots'"), (["RESULTS", "--metric", "kl", "--target", "0.9x"], "absolute"),
        (["RESULTS", "--axis", "time"], "--axis must be one of"), (["RESULTS", "--task", "program"], "not both"),
        (["RESULTS", "--between", "rkv"], "takes two methods"), (["RESULTS", "--between", "rkv > random"], "'rkv'"),
        (["--task", "program", "--between", "rkv > random"], "reads finished results"),
        (["--task", "program"], "needs --methods and --out as well"), (["RESULTS", "--figure", "RESULTS"], "folder"),
        (["--task", "program", "--methods", "full", "--out", "RESULTS/x"], "bounded method"),
        (["--task", "program", "--methods", "rkv", "--out", "RESULTS/x", "--resolution", "1"], "above 1"),
        (["--task", "program", "--methods", "rkv", "--out", "RESULTS/x", "--axis", "bytes_held"], "over tokens"),
        (["--task", "program", "--methods", "oracle", "--out", "RESULTS/x", "--metric", "accuracy"], "oracle"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence(results: Path, arguments: list[str], words: str) -> None:
    code, out, err = run(*(one.replace("RESULTS", str(results)) for one in arguments))
    assert (code, out) == (2, "")
    assert err.startswith("Error: ")
    assert err.count("\n") == 1
    assert words in err


def test_full_kv_alone_and_relative_targets_without_it_are_refused(tmp_path: Path) -> None:
    alone = folder(tmp_path / "alone", [record(0, method="full", options={}, budget=None)])
    assert "full KV alone" in run(alone)[2]
    without = folder(tmp_path / "without", cell("rkv", 64, 0.5))
    assert "add full to --methods" in run(without)[2]


def test_a_damaged_record_fails_with_1(results: Path) -> None:
    with (results / "records.jsonl").open("a") as file:
        file.write("{\n")
    code, _, err = run(results)
    assert code == 1
    assert "line 129" in err


# -- searches ---------------------------------------------------------------------------------------------------------

SEARCH = ["--task", TASK, "--methods", "streaming,random", "--limit", "2", "--batch-size", "2", "--max-new-tokens", "30",
          "--interval", "4", "--sinks", "2", "--recent", "8", "--prompt-policy", "on_top", "--resolution", "1.5"]  # fmt: skip


def test_a_search_runs_reports_and_resumes(tmp_path: Path) -> None:
    model, out = save_tiny(tmp_path / "tiny"), tmp_path / "search"
    command = [*SEARCH, "--model", model, "--out", out, "--target", "0.9x"]
    code, said, err = run(*command)
    assert code == 0
    assert "usable budget for top1 >= 0.9 x full KV" in said
    assert re.search(r"streaming @ 10: top1 0\.\d+, (kept|missed)", err)
    lines = (out / "records.jsonl").read_bytes()
    code, again, _ = run(*command, "--json")
    assert code == 0
    data = json.loads(again)
    assert [one["method"] for one in data["searches"]] == ["streaming", "random"]
    assert data["searches"][0]["probes"][0]["tokens"] == 10
    assert (out / "records.jsonl").read_bytes() == lines
    assert run(out, "--json")[0] == 0  # the folder is one like any other
    code, _, err = run(*command, "--interval", "8")
    assert code == 2
    assert "rule" in err


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


def test_the_report_uses_the_same_styles() -> None:
    (one,) = marks(["keydiff"])
    assert one == {"label": "keydiff", "colour": FIXED["keydiff"].colour, "marker": "v", "dash": ""}
    assert marks(["random"])[0]["dash"] == "4 2.88"


def test_a_relative_target_where_full_kv_has_nothing_is_not_called_usable(tmp_path: Path) -> None:
    full = [record(i, method="full", options={}, budget=None, events=0, top1=0.0) for i in range(N)]
    made = folder(tmp_path / "zero", [*full, *cell("rkv", 64, 0.0)])
    code, out, _ = run(made)
    assert code == 0
    assert re.search(r"rkv\s+-\s+-\s+-\s+-\s+full KV's top1 is 0", out)
