"""Two tensor-parallel ranks drop what one drops: every rank plans for its own heads, by their global numbers, and heads
that decide together do so across ranks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engines import prompts, reference
from near_ties import check_agreement
from ranks import serve_by_two, two_cores

from reasonkv import Budget, testbed
from reasonkv.methods import get_method

METHODS = {
    "random": "head", "expected": "head", "forecast": "head", "tova": "layer", "cask:mass=none": "model",
    "triattention:mode=global": "model",
}  # fmt: skip
GIVEN: dict[str, Any] = {"tokens": 64, "interval": 32, "sinks": 4, "recent": 16, "prompt": "count"}
LENGTHS, TOKENS, SEED = (40, 90, 130), 70, 7
SHARES = "0.45/2/0.45"


@two_cores
@pytest.mark.parametrize("shares", ["", SHARES])
def test_two_ranks_say_and_keep_what_one_does(shares: str, folder: Path, tmp_path: Path) -> None:
    calibration = str(testbed.testbed_path() / "reasonkv_calibration.safetensors")
    fields = GIVEN | ({"layer_shares": shares} if shares else {})
    served = {name: METHODS[name] for name in (("random", "tova") if shares else METHODS)}
    given = [{"method": name, "seed": SEED, "calibration": calibration, **fields} for name in served]
    runs = serve_by_two("serve_on_ranks", folder, tmp_path, given, LENGTHS, TOKENS, tensor_parallel_size=2)
    asked = prompts(LENGTHS)
    for (name, scope), mine in zip(served.items(), runs, strict=True):
        method = get_method(name)
        assert method.needs.scope == scope
        theirs = reference(name, Budget(**fields), asked, TOKENS, seed=SEED)
        assert all(kept.shape[0] == 2 for kept in mine.kept.values())  # both heads, one from each rank
        check_agreement(mine, theirs, method, asked, identical=len(asked) if name == "random" else 2)
