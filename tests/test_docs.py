"""The documentation builds without a broken link, loads nothing from the network, and says what the code does."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from dataclasses import fields
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from reasonkv.budget import slot_bytes
from reasonkv.tasks import get_task, task_names

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
INDEX = (DOCS / "index.md").read_text()
TASKS = (DOCS / "tasks.md").read_text()
LOADED = {"script": "src", "link": "href", "img": "src", "iframe": "src", "source": "src", "object": "data"}


class Loads(HTMLParser):
    """Collects what a page makes a browser fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in LOADED and given.get("rel") not in ("canonical", "prev", "next"):
            self.addresses.append(given.get(LOADED[tag]) or "")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs")
    target = tmp_path_factory.mktemp("docs") / "site"
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--quiet",
        "-f",
        str(ROOT / "mkdocs.yml"),
        "-d",
        str(target),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


def test_the_site_builds_strictly_and_has_every_page(site: Path) -> None:
    for page in DOCS.rglob("*.md"):
        built = page.relative_to(DOCS).with_suffix(".html")
        assert (site / (built.with_name("index.html") if built.name == "README.html" else built)).exists(), page


def test_every_page_is_in_the_navigation() -> None:
    nav = (ROOT / "mkdocs.yml").read_text().split("\nnav:")[1]
    for page in DOCS.rglob("*.md"):
        assert f": {page.relative_to(DOCS).as_posix()}\n" in nav, page


def test_pages_load_nothing_from_the_network(site: Path) -> None:
    for page in site.rglob("*.html"):
        loads = Loads()
        loads.feed(page.read_text())
        assert loads.addresses
        assert not [one for one in loads.addresses if re.match(r"(https?:)?//", one)], page
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", style.read_text()), style


def test_quick_start_snippet_runs(tmp_path: Path) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", INDEX, re.S)
    script = tmp_path / "snippet.py"
    script.write_text(snippet)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "events" in done.stdout


@pytest.mark.parametrize("command", re.findall(r"^(reasonkv .*)$", INDEX, re.M))
def test_quick_start_commands_exist_with_their_flags(command: str) -> None:
    from reasonkv.cli import app

    words = shlex.split(command)[1:]
    shown = CliRunner().invoke(app, [words[0], "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).output
    assert all(word in shown for word in words if word.startswith("--")), command


def test_task_examples_are_what_get_task_gives() -> None:
    examples = re.findall(r"`([a-z]+:[^`]+)`:\n\n```text\n(.*?)\n(.*?)\n```", TASKS)
    assert [spec.split(":")[0] for spec, _, _ in examples] == task_names()
    for spec, prompt, trace in examples:
        problem = get_task(spec).problem(0)
        assert (problem.prompt, problem.trace) == (prompt, trace), spec


@pytest.mark.parametrize("family", task_names())
def test_dial_tables_are_the_dataclasses(family: str) -> None:
    section = TASKS.split(f"\n## {family}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \| (.*?) \|$", section, re.M)
    expected = []
    for one in fields(get_task(family)):
        facts = one.metadata
        values = "{} to {}".format(*facts["range"]) if "range" in facts else ", ".join(facts["choices"])
        expected.append((one.name, str(one.default), values, facts["help"]))
    assert rows == expected


def test_the_byte_table_is_slot_bytes() -> None:
    rows = re.findall(r"^\| \S+ \| (\d+) \| (\d+) \| (\d+) \| (.*) \|$", (DOCS / "concepts.md").read_text(), re.M)
    assert len(rows) == 2
    for layers, heads, size, rest in rows:
        slot = slot_bytes(int(size), int(size), 2)
        token = slot * int(layers) * int(heads)
        shown = [f"{slot}", f"{token:,}", f"{token * 32768 // 2**20:,} MiB", f"{token * 1152 // 2**20} MiB"]
        assert rest.split(" | ") == shown


def test_the_figure_is_what_the_schedule_draws(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    target = tmp_path / "budget.svg"
    subprocess.run([sys.executable, DOCS / "make_figures.py", target], check=True, timeout=120)
    assert _points(target) == _points(DOCS / "img" / "budget.svg")


def _points(figure: Path) -> list[str]:
    """The lines' coordinates; anything else may change with matplotlib."""
    return re.findall(r'<path d="(M [^"]+)" clip-path', figure.read_text())
