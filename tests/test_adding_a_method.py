"""The page on adding a method: its files make a method of another package, and its commands and outputs are true."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import run

from reasonkv import get_method, method_names
from reasonkv.methods import CATALOGUE

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "adding-a-method.md").read_text()
METHOD, VECTOR_TEST = re.findall(r"```python\n(.*?)```", PAGE, re.S)
(PROJECT,) = re.findall(r"```toml\n(.*?)```", PAGE, re.S)
SHOWN, REPLAYED, NEEDED = re.findall(r"```text\n(.*?)```", PAGE, re.S)
COMMANDS = re.findall(r"^(reasonkv .*)$", PAGE, re.M)
NAME = "attended-values"


def install(folder: Path, name: str, entry: str) -> None:
    """What an installer leaves of a package's entry point."""
    info = folder / f"{name.replace('-', '_')}-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text(f"[reasonkv.methods]\n{name} = {entry}\n")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path with the page's module, installed under the page's entry point."""
    folder = tmp_path / "site"
    folder.mkdir()
    (module,) = re.findall(r'py-modules = \["(\w+)"\]', PROJECT)
    (folder / f"{module}.py").write_text(METHOD)
    name, entry = re.findall(r'\[project\.entry-points\."reasonkv\.methods"\]\n([\w-]+) = "([\w:]+)"', PROJECT)[0]
    install(folder, name, entry)
    monkeypatch.syspath_prepend(str(folder))
    importlib.invalidate_caches()
    yield folder
    sys.modules.pop(module, None)


def heading(table: str) -> list[str]:
    """The column names of a table: the line above its rule."""
    lines = table.splitlines()
    return lines[next(i for i, line in enumerate(lines) if "───" in line) - 1].split()


def test_the_entry_point_gives_the_method_its_options_and_a_sentence_for_a_wrong_one(package: Path) -> None:
    assert method_names() == [*CATALOGUE, NAME]
    assert get_method(f"{NAME}:window=8").needs.queries == 8
    code, _, err = run("generate", "--method", f"{NAME}:window=0", "--task", "recall", "--budget", "64")
    assert code == 2
    assert f"{NAME}: window must be at least 1, not 0." in err


def test_the_page_shows_what_methods_prints(package: Path) -> None:
    assert run("methods", NAME)[1].strip() == SHOWN.strip()
    listed = run("methods")[1]
    assert NAME in listed
    assert max(map(len, listed.splitlines())) <= 100


def test_the_vector_test_of_the_page_passes(package: Path) -> None:
    found: dict[str, object] = {}
    exec(compile(VECTOR_TEST, "vector test of the page", "exec"), found)  # the page's own code
    found["test_scores_equal_the_formula_written_out"]()  # type: ignore[operator]


def test_every_command_of_the_page_runs_and_its_tables_have_these_columns(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    printed = {}
    for line in COMMANDS:
        command, *words = shlex.split(line)[1:]
        if command in ("replay", "evaluate"):  # one problem and a short trace: the same code in a second
            words[words.index("--limit") + 1] = "1"
            words += ["--max-new-tokens", "120", "--batch-size", "1"]
        code, out, err = run(command, *words)
        assert code == 0, (line, err)
        printed[command] = out
    assert heading(printed["replay"]) == heading(REPLAYED)
    assert heading(printed["frontier"]) == heading(NEEDED)
    for table in (printed["replay"], printed["frontier"], printed["evaluate"], REPLAYED, NEEDED):
        assert re.search(rf"^ {NAME}  .*\d", table, re.M)
    assert (tmp_path / "report.html").exists()
    assert (tmp_path / "fate.html").exists()


def test_files_and_names_of_the_page_exist() -> None:
    named = set(re.findall(r"`((?:src|tests|benchmarks|docs)/[\w./-]+)`", PAGE))
    assert len(named) > 5
    for path in named:
        assert (ROOT / path).exists() or "attended" in path, path
    assert "_NAMES = (" in (ROOT / "src/reasonkv/report/style.py").read_text()
    for test in ("test_exactness", "test_generate"):
        assert "\nSPECS = {" in (ROOT / "tests" / f"{test}.py").read_text()
    assert re.search(r"^FORMULAS\b", (ROOT / "benchmarks" / "event_cost.py").read_text(), re.M)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import nothing_of_this_name", "cannot be used: ModuleNotFoundError: No module named 'nothing_of_this_name'."),
        (METHOD, f"gives a method that calls itself '{NAME}'; give both the same name."),
        (METHOD.replace("title: ClassVar", "tittle: ClassVar").replace(NAME, "other"), "has no attribute 'title'"),
        ("AttendedValues = 7", "does not name a reasonkv Method class."),
    ],
)
def test_a_package_that_does_not_work_is_named_and_takes_nothing_else_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, words: str
) -> None:
    (tmp_path / "other_method.py").write_text(source)
    install(tmp_path, "other", "other_method:AttendedValues")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    try:
        code, out, err = run("methods")
        assert code == 0
        assert "snapkv" in out
        assert words in err
        code, _, err = run("methods", "other")
        assert code == 2
        assert err.startswith("Error: ")
        assert words in err
    finally:
        sys.modules.pop("other_method", None)
