"""Under the periodic policy the engine's steps say when events fall: those that `periodic_events` lists, step for step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engines import Watcher, engine, greedy, manager_of, prompts, reference, runtime_of, serve
from near_ties import check_agreement
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput

from reasonkv import Window
from reasonkv.methods import get_method
from reasonkv.periodic import periodic_events
from reasonkv.runtimes.vllm.config import SCHEDULER, EngineConfig

PERIOD, MOST, TOKENS, SEED = 64, 2, 280, 7
GIVEN = {"window": {"size": 48, "buffer": 16, "retention": 0.25, "period": PERIOD, "most": MOST}}
WINDOW = Window(48, 16, 0.25)


@pytest.fixture(scope="module")
def periodic_engine(folder: Path) -> Iterator[Any]:
    options = {"block_size": 32, "num_gpu_blocks_override": 200, "scheduler_cls": SCHEDULER}
    with engine(folder, {"method": "random", "seed": SEED, **GIVEN}, **options) as llm:
        warm_up(runtime_of(llm))
        yield llm


def warm_up(runtime: Any) -> None:
    """Do what model runner V2 does when it starts: run a request that no scheduler knows, and end it."""
    new = NewRequestData("warm-up", [1, 2], [], None, None, ([1],), 0, None)
    started, ended = SchedulerOutput.make_empty(), SchedulerOutput.make_empty()
    started.scheduled_new_reqs, started.num_scheduled_tokens = [new], {"warm-up": 2}
    ended.finished_req_ids = {"warm-up"}
    for scheduled in (started, ended):
        runtime.begin(scheduled)
        runtime.end(0.0)


def to_the_next_period(llm: Any) -> None:
    """Run a request of as many steps as are missing, so that the next step's number is a multiple of the period."""
    missing = -manager_of(llm).steps % PERIOD
    if missing:
        serve(llm, prompts((12,)), greedy(missing))
    assert manager_of(llm).steps % PERIOD == 0


def listed(asked: list[list[int]], tokens: int) -> list[tuple[int, int]]:
    lengths = [len(ids) for ids in asked]
    return periodic_events(WINDOW, lengths, [length + tokens for length in lengths], PERIOD, MOST)


@pytest.mark.parametrize("method", ["random", "kara"])
def test_events_are_those_of_the_list_and_slots_those_of_the_transformers_runtime(
    periodic_engine: Any, method: str
) -> None:
    runtime_of(periodic_engine).use(EngineConfig.parse({"method": method, "seed": SEED, **GIVEN}))
    to_the_next_period(periodic_engine)
    asked = prompts()
    mine = serve(periodic_engine, asked, greedy(TOKENS))
    expected = listed(asked, TOKENS)
    assert len(expected) == 8 and len({length - len(asked[row]) for row, length in expected}) == 4  # four rounds of two
    found = [(row, int(view.length_B)) for (row, layer, _), view in mine.views.items() if layer == 0]
    assert sorted(found) == sorted(expected)
    theirs = reference(method, WINDOW, asked, TOKENS, seed=SEED, window_events=expected)
    check_agreement(mine, theirs, get_method(method).for_budget(WINDOW) if method == "kara" else get_method(method),
                    asked, identical=7 if method == "kara" else 8)  # fmt: skip


def test_scheduler_and_worker_agree_after_every_step_whoever_comes_and_goes(periodic_engine: Any) -> None:
    runtime_of(periodic_engine).use(EngineConfig.parse({"method": "random", "seed": SEED, **GIVEN}))
    watcher = Watcher(periodic_engine)
    for number, ids in enumerate(prompts()):
        watcher.add(str(number), ids, 100 + 20 * number)
    before = runtime_of(periodic_engine).meter.compactions
    for step in range(90):
        if step == 30:
            watcher.engine.abort_request(["2"])
        if step == 40:
            watcher.preempt_all()
        if step == 50:
            watcher.add("late", prompts((47,))[0], 120)
        watcher.step()
    watcher.run()
    assert runtime_of(periodic_engine).meter.compactions >= before + 4
    assert watcher.preempted
