"""The notebook runs from its first cell to its last, and what it shows is what it showed when it was committed."""

from __future__ import annotations

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

NOTEBOOK = Path(__file__).parent.parent / "examples" / "quickstart.ipynb"


def test_the_notebook_runs_and_solves_its_problem(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    texts = [output.get("text", "") + str(output.get("data", {}).get("text/plain", "")) for output in outputs]
    assert any(text == "True" for text in texts), texts  # full KV solves it
    assert any(text.startswith("True") and "\n" in text for text in texts), texts  # and so does the bounded cache
    assert any("text/html" in output.get("data", {}) for output in outputs)
    assert "right of 2" in texts[-1] or "tokens" in texts[-1]
