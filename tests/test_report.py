"""The report: 5,000 records and a long trace in one file that opens fast, asks for nothing and says what the API says."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from browser import needs_browser, open_page
from typer.testing import CliRunner

from reasonkv.cli import app
from reasonkv.evaluate.answers import AnswerRecord
from reasonkv.evaluate.manifest import MANIFEST, Manifest
from reasonkv.evaluate.records import RECORDS, Record, append_records
from reasonkv.evaluate.results import load_results
from reasonkv.evaluate.summary import summarize
from reasonkv.report.report import report_html, write_report

TASKS = ("program", "search", "arithmetic", "recall", "longdoc")
METHODS = ("random", "streaming", "snapkv", "rkv", "keydiff", "knorm")
HOSTILE = "</script><img src=x onerror=alert(1)>"


def _common(task: str, method: str, tokens: int | None, example: int) -> dict[str, Any]:
    budget = None
    if tokens is not None:
        budget = {"tokens": tokens, "interval": 32, "sinks": 4, "recent": 16, "prompt": "on_top",
                  "trigger": "occupancy", "trigger_counts": "all", "cut_prompt": "prefill", "prefill_chunk": None}  # fmt: skip
    held = 2_000_000 if tokens is None else 1000 * tokens
    return {
        "run": "r", "method": method, "options": {}, "budget": budget, "task": task, "example": example, "seed": 0,
        "prompt_tokens": 300, "output_tokens": 800, "physical_mean": float(tokens or 700), "physical_peak": 900.0,
        "physical_terminal": 400.0, "saved_ratio_terminal": 0.5, "bytes_held": held, "bytes_peak": held,
        "bytes_full": 2_000_000, "events": 0 if tokens in (None, 1024) else 20, "tokens_dropped": 500,
        "seconds": 0.1,
    }  # fmt: skip


def _record(task: str, method: str, tokens: int | None, example: int, dice: random.Random) -> Record:
    top1 = 1.0 if tokens is None else 1 - dice.random() * 20 / tokens
    return Record(**_common(task, method, tokens, example), trace_correct=True, top1=top1, top5=1.0, nll=0.1 + 1 - top1,
                  kl=1 - top1, first_mismatch=None if tokens is None else 7)  # fmt: skip


def _answer(task: str, method: str, tokens: int | None, example: int, dice: random.Random) -> AnswerRecord:
    guards = {} if tokens is None else {"merge_inactive": 1}
    return AnswerRecord(**_common(task, method, tokens, example), sample=0, correct=tokens is None or dice.random() < 0.8,
                        truncated=False, repetition=0.0, first_divergence=None, output=f"{HOSTILE} {example}",
                        guards=guards)  # fmt: skip


def _folder(path: Path, command: str, make: Any, tasks: Any, methods: Any, budgets: Any, limit: int) -> Path:
    path.mkdir()
    manifest = Manifest(command, {"task": list(tasks), "methods": ["full", *methods], "limit": limit, "seed": 0},
                        {"name": "testbed", "hash": "0123"}, "CPU")  # fmt: skip
    manifest.write(path / MANIFEST)
    dice = random.Random(0)
    cells = [("full", None), *((method, tokens) for method in methods for tokens in budgets)]
    append_records(
        path / RECORDS,
        [make(task, *cell, example, dice) for task in tasks for cell in cells for example in range(limit)],
    )
    return path


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder with 5,000 records and the report of it."""
    root = tmp_path_factory.mktemp("report")
    folder = _folder(root / "replay", "replay", _record, TASKS, METHODS, (64, 128, 256, 1024), 40)
    return folder, write_report([folder], root / "report.html")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An evaluation whose outputs and task names try to break out of the page."""
    root = tmp_path_factory.mktemp("hostile")
    folder = _folder(root / "answers", "evaluate", _answer, [HOSTILE], ("random", "rkv"), (64, 128), 4)
    return folder, write_report([folder], root / "report.html", title=HOSTILE)


@needs_browser
def test_five_thousand_records_load_within_two_seconds_and_ask_for_nothing(large: tuple[Path, Path]) -> None:
    folder, path = large
    assert len(load_results(folder).records) == 5000
    seconds = []
    for _ in range(3):
        with open_page(path) as page:
            assert page.errors == []
            assert page.outside() == []
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
@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_scrolls_tables_inside_their_frame_only(large: tuple[Path, Path], dark: bool) -> None:
    with open_page(large[1], 390, 844, dark=dark) as page:
        page.evaluate("() => document.querySelectorAll('.waiting').forEach(one => one.scrollIntoView())")
        page.handle.wait_for_selector("[data-mount=records][data-ready]")
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
