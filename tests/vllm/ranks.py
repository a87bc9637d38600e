"""Engines of two workers, tensor-parallel ranks or pipeline stages: switching methods, and noting what they keep."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import Kept, Recorder, Run, greedy
from torch import Tensor

from reasonkv.runtimes.vllm.config import EngineConfig


def start(worker: Any, given: dict[str, Any]) -> None:
    """Serve by another method from now on, and note what its events keep."""
    worker.runtime.use(EngineConfig.parse(given))
    worker.runtime.compactor.observer = Recorder()


def kept_by(worker: Any) -> dict[tuple[str, int, int], Tensor]:
    """Token indices that stayed of this rank's heads, by request, layer and event."""
    found: dict[tuple[str, int, int], Tensor] = worker.runtime.compactor.observer.kept
    return found


def serve_on_ranks(llm: Any, given: dict[str, Any], asked: list[list[int]], tokens: int) -> Run:
    """All requests at once; what every rank kept, heads side by side."""
    llm.collective_rpc(start, args=(given,))
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in asked], greedy(tokens), use_tqdm=False)
    parts = llm.collective_rpc(kept_by)
    number = {output.request_id: index for index, output in enumerate(outputs)}
    kept: Kept = {
        (number[name.split("-")[0]], layer, event): torch.cat([part[name, layer, event] for part in parts])
        for name, layer, event in parts[0]
    }
    return Run([list(output.outputs[0].token_ids) for output in outputs], kept)


def serve_on_stages(llm: Any, given: dict[str, Any], asked: list[list[int]], tokens: int) -> Run:
    """All requests at once; what every stage kept of its own layers."""
    llm.collective_rpc(start, args=(given,))
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in asked], greedy(tokens), use_tqdm=False)
    number = {output.request_id: index for index, output in enumerate(outputs)}
    kept: Kept = {
        (number[name.split("-")[0]], layer, event): slots
        for part in llm.collective_rpc(kept_by)
        for (name, layer, event), slots in part.items()
    }
    return Run([list(output.outputs[0].token_ids) for output in outputs], kept)


two_cores = pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="vLLM binds every worker to a core of its own")
# a file, because workers are spawned
SERVE = """
import json, os, sys
from pathlib import Path
import torch
import ranks
from engines import engine, prompts
if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"  # functions travel to the workers by way of the engine's process
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    folder, out, job = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    with engine(folder, job["given"][0], distributed_executor_backend="mp", **job["options"]) as llm:
        serve, asked = getattr(ranks, job["serve"]), prompts(job["lengths"])
        runs = [serve(llm, given, asked, job["tokens"]) for given in job["given"]]
        torch.save([(run.tokens, run.kept) for run in runs], out)
"""


def serve_by_two(
    serve: str, folder: Path, where: Path, given: list[dict[str, Any]], lengths: tuple[int, ...], tokens: int,
    **options: Any,
) -> list[Run]:  # fmt: skip
    """What an engine of two workers says and keeps, by each configuration in turn.

    Args:
        serve: one of the functions above.
        folder: the model.
        where: an empty folder.
        given: configurations.
        lengths: of the prompts.
        tokens: of every answer.
        options: of the engine.
    """
    script, out = where / "serve.py", where / "runs.pt"
    script.write_text(SERVE)
    job = {"serve": serve, "given": given, "lengths": lengths, "tokens": tokens, "options": options}
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, str(script), str(folder), str(out), json.dumps(job)], capture_output=True, text=True,
        timeout=900, env=os.environ | {"PYTHONPATH": path, "VLLM_CPU_OMP_THREADS_BIND": "0|1"}, check=False,
    )  # fmt: skip
    assert out.is_file(), done.stderr[-3000:]
    return [Run(*run) for run in torch.load(out, weights_only=True)]
