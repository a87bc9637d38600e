"""Two tensor-parallel ranks drop what one drops: every rank plans for its own heads, by their global numbers, and heads
that decide together do so across ranks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import Run, prompts, reference
from near_ties import check_agreement

from reasonkv import Budget, testbed
from reasonkv.methods import get_method

METHODS = {
    "random": "head", "expected": "head", "forecast": "head", "tova": "layer", "cask:mass=none": "model",
    "triattention:mode=global": "model",
}  # fmt: skip
GIVEN: dict[str, Any] = {"tokens": 64, "interval": 32, "sinks": 4, "recent": 16, "prompt": "count"}
LENGTHS, TOKENS, SEED = (40, 90, 130), 70, 7
SERVE = """
import json, sys
from pathlib import Path
import torch
from engines import engine, prompts
from ranks import serve_on_ranks
if __name__ == "__main__":
    folder, out, job = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    with engine(folder, job["given"][0], tensor_parallel_size=2, distributed_executor_backend="mp") as llm:
        asked = prompts(job["lengths"])
        runs = [serve_on_ranks(llm, given, asked, job["tokens"]) for given in job["given"]]
        torch.save([(run.tokens, run.kept) for run in runs], out)
"""


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="vLLM binds every rank to a core of its own")
def test_two_ranks_say_and_keep_what_one_does(folder: Path, tmp_path: Path) -> None:
    calibration = str(testbed.testbed_path() / "reasonkv_calibration.safetensors")
    given = [{"method": name, "seed": SEED, "calibration": calibration, **GIVEN} for name in METHODS]
    script, out = tmp_path / "serve.py", tmp_path / "runs.pt"  # a file, because the ranks are spawned
    script.write_text(SERVE)
    job = json.dumps({"given": given, "lengths": LENGTHS, "tokens": TOKENS})
    done = subprocess.run(
        [sys.executable, str(script), str(folder), str(out), job], capture_output=True, text=True, timeout=900,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent), "VLLM_CPU_OMP_THREADS_BIND": "0|1"}, check=False,
    )  # fmt: skip
    assert out.is_file(), done.stderr[-3000:]
    runs = [Run(*run) for run in torch.load(out, weights_only=True)]
    asked = prompts(LENGTHS)
    for (name, scope), mine in zip(METHODS.items(), runs, strict=True):
        method = get_method(name)
        assert method.needs.scope == scope
        theirs = reference(name, Budget(**GIVEN), asked, TOKENS, seed=SEED)
        assert all(kept.shape[0] == 2 for kept in mine.kept.values())  # both heads, one from each rank
        check_agreement(mine, theirs, method, asked, identical=len(asked) if name == "random" else 2)
