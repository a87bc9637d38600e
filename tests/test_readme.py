"""The README's snippets run, its commands parse, its links and numbers are true."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from snippets import commands, parses, python_blocks, run_python

from reasonkv.evaluate.table import read_results
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


def test_the_table_of_a_pretrained_model_is_its_records() -> None:
    frame = read_results([ROOT / "docs" / "results" / "pretrained"])
    frame["size"] = [json.loads(one)["tokens"] if isinstance(one, str) else None for one in frame["budget"]]
    shown = re.findall(r"^\| `(\w+)` \|((?: (?:[\d.]+ ± [\d.]+|–) \|){4})$", README, re.M)
    assert {name for name, _ in shown} == set(frame["label"])
    for name, cells in shown:
        found = []
        for kind, metric, scale, digits in (("replay", "kl", 1, 3), ("evaluate", "correct", 100, 0)):
            for size in (32, 64):
                own = frame[(frame["label"] == name) & (frame["kind"] == kind)]
                values = scale * own.loc[own["size"].eq(size) | (name == "full"), metric].astype(float)
                assert len(values) in {0, 32}
                found.append(f" {values.mean():.{digits}f} ± {values.sem():.{digits}f} " if len(values) else " – ")
        assert cells.split("|")[:-1] == found, name
