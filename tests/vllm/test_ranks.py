"""Two tensor-parallel ranks drop what one drops: every rank plans for its own heads, by their global numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from engines import prompts, reference

from reasonkv import Budget

SERVE = """
import json, sys
from pathlib import Path
from engines import engine, greedy, prompts
if __name__ == "__main__":
    given = json.loads(sys.argv[2])
    with engine(Path(sys.argv[1]), given, tensor_parallel_size=2, distributed_executor_backend="mp") as llm:
        asked = [{"prompt_token_ids": ids} for ids in prompts((12, 90, 130))]
        outputs = llm.generate(asked, greedy(100), use_tqdm=False)
        print("TOKENS", json.dumps([list(output.outputs[0].token_ids) for output in outputs]))
"""


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="vLLM binds every rank to a core of its own")
def test_two_ranks_say_what_one_says(folder: Path, tmp_path: Path) -> None:
    given = {"method": "random", "tokens": 64, "interval": 32, "sinks": 4, "recent": 16, "seed": 7}
    script = tmp_path / "serve.py"  # a file, because the ranks are spawned
    script.write_text(SERVE)
    done = subprocess.run(
        [sys.executable, str(script), str(folder), json.dumps(given)], capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent), "VLLM_CPU_OMP_THREADS_BIND": "0|1"}, check=False,
    )  # fmt: skip
    line = next((one for one in done.stdout.splitlines() if one.startswith("TOKENS ")), None)
    assert line is not None, done.stderr[-3000:]
    theirs = reference("random", Budget(64, interval=32, sinks=4, recent=16), prompts((12, 90, 130)), 100, seed=7)
    assert json.loads(line.removeprefix("TOKENS ")) == theirs.tokens
