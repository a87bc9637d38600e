"""Requests that begin together and would all be compacted after the same step take turns with `stagger`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engines import engine, free_blocks, greedy, prompts, reference, serve

from reasonkv import Budget
from reasonkv.runtimes.vllm.config import SCHEDULER

SEED, TOKENS, TURNS = 7, 150, 4
FIELDS = {"tokens": 48, "interval": 32, "sinks": 4, "recent": 16, "prompt": "on_top"}


@pytest.mark.parametrize("scheduler", [None, SCHEDULER], ids=["stock", "ours"])
@pytest.mark.parametrize("method", ["random", "snapkv:window=16"])
def test_requests_take_turns_by_their_prompt_and_seed(folder: Path, method: str, scheduler: str | None) -> None:
    """The stock scheduler does not know a request's seed, so there prompts of one length share a turn."""
    lengths, seeds = ((40,) * TURNS, range(TURNS)) if scheduler else (range(40, 40 + TURNS), [0] * TURNS)
    asked = prompts(tuple(lengths))
    sampling = [greedy(TOKENS, extra_args={"reasonkv": {"seed": seed}}) for seed in seeds]
    options = {"block_size": 32, "num_gpu_blocks_override": 65} | ({"scheduler_cls": scheduler} if scheduler else {})
    with engine(folder, {"method": method, "seed": SEED, "stagger": TURNS, **FIELDS}, **options) as llm:
        before = free_blocks(llm)
        mine = serve(llm, asked, sampling)
        assert free_blocks(llm) == before
    after: list[set[int]] = []  # tokens of the answer at which each request was compacted
    for number, (ids, seed) in enumerate(zip(asked, seeds, strict=True)):
        own = Budget(early=(len(ids) + seed) % TURNS * 8, **FIELDS)  # type: ignore[arg-type]
        theirs = reference(method, own, [ids], TOKENS, seed=SEED, row_seeds=[seed])
        kept = {key[1:]: value for key, value in mine.kept.items() if key[0] == number}
        assert mine.tokens[number] == theirs.tokens[0]
        assert kept.keys() == {key[1:] for key in theirs.kept}
        assert all(torch.equal(kept[key[1:]], value) for key, value in theirs.kept.items())
        after.append({int(view.length_B[0]) - len(ids) for key, view in mine.views.items() if key[0] == number})
    assert all(len(own) >= 2 for own in after)
    assert sum(map(len, after)) == len(set.union(*after))  # never two requests after one step
