"""Two pipeline stages say and keep what one worker does: each compacts its own layers, by their global numbers."""

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

METHODS = ("random", "expected", "tova")
GIVEN: dict[str, Any] = {"tokens": 64, "interval": 32, "sinks": 4, "recent": 16, "prompt": "count"}
LENGTHS, TOKENS, SEED = (40, 90, 130), 70, 7
# Compiled, because vLLM 0.32 makes what a second stage receives into only when it warms up for compilation on a CPU.
SERVE = """
import json, os, sys
from pathlib import Path
import torch
from engines import engine, prompts
from ranks import serve_on_stages
if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"  # functions travel to the workers by way of the engine's process
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    folder, out, job = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    options = {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp", "enforce_eager": False}
    with engine(folder, job["given"][0], **options) as llm:
        asked = prompts(job["lengths"])
        runs = [serve_on_stages(llm, given, asked, job["tokens"]) for given in job["given"]]
        torch.save([(run.tokens, run.kept) for run in runs], out)
"""


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="vLLM binds every rank to a core of its own")
def test_two_stages_say_and_keep_what_one_worker_does(folder: Path, tmp_path: Path) -> None:
    calibration = str(testbed.testbed_path() / "reasonkv_calibration.safetensors")
    given = [{"method": name, "seed": SEED, "calibration": calibration, **GIVEN} for name in METHODS]
    script, out = tmp_path / "serve.py", tmp_path / "runs.pt"  # a file, because the stages are spawned
    script.write_text(SERVE)
    job = json.dumps({"given": given, "lengths": LENGTHS, "tokens": TOKENS})
    done = subprocess.run(
        [sys.executable, str(script), str(folder), str(out), job], capture_output=True, text=True, timeout=900,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]), "VLLM_CPU_OMP_THREADS_BIND": "0|1"},
        check=False,
    )  # fmt: skip
    assert out.is_file(), done.stderr[-3000:]
    runs = [Run(*run) for run in torch.load(out, weights_only=True)]
    asked = prompts(LENGTHS)
    for name, mine in zip(METHODS, runs, strict=True):
        theirs = reference(name, Budget(**GIVEN), asked, TOKENS, seed=SEED)
        assert {layer for _, layer, _ in mine.kept} == {layer for _, layer, _ in theirs.kept}  # of both stages
        check_agreement(mine, theirs, get_method(name), asked, identical=len(asked) if name == "random" else 2)
