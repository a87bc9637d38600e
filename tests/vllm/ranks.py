"""What runs inside the workers of an engine of several ranks: switching methods, and noting what they keep."""

from __future__ import annotations

from typing import Any

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
