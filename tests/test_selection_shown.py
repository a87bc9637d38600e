"""Methods that hold everything and select: what tables, captions, report and frontier say of them, and what is refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
from command_line import run
from test_frontier_cli import answer, cell, folder
from test_records import record
from tiny import TASK, save_tiny

from reasonkv.budget import Budget, BudgetError
from reasonkv.evaluate.frontier import FrontierError, regime
from reasonkv.evaluate.job import TuneJob
from reasonkv.evaluate.matching import check_matchable
from reasonkv.evaluate.results import load_results
from reasonkv.evaluate.tune import check_search
from reasonkv.methods import get_method
from reasonkv.report.answers_table import answers_caption
from reasonkv.report.cohorts import cohorts
from reasonkv.report.glance import glance
from reasonkv.report.regimes import SELECTING
from reasonkv.report.report import report_html
from reasonkv.report.tables import figure_note
from reasonkv.report.usable import usable_section

BASIS = [
    "--task", TASK, "--methods", "full,random,quest:page_size=8", "--budgets", "24", "--limit", "2", "--interval", "12",
    "--sinks", "2", "--recent", "8", "--max-new-tokens", "40", "--batch-size", "2",
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
def both(model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A replay and an evaluation of the same methods: folder and what the terminal shows."""
    place = tmp_path_factory.mktemp("selection")
    made = {}
    for command in ("replay", "evaluate"):
        code, out, err = run(command, "--model", model, *BASIS, "--out", place / command)
        assert code == 0, err
        made[command] = (place / command, out)
    return made


@pytest.mark.parametrize("command", ["replay", "evaluate"])
def test_the_terminal_table_and_json_say_how_many_slots_were_read(
    model: str, both: dict[str, Any], command: str
) -> None:
    out, text = both[command]
    results = load_results(out)
    records = [one for one in [*results.records, *results.answers] if one.method == "quest"]
    read = mean(one.slots_read_mean for one in records)
    assert 8 < read <= 24 < mean(one.physical_mean for one in records)
    assert re.search(rf"^ quest:page_size=8 .* {read:.0f}( ±\d+)? +$", text, re.M)
    assert re.search(r"^ random .* all +$", text, re.M)
    words = " ".join(text.split())
    assert (
        "attention reads them all, but for quest:page_size=8 (slots read). quest:page_size=8 holds everything" in words
    )
    assert "Slots are what attention reads" not in words
    data = json.loads(run(command, "--model", model, *BASIS, "--out", out, "--json")[1])
    rows = {row["method"]: row for row in data["rows"]}
    assert rows["quest:page_size=8"]["slots_read_mean"]["mean"] == pytest.approx(read)
    assert rows["quest:page_size=8"]["bytes_read_mean"]["mean"] > 0
    assert "slots_read_mean" not in rows["random"]


def test_without_a_selecting_method_nothing_of_it_is_shown() -> None:
    answers = [replace(answer(i, True, budget), method="random" if budget else "full")
               for i in range(2) for budget in (None, Budget(128, prompt="count").to_dict())]  # fmt: skip
    assert "Slots are what attention reads, everything held included." in answers_caption(answers)
    alone = [replace(one, method="quest", slots_read_mean=100.0, events=0) for one in answers if one.budget]
    assert "most slots per KV head and layer that a decoded token reads" in answers_caption(alone)
    assert "compaction" not in answers_caption(alone)
    padded = [replace(one, method="adakv", slots_read_mean=100.0, events=3) for one in answers if one.budget]
    assert {regime(one) for one in padded} != {SELECTING}
    assert "adakv holds padding, which nothing attends to." in answers_caption(padded)


def test_the_report_shows_them_beside_the_others_and_compares_no_budgets_with_theirs(both: dict[str, Any]) -> None:
    for command in ("replay", "evaluate"):
        results = load_results(both[command][0])
        (cohort,) = cohorts([results])
        assert cohort.selecting == ["quest:page_size=8"]
        (row,) = (row for row in cohort.rows if row.regime == SELECTING)
        assert row.estimates["slots_read_mean"].mean <= 24
        shown = glance(cohort)
        read = f"{row.estimates['slots_read_mean'].mean:.0f}"
        assert f"quest:page_size=8 <small>holds all, reads {read} slots</small>" in shown
        saved = shown.split("<tfoot>")[1]
        assert "-" not in re.sub(r"<[^>]*>", "", saved)  # what quest holds beyond full KV is no saving of the others
        usable = usable_section(cohort)
        assert "Left out: quest:page_size=8, whose budget is what is read and not held." in usable
        assert "quest" not in usable.split("</p>", 1)[1]
        page = report_html([results])
        assert "<dt>selecting</dt>" in page
        assert "slots read" in page


def test_a_report_without_them_has_no_regime_of_theirs(tmp_path: Path) -> None:
    made = folder(tmp_path / "plain", [*cell("random", 64, 0.5), *cell("rkv", 64, 0.6)])
    assert "<dt>selecting</dt>" not in report_html([load_results(made)])


def test_the_frontier_names_them_and_draws_no_conclusion(tmp_path: Path) -> None:
    full = [record(i, method="full", options={}, budget=None, events=0, top1=1.0) for i in range(16)]
    quest = cell("quest", 64, 0.99, events=0, slots_read_mean=60.0)
    assert {regime(one) for one in quest} == {SELECTING}
    made = folder(tmp_path / "results", [*full, *cell("random", 64, 0.5), *cell("random", 128, 0.6), *quest])
    code, out, _ = run("frontier", made)
    assert code == 0
    assert re.search(r"quest +- +- +- +- +holds everything: its budget is what it reads", out)
    assert "quest@64" not in out  # no crossing
    assert "left out: 16 selecting of 48 bounded records" in " ".join(out.split())


def test_equal_mean_slots_and_a_search_are_refused_in_one_sentence(tmp_path: Path) -> None:
    for name in ("quest", "seer"):
        with pytest.raises(BudgetError, match=f"{name} holds everything and reads whole pages"):
            check_matchable([get_method("random"), get_method(name)])
        with pytest.raises(FrontierError, match=f"{name} drops nothing, so there is no budget to find"):
            check_search(TuneJob(task=TASK, methods=f"random,{name}"))
    check_matchable([get_method("full"), get_method("snapkv")])
    for command in ("replay", "evaluate"):
        arguments = [
            command,
            "--task",
            TASK,
            "--methods",
            "full,random,quest",
            "--mean-slots",
            "80",
            "--out",
            tmp_path / "x",
        ]
        code, out, err = run(*arguments)
        assert (code, out) == (2, "")
        assert err.startswith("Error: Mean slots are matched by what is held, and quest holds everything")
        assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("policy", ["count", "on_top"])
def test_the_figure_draws_them_only_where_budgets_count_the_same(model: str, tmp_path: Path, policy: str) -> None:
    out = tmp_path / "out"
    code, _, err = run("replay", "--model", model, *BASIS, "--prompt-policy", policy, "--out", out)
    assert code == 0, err
    note = figure_note(load_results(out).records)
    assert ("not drawn" in note) == (policy == "on_top")
    assert ("quest" in note) == (policy == "on_top")
