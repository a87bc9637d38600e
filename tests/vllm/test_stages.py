"""Two pipeline stages say and keep what one worker does: each compacts its own layers, by their global numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engines import prompts, reference
from near_ties import check_agreement
from ranks import serve_by_two, two_cores

from reasonkv import Budget, testbed
from reasonkv.methods import get_method

METHODS = ("random", "expected", "tova")
GIVEN: dict[str, Any] = {"tokens": 64, "interval": 32, "sinks": 4, "recent": 16, "prompt": "count"}
LENGTHS, TOKENS, SEED = (40, 90, 130), 70, 7
# Compiled, because vLLM 0.32 makes what a second stage receives into only when it warms up for compilation on a CPU.


@two_cores
def test_two_stages_say_and_keep_what_one_worker_does(folder: Path, tmp_path: Path) -> None:
    calibration = str(testbed.testbed_path() / "reasonkv_calibration.safetensors")
    given = [{"method": name, "seed": SEED, "calibration": calibration, **GIVEN} for name in METHODS]
    runs = serve_by_two(
        "serve_on_stages", folder, tmp_path, given, LENGTHS, TOKENS, pipeline_parallel_size=2, enforce_eager=False
    )
    asked = prompts(LENGTHS)
    for name, mine in zip(METHODS, runs, strict=True):
        theirs = reference(name, Budget(**GIVEN), asked, TOKENS, seed=SEED)
        assert {layer for _, layer, _ in mine.kept} == {layer for _, layer, _ in theirs.kept}  # of both stages
        check_agreement(mine, theirs, get_method(name), asked, identical=len(asked) if name == "random" else 2)
