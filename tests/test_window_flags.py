"""Windows on the command line: a search over what they keep, and one trace inspected under one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import TASK, save_tiny
from typer.testing import CliRunner

from reasonkv.budget import BudgetError, Window
from reasonkv.cli import app
from reasonkv.evaluate.bisection import budget_range, check_search
from reasonkv.evaluate.frontier import Target
from reasonkv.evaluate.matching import budget_for_mean, sized
from reasonkv.evaluate.records import read_records
from reasonkv.evaluate.runner import ReplayJob
from reasonkv.methods import get_method
from reasonkv.report.command import command


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(one) for one in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("models") / "tiny"))


def test_a_search_over_windows_runs_reports_resumes_and_can_be_run_again(model: str, tmp_path: Path) -> None:
    out = tmp_path / "search"
    words = ["frontier", "--model", model, "--task", TASK, "--methods", "streaming", "--window", "8", "--window-buffer",
             "4", "--target", "0.9x", "--limit", "2", "--max-new-tokens", "40", "--resolution", "1.5", "--out", out]  # fmt: skip
    code, text, err = run(*words)
    assert code == 0, err
    assert "in slots kept of every 8" in " ".join(text.split())
    assert "streaming @ 1 of every 8" in err
    budgets = [one.budget for one in read_records(out / "records.jsonl") if one.budget]
    assert budgets
    assert {(one["size"], one["buffer"], one["prompt"]) for one in budgets} == {(8, 4, "on_top")}
    assert all(round(one["retention"] * 8) == one["tokens"] for one in budgets)
    manifest = json.loads((out / "manifest.json").read_text())
    assert not {"tokens", "retention"} & set(manifest["arguments"]["rule"])
    before = (out / "records.jsonl").read_bytes()
    assert run(*words)[0] == 0
    assert (out / "records.jsonl").read_bytes() == before
    rebuilt = command(manifest).split()
    assert "--window 8 --window-buffer 4" in " ".join(rebuilt)
    for flag, value in (("--model", model), ("--out", str(out))):
        rebuilt[rebuilt.index(flag) + 1] = value
    assert run(*rebuilt[1:])[0] == 0  # the same manifest, or the folder would refuse it
    assert (out / "records.jsonl").read_bytes().startswith(before)  # its target is the default one


def test_the_range_of_a_window_is_its_size_and_its_buffer_must_hold_what_methods_keep() -> None:
    window = Window(64, 16, 0.5)
    assert budget_range(window, get_method("random"), []) == (1, 64)
    for kept in range(1, 64):
        assert sized(window, kept) == Window(64, 16, kept / 64)
        assert sized(window, kept).tokens == kept
    job = ReplayJob([TASK], [get_method("random"), get_method("snapkv:window=32")], [window], 1)
    with pytest.raises(BudgetError, match="its newest 32 slots, but the window's buffer holds 16"):
        check_search(job, Target("top1", 0.9))


def test_a_window_is_still_solved_for_a_mean() -> None:
    found = budget_for_mean(Window(64, 16, 0.5), 180, [100], [500])
    assert isinstance(found, Window)
    assert 1 <= found.tokens < 64


def test_inspect_takes_a_window(model: str, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    basis = [
        "inspect",
        "--model",
        model,
        "--task",
        TASK,
        "--method",
        "streaming",
        "--max-new-tokens",
        "40",
        "--out",
        page,
    ]
    code, text, err = run(*basis, "--window", "8", "--window-buffer", "4", "--retention", "0.25")
    assert code == 0, err
    assert "streaming at 2 slots of every 8 on program" in text
    assert ", 0 events" not in text
    assert "<title>streaming at 2 slots of every 8" in page.read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["inspect", "--window", "64", "--retention", "0.2,0.3"], "give one --retention, not 0.2,0.3."),
        (["inspect", "--window", "64", "--budget", "64"], "Give either --budget or --window."),
        (["inspect", "--method", "rkv"], "rkv needs a budget; give --budget TOKENS (or --window SIZE)."),
        (["inspect", "--method", "full", "--window", "64"], "full takes no budget"),
        (["inspect", ".", "--window", "64"], "A results folder has its own windows; leave --window out"),
        (["inspect", "--window", "1"], "A window's size must be a whole number of at least 2"),
        (["generate", "--task", TASK, "--method", "kara", "--window", "64", "--retention", "0.2,0.3"], "give one --retention"),
        (["frontier", "--task", TASK, "--methods", "kara", "--window", "0", "--out", "x"], "A window's size must be"),
    ],
)  # fmt: skip
def test_windows_that_make_no_sense_are_one_sentence(arguments: list[str], words: str) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert words in err
    assert "Traceback" not in err
