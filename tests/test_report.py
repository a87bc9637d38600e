"""The report: 5,000 records and a long trace in one file that opens fast, asks for nothing and says what the API says."""

from __future__ import annotations

import json
import random
import shlex
import shutil
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, needs_browser, open_page
from report_folders import HOSTILE, METHODS, TASKS, make_answer, make_folder, make_record
from test_inspector import big as big_inspection
from tiny import save_tiny
from typer.main import get_command
from typer.testing import CliRunner

from reasonkv.budget import Budget
from reasonkv.cli import app
from reasonkv.evaluate.accuracy import summarize_answers
from reasonkv.evaluate.crossings import crossings
from reasonkv.evaluate.frontier import Target, measured_points, usable_budget
from reasonkv.evaluate.manifest import MANIFEST
from reasonkv.evaluate.records import RECORDS, Record
from reasonkv.evaluate.results import load_results
from reasonkv.evaluate.summary import summarize
from reasonkv.report.cohorts import cohorts
from reasonkv.report.command import command
from reasonkv.report.inspector import save_inspection
from reasonkv.report.report import report_html, write_report
from reasonkv.report.usable import pairs_tested, usable_section


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder with 5,000 records and two inspections, one of them of 2,000 tokens, and the report of it."""
    root = tmp_path_factory.mktemp("report")
    folder = make_folder(root / "replay", "replay", make_record, TASKS, METHODS, (64, 128, 256, 1024), 40)
    save_inspection(folder, big_inspection(2000))
    save_inspection(folder, big_inspection(1500) | {"example": 1})
    return folder, write_report([folder], root / "report.html")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An evaluation whose outputs and task names try to break out of the page."""
    root = tmp_path_factory.mktemp("hostile")
    folder = make_folder(root / "answers", "evaluate", make_answer, [HOSTILE], ("random", "rkv"), (64, 128), 4)
    return folder, write_report([folder], root / "report.html", title=HOSTILE)


@needs_browser
def test_five_thousand_records_load_within_two_seconds_and_ask_for_nothing(large: tuple[Path, Path]) -> None:
    folder, path = large
    assert len(load_results(folder).records) == 5000
    seconds = []
    for _ in range(3):
        with open_page(path) as page:
            assert page.errors == []
            assert page.requests == [path.resolve().as_uri()]
            seconds.append(page.load_seconds)
    assert min(seconds) < 2


@needs_browser
def test_the_table_says_what_the_summary_says_and_sorts(large: tuple[Path, Path]) -> None:
    folder, path = large
    rows = summarize(load_results(folder).records)
    script = """() => [...document.querySelectorAll('[data-mount=summary] tbody tr')].map(
        row => [...row.children].map(cell => cell.textContent))"""
    with open_page(path) as page:
        shown = page.evaluate(script)
        assert len(shown) == len(rows)
        said = {(cells[0], cells[1], cells[3]): cells for cells in shown}
        for row in rows:
            cells = said[row.task, row.method, "–" if row.tokens is None else f"{row.tokens:,}"]
            one = row.estimates["top1"]
            assert cells[4] == str(row.n)
            assert cells[5] == f"{one.mean * 100:.1f} ±{one.se * 100:.1f}"
            if row.tokens == 64:
                difference = row.versus_full["top1"]
                assert cells[6].split(" ")[0].replace("−", "-") == f"{difference.mean * 100:+.1f}"
        assert {cells[2] for cells in shown if cells[3] == "1,024"} == {"uncompressed"}
        head = page.handle.locator("[data-mount=summary] th[data-key=top1]")
        head.locator("button").focus()
        page.handle.keyboard.press("Enter")
        assert head.get_attribute("aria-sort") == "descending"
        page.handle.keyboard.press("Enter")
        assert head.get_attribute("aria-sort") == "ascending"
        values = [float(cells[5].split(" ")[0]) for cells in page.evaluate(script)]
        assert values == sorted(values)


@needs_browser
def test_methods_can_be_hidden_but_full_and_random_stay(large: tuple[Path, Path]) -> None:
    with open_page(large[1]) as page:
        lines = "() => [...document.querySelector('.chart').querySelectorAll('g.series')].map(g => g.dataset.method)"
        assert set(page.evaluate(lines)) == set(METHODS)
        for button in page.handle.locator(".names .toggle").all():
            button.click()
        assert page.evaluate(lines) == ["random"]
        assert page.evaluate("() => document.querySelectorAll('.chart path.full').length") == 2
        page.handle.locator(".chart .point[tabindex='0']").first.focus()
        page.handle.keyboard.press("ArrowRight")
        assert "slots" in page.handle.locator(".tip:visible").inner_text()
        assert page.errors == []


