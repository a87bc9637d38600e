"""The README's snippets run, its commands parse, its links and numbers are true."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
from snippets import commands, parses, python_blocks, run_python

from reasonkv.methods import CATALOGUE

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_python_snippets_run_and_the_cache_is_compressed(tmp_path: Path) -> None:
    printed = run_python(python_blocks(README), tmp_path)
    assert "compaction" in printed


def test_the_first_example_has_eight_lines_and_a_hub_model() -> None:
    lines = [
        line for line in python_blocks(README)[0].splitlines() if line and not line.startswith(("from ", "import "))
    ]
    assert len(lines) <= 8
    assert "from_pretrained(" in lines[0] and "testbed" not in "".join(lines)


@pytest.mark.parametrize("command", commands(README))
def test_commands_parse(command: str) -> None:
    parses(command)


def test_make_commands_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    asked = re.findall(r"^make ([a-z-]+)", README, re.M)
    assert {"demo", "test"} <= set(asked) <= targets


def test_links_point_at_files() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_number_of_methods_is_that_of_the_catalogue() -> None:
    assert f"{len(CATALOGUE)} methods" in README


def test_the_table_of_pretrained_models_is_their_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    load = importlib.import_module("tables").load
    frame = load(ROOT / "docs" / "results" / "pretrained_league")["replay"]
    frame = frame[frame["size"].isin(["64", ""])]
    titles = re.findall(r"([\w.-]+) \(n = (\d+)\)", README)
    shown = re.findall(r"^\| `([\w-]+)` \|((?: (?:[\d.]+ ± [\d.]+|–) \|){3})$", README, re.M)
    assert len(titles) == 3 and {"full", "random", "oracle", "forecast", "expected"} <= {name for name, _ in shown}
    for name, cells in shown:
        for (title, n), cell in zip(titles, cells.split("|"), strict=False):
            own = frame[frame["model"].str.contains(title) & (frame["method"] == name)]["kl"].astype(float)
            assert len(own) in {0, int(n)}
            assert cell.strip() == (f"{own.mean():.4f} ± {own.sem():.4f}" if len(own) else "–"), (name, title)
