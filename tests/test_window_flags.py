"""Windows on the command line: a search over what they keep, and one trace inspected under one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import run, sentence
from tiny import TASK, save_tiny

from reasonkv.budget import BudgetError, Window
from reasonkv.evaluate.job import BudgetOptions, TuneJob
from reasonkv.evaluate.matching import budget_for_mean, sized
from reasonkv.evaluate.records import RECORDS
from reasonkv.evaluate.tune import budget_range, check_search
from reasonkv.methods import get_method
from reasonkv.report.command import command


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("models") / "tiny"))


def test_a_search_over_windows_runs_reports_resumes_and_can_be_run_again(model: str, tmp_path: Path) -> None:
    out = tmp_path / "search"
    words = ["tune", "--model", model, "--task", TASK, "--methods", "streaming", "--window", "8", "--window-buffer", "4",
             "--target", "0.9x", "--limit", "2", "--max-new-tokens", "40", "--resolution", "1.5", "--out", out]  # fmt: skip
    code, text, err = run(*words)
    assert code == 0, err
    assert "in slots kept of every 8" in " ".join(text.split())
    assert "streaming @ 1 of every 8" in err
    before = (out / RECORDS).read_bytes()
    budgets = [budget for line in before.splitlines() if (budget := json.loads(line)["budget"])]
    assert {(one["size"], one["buffer"], one["prompt"]) for one in budgets} == {(8, 4, "on_top")}
    assert all(round(one["retention"] * 8) == one["tokens"] for one in budgets)
    manifest = json.loads((out / "manifest.json").read_text())
    assert run(*words).exit_code == 0
    assert (out / RECORDS).read_bytes() == before
    rebuilt = command(manifest).split()
    assert "--window 8 --window-buffer 4" in " ".join(rebuilt)
    for flag, value in (("--model", model), ("--out", str(out))):
        rebuilt[rebuilt.index(flag) + 1] = value
    again = run(*rebuilt[1:])
    assert again.exit_code == 0, again.stderr  # the same manifest, or the folder would refuse it
    assert (out / RECORDS).read_bytes().startswith(before)  # a replay of the probes


def test_the_range_of_a_window_is_its_size_and_its_buffer_must_hold_what_methods_keep() -> None:
    window = Window(size=64, buffer=16, retention=0.5)
    assert budget_range(window, get_method("random"), []) == (1, 64)
    for kept in range(1, 64):
        assert sized(window, kept) == Window(size=64, buffer=16, retention=kept / 64)
        assert sized(window, kept).tokens == kept
    options = BudgetOptions(window=64, window_buffer=16)
    job = TuneJob(task=[TASK], methods=["random", "snapkv:window=32"], budget=options, target="0.9")
    with pytest.raises(BudgetError, match="its newest 32 slots, but the window's buffer holds 16"):
        check_search(job)


def test_a_window_is_still_solved_for_a_mean() -> None:
    found = budget_for_mean(Window(size=64, buffer=16, retention=0.5), 180, [100], [500])
    assert isinstance(found, Window)
    assert 1 <= found.tokens < 64


def test_inspect_takes_a_window(model: str, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    code, text, err = run(
        "inspect", "--model", model, "--task", TASK, "--method", "streaming", "--max-new-tokens", "40", "--out", page,
        "--window", "8", "--window-buffer", "4", "--retention", "0.25",
    )  # fmt: skip
    assert code == 0, err
    assert "streaming at 2 slots of every 8 on program" in text
    assert ", 0 compactions" not in text
    assert "<title>streaming at 2 slots of every 8" in page.read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("inspect --window 64 --retention 0.2,0.3", "one budget"),
        ("inspect --window 64 --budget 64", "Give one of tokens and window"),
        ("inspect --method rkv", "rkv needs one budget"),
        ("inspect --method full --window 64", "full takes no budget"),
        ("inspect . --window 64", "A results folder has its own budgets"),
        ("inspect . --budget 64 --layer-shares 1/2", "A results folder has its own budgets"),
        ("inspect --window 1", "A window's size must be a whole number of at least 2"),
        (f"generate --task {TASK} --method kara --window 64 --retention 0.2,0.3", "one budget"),
        (f"tune --task {TASK} --methods kara --window 0 --out x", "A window's size must be"),
    ],
)
def test_windows_that_make_no_sense_are_one_sentence(arguments: str, words: str) -> None:
    assert words in sentence(run(*arguments.split()))
