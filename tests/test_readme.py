"""The README's snippets run, and its commands exist with the flags it shows."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)
COMMANDS = [
    line.split("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.S)
    for line in block.splitlines()
    if line.startswith("reasonkv ")
]


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_python_snippets_run(number: int, tmp_path: Path) -> None:
    script = tmp_path / "snippet.py"
    script.write_text(PYTHON[number])
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    if "load_testbed" in PYTHON[number]:
        assert "events" in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_exist_with_their_flags(command: str) -> None:
    from reasonkv.cli import app

    words = shlex.split(command)[1:]
    help_text = CliRunner().invoke(app, [words[0], "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).output
    for flag in (word for word in words if word.startswith("--")):
        assert flag in help_text, f"{words[0]} has no {flag}"


def test_links_point_at_files() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_tree_names_what_exists() -> None:
    tree = re.search(r"```\nsrc/reasonkv/\n(.*?)```", README, re.S)
    assert tree is not None
    for line in tree.group(1).splitlines():
        if line.startswith("  "):
            for name in line[:31].split():
                assert (ROOT / "src/reasonkv" / name).exists(), name
