"""What readers stumbled over in reports: where the page opens, scales, missing rows, plurals, bands, errors of charts."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from browser import OpenPage, needs_browser
from report_folders import make_answer, make_folder, make_record, write_folder

from reasonkv.evaluate.records import ReplayRecord
from reasonkv.report.cohorts import cohorts, read_folders
from reasonkv.report.glance import glance
from reasonkv.report.report import report_html, usable, write_report


def changed(path: Path, make: Any, methods: Any = ("random", "rkv"), budgets: Any = (64, 128), limit: int = 10) -> Any:
    """The page's view of a replay whose top-1 is `make(method, tokens, example)`."""

    def record(task: str, method: str, tokens: int | None, example: int, dice: random.Random) -> ReplayRecord:
        found = make_record(task, method, tokens, example, dice)
        return found.model_copy(update={"top1": 1.0 if tokens is None else make(method, tokens, example)})

    folder = make_folder(path, "replay", record, ("program",), methods, budgets, limit)
    (cohort,) = cohorts(read_folders([folder]))
    return folder, glance(cohort)


def test_the_page_opens_at_the_budget_where_methods_lie_apart(tmp_path: Path) -> None:
    def top1(method: str, tokens: int, example: int) -> float:
        return 0.0 if tokens == 64 else 0.9 if method == "rkv" else 0.6

    folder, tabs = changed(tmp_path / "one", top1, budgets=(64, 128, 256))
    assert tabs[0]["apart"] == 0 and tabs[1]["apart"] == pytest.approx(0.3)
    assert '<div class="glances" data-glances="1">' in report_html([folder])


def test_95_and_98_are_told_apart_by_eye(tmp_path: Path) -> None:
    _, tabs = changed(tmp_path / "one", lambda method, tokens, example: 0.98 if method == "rkv" else 0.95)
    places = {row["label"]: row["cells"][0]["at"] for row in tabs[0]["rows"]}
    assert places["rkv"] - places["random"] > 40 and places["random"] >= 0 and places["full KV"] <= 100
    assert tabs[0]["scales"][0].startswith("scale 94")


def test_a_method_that_was_never_cut_keeps_its_row_with_a_note(tmp_path: Path) -> None:
    dice, made = random.Random(0), []
    for name, tokens in (("full", None), ("random", 64), ("lazy", 64)):
        made += [make_record("program", name, tokens, i, dice) for i in range(8)]
    made = [one.model_copy(update={"events": 0}) if one.method == "lazy" else one for one in made]
    (cohort,) = cohorts(read_folders([write_folder(tmp_path / "one", made)]))
    (tab,) = glance(cohort)
    assert {row["label"]: row["cells"][0]["note"] for row in tab["rows"]} == {
        "full KV": "", "random": "", "lazy": "never compacted",
    }  # fmt: skip
    assert usable(cohort)["table"]["lazy"][0]["status"] == "no compressed record"


def test_one_problem_is_no_plural_and_a_model_folder_is_named_by_its_last_part(tmp_path: Path) -> None:
    dice = random.Random(0)
    answers = [make_answer("program", name, tokens, 0, dice) for name, tokens in (("full", None), ("random", 64))]
    folder = write_folder(tmp_path / "one", answers, "evaluate")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["model"]["name"] = "/srv/models/Qwen3-4B"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    text = report_html([folder])
    lead = text.split('<p class="lead">')[1].split("</p>")[0]
    assert lead.startswith("Qwen3-4B answered 1 problem (greedy)") and "1 method at 64 slots" in lead
    assert "2 records" in lead and "1 problems" not in text and "--model /srv/models/Qwen3-4B" in text


def test_what_full_kv_itself_gets_wrong_is_said_before_any_number(tmp_path: Path) -> None:
    dice = random.Random(0)
    answers = [make_answer("program", name, tokens, i, dice).model_copy(update={"correct": False})
               for i in range(8) for name, tokens in (("full", None), ("random", 64))]  # fmt: skip
    text = report_html([write_folder(tmp_path / "one", answers, "evaluate")])
    assert text.index("Full KV answers 0% of program right") < text.index("<h3>")


def test_two_points_have_bars_and_three_a_band() -> None:
    import altair as alt

    from reasonkv.report.charts import lines, log_x, looks

    data = pd.DataFrame([
        {"method": name, "x": x, "y": x, "low": x - 1, "high": x + 1}
        for name, many in (("rkv", 2), ("random", 3)) for x in (64, 128, 256)[:many]
    ])  # fmt: skip
    chart = lines(data, log_x("x:Q", "budget"), alt.Y("y:Q"), looks(["rkv", "random"])).to_dict()
    drawn = {layer["mark"]["type"]: {row["method"] for row in chart["datasets"][layer["data"]["name"]]}
             for layer in chart["layer"] if layer["mark"]["type"] in {"area", "rule"}}  # fmt: skip
    assert drawn == {"area": {"random"}, "rule": {"rkv"}}


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_charts_of_every_switch_draw_without_an_error(open_page: OpenPage, tmp_path: Path, width: int) -> None:
    dice = random.Random(0)
    made = [make_record(task, name, tokens, i, dice).model_copy(update={"physical_mean": 0.0 if i else 5.0})
            for task in ("program", "recall") for i in range(2)
            for name, tokens in (("full", None), ("random", 64), ("oracle", 64), ("cask", 64))]  # fmt: skip
    folders = [write_folder(tmp_path / "replay", made)]
    counted = json.loads(json.dumps(made[1].budget)) | {"prompt": "count"}
    own = [one if one.budget is None else one.model_copy(update={"budget": counted}) for one in made]
    folders.append(write_folder(tmp_path / "count", own))
    with open_page(write_report(folders, tmp_path / "page.html"), width, 844) as page:
        page.handle.wait_for_selector(".chart svg")
        for button in page.handle.locator(".switches button:visible").all():
            button.click()
            page.handle.wait_for_timeout(150)
        assert page.errors == []
