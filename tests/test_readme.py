"""The README's snippets run, its commands parse, its links and numbers are true."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import mean, stdev

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


def test_the_table_of_the_first_look_is_its_records() -> None:
    _, *lines = (ROOT / "docs" / "data" / "first_look.jsonl").read_text().splitlines()
    cells: dict[tuple[str, int | None], list[float]] = {}
    for line in lines:
        record = json.loads(line)
        cells.setdefault((record["method"].partition(":")[0], record["tokens"]), []).append(100 * record["top1"])
    shown = re.findall(r"^\| `([\w-]+)` \| ([\d.]+) ± ([\d.]+) \| ([\d.]+) ± ([\d.]+) \|$", README, re.M)
    assert [row[0] for row in shown] == [name for name, tokens in cells if tokens == 64]
    for name, *numbers in shown:
        found = []
        for tokens in (64, 128):
            values = cells[name, tokens]
            found += [f"{mean(values):.1f}", f"{stdev(values) / len(values) ** 0.5:.1f}"]
        assert numbers == found, name
