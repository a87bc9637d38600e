"""The report: 5,000 records and a long trace in one file that opens fast, asks for nothing and says what the API says."""

from __future__ import annotations

import json
import random
import shlex
from itertools import pairwise
from pathlib import Path

import pytest
from browser import OpenPage, needs_browser
from command_line import run, sentence
from report_folders import HOSTILE, METHODS, TASKS, make_answer, make_folder, make_record, write_folder
from test_inspector import big as big_inspection
from tiny import save_tiny

from reasonkv.evaluate.frontier import crossings, measured_points, pairs_to_test, usable_budget
from reasonkv.evaluate.records import RECORDS, ReplayRecord
from reasonkv.evaluate.table import read_manifest, read_results, summarize
from reasonkv.evaluate.target import Target
from reasonkv.report.cohorts import cohorts, read_folders
from reasonkv.report.command import command
from reasonkv.report.frontier import usable_text
from reasonkv.report.glance import glance
from reasonkv.report.inspector import save_inspection
from reasonkv.report.metrics import METRICS
from reasonkv.report.report import report_html, usable, write_report
from reasonkv.report.wording import difference_text, estimate_text


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
def test_five_thousand_records_load_and_ask_for_nothing(open_page: OpenPage, large: tuple[Path, Path]) -> None:
    folder, path = large
    assert len(read_results([folder])) == 5000
    assert path.stat().st_size < 3_500_000
    with open_page(path) as page:
        page.handle.wait_for_selector(".chart svg")
        assert page.errors == []
        assert page.requests == [path.resolve().as_uri()]


@needs_browser
def test_the_table_says_what_the_summary_says_and_sorts(open_page: OpenPage, large: tuple[Path, Path]) -> None:
    folder, path = large
    rows = summarize(read_results([folder])).to_dict("records")
    script = """() => [...document.querySelectorAll('[data-mount=summary] tbody tr')].map(
        row => [...row.children].map(cell => cell.textContent))"""
    with open_page(path) as page:
        shown = page.evaluate(script)
        assert len(shown) == len(rows)
        said = {(cells[0], cells[1], cells[3]): cells for cells in shown}
        for row in rows:
            cells = said[row["task"], row["method"], f"{row['tokens']:,}" if row["tokens"] else "-"]
            assert cells[4] == str(row["n"])
            assert cells[5] == f"{row['top1'] * 100:.1f} ±{row['top1_se'] * 100:.1f}"
            if row["tokens"] == 64:
                difference = row["top1_vs_full"]
                assert cells[6].split(" ")[0] == f"{difference.mean * 100:+.1f}"
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
def test_charts_show_every_method_and_answer_to_switches_and_legend(
    open_page: OpenPage, large: tuple[Path, Path]
) -> None:
    with open_page(large[1]) as page:
        page.handle.wait_for_selector(".chart[data-metric=top1] svg")
        count = "name => document.querySelectorAll(`.chart[data-metric=top1] svg .${name}`).length"
        texts = "() => document.querySelector('.chart[data-metric=top1] svg').textContent"
        assert all(method in page.evaluate(texts) for method in METHODS)
        assert page.evaluate(count, "mark-line path") == len(METHODS)
        # at 1,024 slots nothing is evicted: the methods stay, as hollow marks
        hollow = "() => [...document.querySelectorAll('.chart[data-metric=top1] svg .mark-symbol path')].filter(p => p.getAttribute('fill') === 'transparent').length"
        assert page.evaluate(hollow) == len(METHODS)
        assert "budget, slots per KV head" in page.evaluate(texts) and "128" in page.evaluate(texts)
        page.handle.locator("button[data-value=physical_mean]").click()
        page.handle.wait_for_function(
            "() => document.querySelector('.chart[data-metric=top1] svg')?.textContent.includes('mean slots per')"
        )
        faded = "() => [...document.querySelectorAll('.chart[data-metric=top1] svg .mark-line path')].filter(p => p.getAttribute('opacity') < 0.5).length"
        assert page.evaluate(faded) == 0
        page.handle.locator(".chart[data-metric=top1] svg .role-legend-label text", has_text="rkv").click()
        page.handle.wait_for_function(f"() => ({faded})() === {len(METHODS) - 1}")
        assert page.errors == []


