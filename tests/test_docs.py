"""The documentation builds without a broken link, loads nothing from the network, and says what the code does."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields
from html.parser import HTMLParser
from pathlib import Path

import pytest
from snippets import commands, hub_model, parses, python_blocks, run_here

from reasonkv.tasks import get_task, task_names

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
TASKS = (DOCS / "tasks.md").read_text()
# The page on adding a method has a test of its own.
PAGES = [one.relative_to(DOCS).as_posix() for one in sorted(DOCS.rglob("*.md")) if one.name != "adding-a-method.md"]
SNIPPETS = [page for page in PAGES if python_blocks((DOCS / page).read_text())]
COMMANDS = [(page, command) for page in PAGES for command in commands((DOCS / page).read_text())]
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


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hub_model(tmp_path_factory.mktemp("hub") / "model")


@pytest.mark.parametrize("page", SNIPPETS)
def test_python_of_a_page_runs(page: str, model: Path, tmp_path: Path) -> None:
    printed = run_here(python_blocks((DOCS / page).read_text()), model, tmp_path, page)
    if "max_new_tokens=8192" in (DOCS / page).read_text():
        assert "compaction" in printed


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_commands_of_a_page_parse(page: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    parses(command, (DOCS / page).read_text())


def test_task_examples_are_what_get_task_gives() -> None:
    examples = re.findall(r"`([a-z]+:[^`]+)`:\n\n```text\n(.*?)\n(.*?)\n```", TASKS)
    assert [spec.split(":")[0] for spec, _, _ in examples] == task_names()
    for spec, prompt, trace in examples:
        problem = get_task(spec).problem(0)
        assert (problem.prompt, problem.trace) == (prompt, trace), spec


@pytest.mark.parametrize("family", task_names())
def test_dial_tables_are_the_dataclasses(family: str) -> None:
    section = TASKS.split(f"\n### {family}\n")[1].split("\n### ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \| (.*?) \|$", section, re.M)
    expected = []
    for one in fields(get_task(family)):
        facts = one.metadata
        values = "{} to {}".format(*facts["range"]) if "range" in facts else ", ".join(facts["choices"])
        expected.append((one.name, str(one.default), values, facts["help"]))
    assert rows == expected


def test_the_byte_table_adds_up() -> None:
    rows = re.findall(r"^\| \S+ \| (\d+) \| (\d+) \| (\d+) \| (.*) \|$", (DOCS / "concepts.md").read_text(), re.M)
    assert len(rows) == 2
    for layers, heads, size, rest in rows:
        slot = (int(size) + int(size)) * 2  # key and value, bf16
        token = slot * int(layers) * int(heads)
        shown = [f"{slot}", f"{token:,}", f"{token * 32768 // 2**20:,} MiB", f"{token * 1152 // 2**20} MiB"]
        assert rest.split(" | ") == shown


def test_the_figure_is_what_the_schedule_draws(tmp_path: Path) -> None:
    pytest.importorskip("vl_convert")
    target = tmp_path / "budget.svg"
    subprocess.run([sys.executable, DOCS / "make_figures.py", target], check=True, timeout=120)
    assert _lines(target) == _lines(DOCS / "img" / "budget.svg")


def _lines(figure: Path) -> list[str]:
    """The coordinates of the lines; anything else may change with the library that draws them."""
    found = re.findall(r'mark-line.*?<path[^>]* d="(M[^"]+)"', figure.read_text(), re.S)
    assert found
    return found


def test_the_architecture_page_names_what_exists() -> None:
    page = (DOCS / "architecture.md").read_text()
    tree = page.split("```\nsrc/reasonkv/\n")[1].split("```")[0]
    for line in tree.splitlines():
        names = re.split(r"  +", line.strip())[0].split()
        for name in names:
            base = ROOT / "src" / "reasonkv" if line.startswith("  ") else ROOT
            assert (base / name).exists(), name
    for name in re.findall(r"^\|[^|]*\| `([\w/]+\.py)` \|$", page, re.M):
        assert name.startswith("tests/") or (ROOT / "src" / "reasonkv" / name).exists(), name
    for name in re.findall(r"`(tests/[\w/.]+)`", page):
        assert (ROOT / name).exists(), name
