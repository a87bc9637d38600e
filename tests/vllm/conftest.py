"""Tests of the vLLM runtime. Those that need vLLM itself are left out where it is not installed: its requirements are
its own, and `make test-vllm` installs them and runs everything here.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

try:  # the folder's own name would be found as an empty package
    MISSING = importlib.util.find_spec("vllm.v1") is None
except ModuleNotFoundError:
    MISSING = True
WITHOUT_VLLM = {f"test_{name}.py" for name in ["config", "layout", "pieces", "sources", "view"]}
"""They need nothing but our own code."""
collect_ignore = sorted({one.name for one in Path(__file__).parent.glob("test_*.py")} - WITHOUT_VLLM) if MISSING else []


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model as a folder that vLLM loads."""
    from engines import model_folder

    return model_folder(tmp_path_factory.mktemp("model"))
