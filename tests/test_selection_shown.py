"""Methods that keep everything and select: what tables, captions, report and frontier say of them, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from command_line import run
from test_frontier_cli import answer, cell, folder, full
from tiny import TASK, save_tiny

from reasonkv.budget import Budget, BudgetError
from reasonkv.evaluate.job import TuneJob
from reasonkv.evaluate.matching import check_matchable
from reasonkv.evaluate.table import read_results, to_frame
from reasonkv.evaluate.target import FrontierError
from reasonkv.evaluate.tune import check_search
from reasonkv.methods import get_method
from reasonkv.report.cohorts import cohorts, read_folders
from reasonkv.report.glance import glance
from reasonkv.report.report import report_html, usable
from reasonkv.report.terminal import answers_caption, figure_note

BASIS = [
    "--task", TASK, "--prompt-policy", "count", "--methods", "full,random,quest:page_size=8", "--budgets", "24", "--limit", "2", "--interval", "12",
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
    records = read_results([out])
    quest = records[records["method"] == "quest"]
    read = quest["slots_read_mean"].mean()
    assert 8 < read <= 24 < quest["physical_mean"].mean()
    assert re.search(rf"^ quest:page_size=8 .* {read:.0f}( ±\d+)? +$", text, re.M)
    assert re.search(r"^ random .* all +$", text, re.M)
    words = " ".join(text.split())
    assert (
        "attention reads them all, but for quest:page_size=8 (slots read). quest:page_size=8 keeps everything" in words
    )
    assert "Slots are what attention reads" not in words
    data = json.loads(run(command, "--model", model, *BASIS, "--out", out, "--json")[1])
    rows = {row["method"]: row for row in data["rows"]}
    assert rows["quest:page_size=8"]["slots_read_mean"]["mean"] == pytest.approx(read)
    assert rows["quest:page_size=8"]["bytes_read_mean"]["mean"] > 0
    assert "slots_read_mean" not in rows["random"]


def test_without_a_selecting_method_nothing_of_it_is_shown() -> None:
    budget = Budget(128, prompt="count").to_dict()
    answers = [answer(i, True, own).model_copy(update={"method": "random" if own else "full"})
               for i in range(2) for own in (None, budget)]  # fmt: skip
    bounded = [one for one in answers if one.budget]
    assert "Slots are what attention reads, everything kept included." in answers_caption(to_frame(answers))
    reads = {"method": "quest", "slots_read_mean": 100.0, "events": 0}
    alone = answers_caption(to_frame([one.model_copy(update=reads) for one in bounded]))
    assert "most slots per KV head and layer that a decoded token reads" in alone
    assert "compaction" not in alone
    padded = [one.model_copy(update=reads | {"method": "adakv", "events": 3}) for one in bounded]
    assert "selecting" not in set(to_frame(padded)["regime"])
    assert "adakv holds padding, which nothing attends to." in answers_caption(to_frame(padded))


def test_the_report_shows_them_beside_the_others_and_compares_no_budgets_with_theirs(both: dict[str, Any]) -> None:
    for command in ("replay", "evaluate"):
        out = both[command][0]
        (cohort,) = cohorts(read_folders([out]))
        (row,) = cohort.summary[cohort.summary["regime"] == "selecting"].to_dict("records")
        assert row["method"] == "quest:page_size=8" and row["slots_read_mean"] <= 24
        (tab,) = glance(cohort)
        asides = {line["label"]: line["aside"] for line in tab["rows"]}
        assert asides == {"full KV": "", "random": "",
                          "quest:page_size=8": f"keeps all, reads {row['slots_read_mean']:.0f} slots"}  # fmt: skip
        assert "-" not in "".join(tab["saved"])  # what quest keeps beyond full KV is no saving of the others
        shown = usable(cohort)
        assert shown["notes"][0] == "Left out: quest:page_size=8, whose budget is what is read and not kept."
        assert "quest" not in json.dumps({name: part for name, part in shown.items() if name != "notes"})
        page = report_html([out])
        assert "<dt>selecting</dt>" in page
        assert "slots read" in page


def test_a_report_without_them_has_no_regime_of_theirs(tmp_path: Path) -> None:
    made = folder(tmp_path / "plain", [*cell("random", 64, 0.5), *cell("rkv", 64, 0.6)])
    assert "<dt>selecting</dt>" not in report_html([made])


def test_the_frontier_names_them_and_draws_no_conclusion(tmp_path: Path) -> None:
    quest = cell("quest", 64, 0.99, events=0, slots_read_mean=60.0)
    assert set(to_frame(quest)["regime"]) == {"selecting"}
    made = folder(tmp_path / "results", [*full(), *cell("random", 64, 0.5), *cell("random", 128, 0.6), *quest])
    code, out, _ = run("frontier", made)
    assert code == 0
    assert re.search(r"quest +- +- +- +- +keeps everything: its budget is what it reads", out)
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
    note = figure_note(read_results([out]))
    assert ("not drawn" in note) == (policy == "on_top")
    assert ("quest" in note) == (policy == "on_top")