@needs_browser
def test_the_inspector_is_built_when_it_is_reached_and_its_slider_works_here(
    open_page: OpenPage, large: tuple[Path, Path]
) -> None:
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
def test_a_phone_scrolls_tables_inside_their_frame_only(
    open_page: OpenPage, large: tuple[Path, Path], dark: bool
) -> None:
    with open_page(large[1], 390, 844, dark=dark) as page:
        for name in ("inspector", "records"):
            page.evaluate("name => document.getElementById(name).scrollIntoView()", name)
            page.handle.wait_for_selector(f"[data-mount={name}][data-ready]")
        assert page.evaluate("() => document.documentElement.scrollWidth") <= 390
        assert page.evaluate("() => document.querySelectorAll('[data-mount=records] tbody tr').length") == 50
        assert page.errors == []


@needs_browser
def test_text_of_records_stays_text(open_page: OpenPage, small: tuple[Path, Path]) -> None:
    with open_page(small[1]) as page:
        page.evaluate("() => document.querySelectorAll('.waiting').forEach(one => one.scrollIntoView())")
        page.handle.wait_for_selector("[data-mount=records][data-ready]")
        assert page.evaluate("() => document.images.length") == 0
        assert HOSTILE in page.evaluate("() => document.querySelector('[data-mount=records] tbody').textContent")
        assert page.handle.locator("h1").inner_text() == HOSTILE
        assert page.errors == []


def test_fallbacks_command_and_versions_are_shown(small: tuple[Path, Path]) -> None:
    text = small[1].read_text()
    assert "merge_inactive 16" in text
    assert "reasonkv evaluate --model testbed" in text
    assert "transformers" in text
    assert HOSTILE not in text


def test_folders_are_joined_and_never_averaged_together(large: tuple[Path, Path], small: tuple[Path, Path]) -> None:
    text = report_html([large[0], small[0]])
    data = json.loads(text.split('id="report">')[1].split("</script>")[0])
    assert [one["kind"] for one in data["cohorts"]] == ["evaluate", "replay"]
    assert [one["rows"] for one in data["cohorts"]] == [5, 5 * 25]