@needs_browser
def test_the_inspector_is_built_when_it_is_reached_and_its_slider_works_here(large: tuple[Path, Path]) -> None:
    tokens = "() => document.querySelectorAll('#inspector .flow .t').length"
    with open_page(large[1]) as page:
        page.handle.wait_for_timeout(200)
        assert page.evaluate(tokens) == 0
        page.evaluate("() => document.getElementById('inspector').scrollIntoView()")
        page.handle.wait_for_selector("[data-mount=inspector][data-ready]")
        assert page.evaluate(tokens) == 2000
        assert page.handle.locator("#inspector .flow .t.unseen").count() == 0
        page.handle.locator("#inspector .slider").focus()
        page.handle.keyboard.press("Home")
        assert page.handle.locator("#inspector .slider").input_value() == "0"
        assert page.handle.locator("#inspector .flow .t.unseen").count() > 1000
        page.handle.keyboard.press("ArrowRight")
        assert page.handle.locator("#inspector .slider").input_value() == "1"
        page.handle.locator("[data-mount=inspector] .picker select").select_option(index=1)
        assert page.evaluate(tokens) == 1500
        assert page.errors == []


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_scrolls_tables_inside_their_frame_only(large: tuple[Path, Path], dark: bool) -> None:
    with open_page(large[1], 390, 844, dark=dark) as page:
        for name in ("inspector", "records"):
            page.evaluate("name => document.getElementById(name).scrollIntoView()", name)
            page.handle.wait_for_selector(f"[data-mount={name}][data-ready]")
        assert page.evaluate("() => document.documentElement.scrollWidth") <= 390
        assert page.evaluate("() => document.querySelectorAll('[data-mount=records] tbody tr').length") == 50
        assert page.errors == []


@needs_browser
def test_text_of_records_stays_text(small: tuple[Path, Path]) -> None:
    with open_page(small[1]) as page:
        page.evaluate("() => document.querySelectorAll('.waiting').forEach(one => one.scrollIntoView())")
        page.handle.wait_for_selector("[data-mount=records][data-ready]")
        assert page.evaluate("() => document.images.length") == 0
        assert HOSTILE in page.evaluate("() => document.querySelector('[data-mount=records] tbody').textContent")
        assert page.handle.locator("h1").inner_text() == HOSTILE
        assert page.errors == []


def test_guards_command_and_versions_are_shown(small: tuple[Path, Path]) -> None:
    text = small[1].read_text()
    assert "merge_inactive 16" in text
    assert "reasonkv evaluate --model testbed" in text
    assert "transformers" in text
    assert HOSTILE not in text


def test_folders_are_joined_and_never_averaged_together(large: tuple[Path, Path], small: tuple[Path, Path]) -> None:
    text = report_html([load_results(large[0]), load_results(small[0])])
    data = json.loads(text.split('id="report">')[1].split("</script>")[0])
    assert [one["kind"] for one in data["cohorts"]] == ["replay", "evaluate"]
    assert [one["table"]["rows"] for one in data["cohorts"]] == [5 * 25, 5]


