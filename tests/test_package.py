"""What is published: small archives that hold what an installation needs."""

from __future__ import annotations

import re
import sys
import zlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MEGABYTE = 1_000_000


def published() -> list[Path]:
    """The files of the source archive; the wheel has those under src."""
    text = (ROOT / "pyproject.toml").read_text()
    patterns = re.findall(
        r'"([^"]+)"', re.search(r"\[tool\.hatch\.build\.targets\.sdist\]\n.*?include = (\[.*?\])", text, re.S)[1]
    )
    found = [match for pattern in patterns for match in ROOT.glob(pattern)]
    files = [file for one in found for file in ([one] if one.is_file() else one.rglob("*")) if file.is_file()]
    return [file for file in files if "__pycache__" not in file.parts]


def test_the_archives_stay_under_five_megabytes() -> None:
    size = sum(len(zlib.compress(file.read_bytes())) for file in published())
    assert 3 * MEGABYTE < size < 5 * MEGABYTE  # the bundled model is 3.6 MB


def test_the_bundled_model_folder_holds_what_the_model_needs_and_nothing_of_its_training() -> None:
    names = {file.name for file in published() if file.parent.name == "model"}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= names
    assert not [name for name in names if "training" in name or name.endswith((".png", ".pt"))]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="needs tomllib")
def test_the_project_names_its_readme_licence_and_links() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"Homepage", "Documentation", "Issues", "Changelog"} <= set(project["urls"])
    assert (ROOT / project["readme"]).is_file()
    assert all((ROOT / file).is_file() for file in project["license-files"])
    version = project["version"]
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## {version}\n" in (ROOT / "CHANGELOG.md").read_text()