def test_the_command_prints_the_path_and_refuses_in_one_sentence(small: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    done = run("report", small[0], "--out", out, "--title", "Mine")
    assert done.exit_code == 0 and "page.html" in done.output.replace("\n", "")
    assert "<title>Mine</title>" in out.read_text()
    assert "There is no results folder" in sentence(run("report", tmp_path / "nowhere", "--out", out))


def test_usable_budgets_are_those_of_the_frontier(large: tuple[Path, Path]) -> None:
    (cohort,) = cohorts(read_folders([large[0]]))
    points = [one for one in measured_points(cohort.frame, "top1") if one.regime == "compressed"]
    shown, target = usable(cohort), Target.parse("0.99", "top1")
    for method in METHODS:
        for task, cell in zip(TASKS, shown["table"][method], strict=True):
            found = usable_budget([one for one in points if (one.task, one.method) == (task, method)], target)
            assert (cell["value"], cell["interval"], cell["status"]) == usable_text(found, "tokens")
    assert len(pairs_to_test(points)) == 5 * 3 * 6 * 5
    assert shown["tested"].startswith("450 pairs tested")
    assert "450 pairs tested" in large[1].read_text()


def test_crossings_that_hold_are_listed_and_counted(tmp_path: Path) -> None:
    def make(task: str, method: str, tokens: int | None, example: int, dice: random.Random) -> ReplayRecord:
        good = {"full": 1.0, "rkv": 0.95}.get(method, 0.5)
        top1 = min(1.0, good + 0.01 * dice.random())
        return make_record(task, method, tokens, example, dice).model_copy(update={"top1": top1})

    folder = make_folder(tmp_path / "replay", "replay", make, ("program",), ("random", "rkv"), (64, 128, 256), 30)
    (cohort,) = cohorts(read_folders([folder]))
    held = [one for one in crossings(measured_points(cohort.frame, "top1"), "top1") if one.holds]
    shown, text = usable(cohort), report_html([folder])
    assert len(held) == len(shown["crossings"]) == 3
    assert "6 pairs tested, 3 hold." in text
    assert text.count('<th scope="row">program</th><td>rkv <small>at') == 3


def test_too_few_examples_are_called_so(small: tuple[Path, Path]) -> None:
    (cohort,) = cohorts(read_folders([small[0]]))
    assert "none holds. None could: 4 problems a cell are too few." in usable(cohort)["tested"]


def test_a_wide_folder_leaves_its_crossings_to_the_frontier(tmp_path: Path) -> None:
    sizes = tuple(48 + 16 * number for number in range(30))  # 5 tasks, 7 methods, 30 budgets: over 10,000 pairs
    folder = make_folder(tmp_path / "wide", "replay", make_record, TASKS, (*METHODS, "oracle"), sizes, 2)
    (cohort,) = cohorts(read_folders([folder]))
    assert "reasonkv frontier compares them all" in usable(cohort)["tested"]


@needs_browser
def test_accuracies_are_those_of_the_summary(open_page: OpenPage, small: tuple[Path, Path]) -> None:
    rows = summarize(read_results([small[0]])).to_dict("records")
    cohort = json.loads(small[1].read_text().split('id="report">')[1].split("</script>")[0])["cohorts"][0]
    table = {one["key"]: [one["texts"][at] for at in one["at"]] for one in cohort["columns"]}
    assert cohort["rows"] == len(rows)
    with open_page(small[1]) as page:
        shown = page.evaluate(
            "() => [...document.querySelectorAll('[data-mount=summary] tbody tr')].map("
            "row => [...row.children].map(cell => cell.textContent))"
        )
    place = list(table).index("correct")
    for at, row in enumerate(rows):
        assert table["tokens"][at] == (f"{row['tokens']:,}" if row["tokens"] else "-")
        for metric in METRICS["evaluate"]:
            if metric.key in row:
                assert table[metric.key][at] == estimate_text(row, metric.key, metric.digits, metric.scale)
        assert shown[at][place] == table["correct"][at]
        for other in ("full", "random"):
            assert table[f"correct_versus_{other}"][at] == difference_text(row[f"correct_vs_{other}"], 1, 100)


def test_rebuilt_commands_run_the_very_same_jobs(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "tiny")
    rule = ["--interval", 12, "--sinks", 2, "--recent", 8, "--prompt-policy", "on_top", "--dtype", "float32"]
    basis = ["--model", model, "--task", "program:lines=6,recall", "--limit", 1, "--seed", 3, *rule]
    jobs = {
        "replay": [*basis, "--methods", "full,snapkv:window=4", "--budgets", "24,30", "--traces", "sampled",
                   "--temperature", 0.8, "--max-new-tokens", 20],
        "evaluate": [*basis, "--methods", "random", "--budgets", 24, "--samples", 2, "--temperature", 0.7,
                     "--top-p", 0.9, "--max-new-tokens", 20],
    }  # fmt: skip
    for name, arguments in jobs.items():
        folder = tmp_path / name
        assert run(name, *arguments, "--out", folder).exit_code == 0
        before = (folder / RECORDS).read_bytes()
        words = shlex.split(command(read_manifest(folder)))
        words[words.index("--model") + 1], words[words.index("--out") + 1] = str(model), str(folder)
        # a folder takes no other job than its own, and nothing of a finished one runs again
        again = run(*words[1:])
        assert again.exit_code == 0, again.output
        assert (folder / RECORDS).read_bytes() == before


def test_commands_of_the_demo_and_of_mean_slots_say_what_was_asked() -> None:
    assert command({"command": "demo", "arguments": {"limit": 3, "seed": 5}}) == "reasonkv demo --limit 3 --seed 5"
    budget = {"tokens": 128, "interval": 32, "sinks": 4, "recent": 64, "prompt": "on_top"}
    solved = {"task": ["program"], "methods": ["rkv"], "budgets": [budget], "mean_slots": [60, 80]}
    line = command({"command": "evaluate", "arguments": solved})
    assert "--mean-slots 60,80" in line and "--recent 64" in line and "--budgets" not in line


def test_commands_repeat_prompts_graders_sampling_and_ratios(tmp_path: Path) -> None:
    options = {"prompt": "Q: {question}", "grade": "math", "shots": 2}
    sampling = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "stop": ["a, b", "c"], "preset": "published"}
    arguments = {
        "task": ["gsm8k"],
        "budgets": [{"tokens": None, "keep": 0.25}],
        "options": options,
        "sampling": sampling,
    }
    words = shlex.split(command({"command": "evaluate", "arguments": arguments}))
    pairs = list(pairwise(words))
    assert {("--prompt", "Q: {question}"), ("--grade", "math"), ("--shots", "2"), ("--keep", "0.25")} <= set(pairs)
    assert {("--top-k", "20"), ("--stop", "a, b"), ("--stop", "c"), ("--sampling", "published")} <= set(pairs)
    assert "--budgets" not in words
    given = {"task": ["traces:t.jsonl"], "given": ["0"], "diagnostics": True, "traces": {"source": "t.jsonl"}}
    line = command({"command": "replay", "arguments": given})
    assert "--traces t.jsonl" in line and "--task" not in line and "--diagnostics" in line