def test_the_command_prints_the_path_and_refuses_in_one_sentence(small: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    done = CliRunner().invoke(app, ["report", str(small[0]), "--out", str(out), "--title", "Mine"])
    assert done.exit_code == 0 and "page.html" in done.output.replace("\n", "")
    assert "<title>Mine</title>" in out.read_text()
    refused = CliRunner().invoke(app, ["report", str(tmp_path / "nowhere"), "--out", str(out)])
    assert refused.exit_code == 2 and "Error: " in refused.output and "Traceback" not in refused.output


def test_usable_budgets_are_those_of_the_frontier(large: tuple[Path, Path]) -> None:
    (cohort,) = cohorts([load_results(large[0])])
    points = [one for one in measured_points(cohort.results.records, "top1") if one.regime == "decode-active"]
    text = usable_section(cohort)
    target = Target("top1", 0.95, relative=True)
    for method in METHODS:
        row = text.split(f'<th scope="row">{method}</th>')[1].split("</tr>")[0]
        for task, cell in zip(TASKS, row.split("<td>")[1:], strict=True):
            found = usable_budget([one for one in points if (one.task, one.method) == (task, method)], target)
            assert found.status == "reached"
            high = "&gt; 256" if found.high is None else f"{found.high:,.0f}"
            assert f'<span class="value">{found.tokens:,.0f} <small>[{found.low:,.0f}, {high}]' in cell
            assert "reached" in cell
    assert f"{pairs_tested(points, 'tokens'):,} pairs tested" in text
    assert pairs_tested(points, "tokens") == 5 * 3 * 6 * 5


def test_crossings_that_hold_are_listed_and_counted(tmp_path: Path) -> None:
    def make(task: str, method: str, tokens: int | None, example: int, dice: random.Random) -> Record:
        good = {"full": 1.0, "rkv": 0.95}.get(method, 0.5)
        return replace(make_record(task, method, tokens, example, dice), top1=good + 0.01 * dice.random())

    folder = make_folder(tmp_path / "replay", "replay", make, ("program",), ("random", "rkv"), (64, 128, 256), 30)
    (cohort,) = cohorts([load_results(folder)])
    held = [one for one in crossings(measured_points(cohort.results.records, "top1"), "top1") if one.holds]
    text = usable_section(cohort)
    assert len(held) == 3
    assert "6 pairs tested, 3 hold." in text
    assert text.count('<th scope="row">program</th>') == 3
    assert "<td>rkv <small>at 64</small></td>" in text


def test_too_few_examples_are_called_so(small: tuple[Path, Path]) -> None:
    (cohort,) = cohorts([load_results(small[0])])
    assert "none holds. None could: 4 problems a cell are too few." in usable_section(cohort)


def test_a_wide_folder_is_written_in_seconds(tmp_path: Path) -> None:
    def flat(task: str, method: str, tokens: int | None, example: int, dice: random.Random) -> Record:
        return replace(make_record(task, method, tokens, example, dice), top1=0.9 + 0.1 * dice.random())

    sizes = (48, 64, 96, 128, 192, 256, 320, 384, 512, 768)  # no budget differs: half of all pairs have an interval
    folder = make_folder(tmp_path / "wide", "replay", flat, TASKS, (*METHODS, "oracle"), sizes, 14)
    began = time.perf_counter()
    write_report([folder], tmp_path / "report.html")
    assert time.perf_counter() - began < 20


@needs_browser
def test_accuracies_are_those_of_summarize_answers(small: tuple[Path, Path]) -> None:
    rows = summarize_answers(load_results(small[0]).answers)
    data = json.loads(small[1].read_text().split('id="report">')[1].split("</script>")[0])
    table = {one["key"]: one for one in data["cohorts"][0]["table"]["columns"]}
    assert data["cohorts"][0]["table"]["rows"] == len(rows)
    with open_page(small[1]) as page:
        shown = page.evaluate(
            "() => [...document.querySelectorAll('[data-mount=summary] tbody tr')].map("
            "row => [...row.children].map(cell => cell.textContent))"
        )
    place = list(table).index("correct")
    for at, row in enumerate(rows):
        assert table["tokens"]["values"][at] == row.tokens
        for name, one in row.estimates.items():
            if name in table:
                assert table[name]["values"][at] == pytest.approx(one.mean, rel=1e-6)
                assert table[name]["se"][at] == pytest.approx(one.se, rel=1e-6)
        one = row.estimates["correct"]
        assert shown[at][place] == f"{100 * one.mean:.1f} ±{100 * one.se:.1f}"
        for other, difference in (("full", row.versus_full), ("random", row.versus_random)):
            column = table[f"correct_versus_{other}"]
            ends = (column["values"][at], column["low"][at], column["high"][at])
            expected = (difference.mean, difference.low, difference.high) if difference else (None, None, None)
            assert ends == (pytest.approx(expected, rel=1e-6) if difference else expected)


def _parsed(line: str) -> Any:
    name, *arguments = shlex.split(line)[1:]
    return get_command(app).commands[name].make_context(name, arguments).params  # type: ignore[attr-defined]


def test_rebuilt_commands_run_the_very_same_jobs(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "tiny")
    rule = ["--interval", 12, "--sinks", 2, "--recent", 8, "--prompt-policy", "on_top", "--dtype", "float32"]
    basis = ["--model", model, "--task", "program:lines=6,recall", "--limit", 1, "--seed", 3, *rule]
    jobs = {
        "replay": ["--methods", "full,snapkv:window=4", "--budgets", "24,30", "--traces", "sampled",
                   "--temperature", 0.8, "--max-new-tokens", 20],
        "evaluate": ["--methods", "random", "--budgets", 24, "--samples", 2, "--temperature", 0.7,
                     "--top-p", 0.9, "--max-new-tokens", 20],
    }  # fmt: skip
    for name, own in jobs.items():
        folder = tmp_path / name
        first = CliRunner().invoke(app, [name, *map(str, [*basis, *own]), "--out", str(folder)])
        assert first.exit_code == 0, first.output
        before = (folder / RECORDS).read_bytes()
        words = shlex.split(command(load_results(folder).manifest))
        words[words.index("--model") + 1], words[words.index("--out") + 1] = str(model), str(folder)
        # a folder takes no other job than its own, and nothing of a finished one runs again
        again = CliRunner().invoke(app, words[1:])
        assert again.exit_code == 0, again.output
        assert (folder / RECORDS).read_bytes() == before


def test_commands_of_the_demo_and_of_a_search_parse() -> None:
    demo = _parsed(command({"command": "demo", "arguments": {"limit": 3, "seed": 5}}))
    assert (demo["limit"], demo["seed"]) == (3, 5)
    budget = Budget(128, prompt="on_top").to_dict()
    solved = {
        "task": ["program"],
        "methods": ["rkv"],
        "budgets": [budget],
        "mean_slots": [60, 80],
        "limit": 2,
        "seed": 1,
    }
    found = _parsed(command({"command": "evaluate", "arguments": solved}))
    assert (found["budgets"], found["mean_slots"], found["recent"]) == (None, "60,80", 64)
    arguments = {"dtype": "float32", "task": ["program"], "methods": ["full", "rkv"], "limit": 2, "seed": 1,
                 "rule": {key: value for key, value in budget.items() if key != "tokens"}}  # fmt: skip
    traces = {"source": "greedy", "max_new_tokens": 99, "temperature": 0.6, "top_p": 0.95}
    search = {"command": "frontier", "model": {"name": "testbed"}, "arguments": arguments | {"traces": traces}}
    found = _parsed(command(search))
    assert (found["metric"], found["prompt_policy"], found["max_new_tokens"]) == ("top1", "on_top", 99)
    more = {"samples": 1, "sampling": None, "max_new_tokens": 77}
    found = _parsed(command(search | {"arguments": arguments | more}))
    assert (found["metric"], found["methods"], found["max_new_tokens"]) == ("accuracy", "full,rkv", 77)


def test_answer_top1_is_shown_and_old_records_go_without_it(large: tuple[Path, Path], tmp_path: Path) -> None:
    records = load_results(large[0]).records
    text = large[1].read_text()
    assert '"label":"answer top-1 %"' in text
    table = json.loads(text.split('id="report">')[1].split("</script>")[0])["cohorts"][0]["table"]
    column = next(one for one in table["columns"] if one["key"] == "answer_top1")
    own = [one.answer_top1 for one in records if one.task == "program" and one.method == "rkv" and
           one.budget and one.budget["tokens"] == 64]  # fmt: skip
    told = [one for one in own if one is not None]
    assert len(told) == 20
    assert pytest.approx(sum(told) / 20, rel=1e-6) in column["values"]

    old = tmp_path / "old"
    old.mkdir()
    shutil.copy(large[0] / MANIFEST, old)
    lines = [json.loads(one.to_json()) for one in records[:45]]
    for line in lines:
        del line["answer_top1"]
    (old / RECORDS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "answer top-1" not in report_html([load_results(old)])


@needs_browser
def test_the_page_prints(large: tuple[Path, Path], tmp_path: Path) -> None:
    pdf = tmp_path / "report.pdf"
    subprocess.run(
        [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--print-to-pdf={pdf}",
         f"--user-data-dir={tmp_path / 'profile'}", large[1].resolve().as_uri()],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    data = pdf.read_bytes()
    assert data.startswith(b"%PDF") and len(data) > 50_000
    with open_page(large[1]) as page:
        page.handle.emulate_media(media="print")
        assert page.evaluate("() => document.querySelector('.glance').offsetHeight") > 100
        assert page.evaluate("() => document.querySelector('.chart svg').getBoundingClientRect().height") > 100
        assert page.evaluate("() => document.getElementById('records').offsetHeight") == 0