def test_answer_top1_is_shown_and_old_records_go_without_it(large: tuple[Path, Path], tmp_path: Path) -> None:
    frame = read_results([large[0]])
    text = large[1].read_text()
    columns = json.loads(text.split('id="report">')[1].split("</script>")[0])["cohorts"][0]["columns"]
    column = next(one for one in columns if one["label"] == "answer top-1 %")
    cell = frame[(frame["task"] == "program") & (frame["label"] == "rkv") & (frame["tokens"] == 64)]
    assert cell["answer_top1"].count() == 20
    assert any(text.startswith(f"{100 * cell['answer_top1'].mean():.1f} ±") for text in column["texts"])
    dice = random.Random(0)
    old = [make_record("program", "rkv", tokens, i, dice).model_copy(update={"answer_top1": None})
           for tokens in (64, None) for i in range(4)]  # fmt: skip
    assert "answer top-1" not in report_html([write_folder(tmp_path / "old", old)])


def test_a_method_that_keeps_everything_stands_beside_the_others_and_is_not_compared(tmp_path: Path) -> None:
    dice, read = random.Random(0), {"slots_read_mean": 40.0, "events": 0}
    made = [make_record("program", name, tokens, i, dice) for name, tokens in (("full", None), ("random", 64), ("quest", 64))
            for i in range(8)]  # fmt: skip
    made = [one.model_copy(update=read) if one.method == "quest" else one for one in made]
    folder = write_folder(tmp_path / "one", made)
    (cohort,) = cohorts(read_folders([folder]))
    (tab,) = glance(cohort)
    assert [(row["label"], row["aside"]) for row in tab["rows"]] == [
        ("full KV", ""), ("random", ""), ("quest", "keeps all, reads 40 slots")
    ]  # fmt: skip
    shown = usable(cohort)
    assert shown["notes"] == ["Left out: quest, whose budget is what is read and not kept."]
    assert list(shown["table"]) == ["random"]
    text = report_html([folder])
    assert "<dt>selecting</dt>" in text and "slots read" in text
    plain = write_folder(tmp_path / "two", [one for one in made if one.method != "quest"])
    assert "<dt>selecting</dt>" not in report_html([plain])


@needs_browser
def test_the_page_prints(open_page: OpenPage, large: tuple[Path, Path], tmp_path: Path) -> None:
    with open_page(large[1]) as page:
        pdf = tmp_path / "report.pdf"
        page.handle.pdf(path=pdf)
        data = pdf.read_bytes()
        assert data.startswith(b"%PDF") and len(data) > 50_000
        page.handle.emulate_media(media="print")
        page.handle.wait_for_selector(".chart svg")
        assert page.evaluate("() => document.querySelector('.glance').offsetHeight") > 100
        assert page.evaluate("() => document.querySelector('.chart svg').getBoundingClientRect().height") > 100
        assert page.evaluate("() => document.getElementById('records').offsetHeight") == 0
