"""Blocks: as many as the formula says, all of them back in the end, and both sides of the engine agree at every step."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import (
    FULL_KV,
    Watcher,
    engine,
    free_blocks,
    full_kv,
    greedy,
    manager_of,
    prompts,
    reference,
    runtime_of,
    serve,
)

from reasonkv import Budget, CompressedCache, Window, schedule, testbed
from reasonkv.runtimes.vllm.config import SCHEDULER, EngineConfig
from reasonkv.testbed import load_testbed

SEED, BLOCK = 7, 32
SMALL = {"tokens": 64, "interval": 32, "sinks": 4, "recent": 16, "prompt": "count"}
CALIBRATION = str(testbed.testbed_path() / "reasonkv_calibration.safetensors")
BUDGET = Budget(64, interval=32, sinks=4, recent=16, prompt="count")


@pytest.fixture(scope="module")
def small_engine(folder: Path) -> Iterator[Any]:
    """32 blocks of 32 tokens, fed at most 48 tokens a step, by our scheduler."""
    options = {"block_size": BLOCK, "num_gpu_blocks_override": 33, "max_num_batched_tokens": 48}
    options["scheduler_cls"] = SCHEDULER
    with engine(folder, {"method": "random", "seed": SEED, **SMALL}, max_model_len=768, **options) as llm:
        yield llm


def test_a_request_holds_what_the_formula_says_and_gives_it_back(small_engine: Any) -> None:
    before = free_blocks(small_engine)
    asked = prompts()
    watcher = Watcher(small_engine)
    for number, ids in enumerate(asked):
        watcher.add(str(number), ids, 120)
    watcher.run()
    for number, ids in enumerate(asked):
        steady = -(-schedule.capacity(BUDGET, len(ids), 768) // BLOCK)
        peak = -(-schedule.bound(BUDGET, len(ids), 768) // BLOCK)
        assert watcher.most[str(number)] == peak
        assert watcher.last[str(number)] == steady == 3
    assert max(watcher.most.values()) == 7  # the prompt of 200 tokens, until it was cut
    assert free_blocks(small_engine) == before == 32


def test_a_prompt_in_pieces_is_cut_as_a_whole_one(small_engine: Any) -> None:
    asked = prompts((130, 200, 310))
    mine = serve(small_engine, asked, greedy(60))
    theirs = reference("random", BUDGET, asked, 60, seed=SEED)
    assert mine.tokens == theirs.tokens
    assert mine.kept.keys() == theirs.kept.keys()
    assert all(torch.equal(mine.kept[key], kept) for key, kept in theirs.kept.items())


def test_all_blocks_come_back_and_every_text_is_its_own_whoever_is_aborted_or_preempted(small_engine: Any) -> None:
    before, draw = free_blocks(small_engine), random.Random(0)
    longest = prompts((310,) * 8)
    watcher = Watcher(small_engine, repeats=True)
    asked: dict[str, tuple[list[int], int]] = {}
    for number in range(200):
        ids = draw.choice(longest)[: draw.randint(1, 180)]
        asked[f"r{number}"] = (ids, draw.randint(1, 60))
    aborted = set(draw.sample(sorted(asked), 40))
    for name, (ids, tokens) in asked.items():
        watcher.add(name, ids, tokens)
    doomed = {name: draw.randint(0, 30) for name in aborted}  # tokens after which they are aborted
    steps = 0
    while watcher.engine.has_unfinished_requests():
        watcher.step()
        steps += 1
        if steps % 150 == 0:  # admission reserves all that a request will need, so only force preempts it
            watcher.preempt_all()
        for name in [name for name, after in doomed.items() if len(watcher.tokens.get(name, ())) >= after]:
            watcher.engine.abort_request([name])
            del doomed[name]
    assert free_blocks(small_engine) == before
    manager = manager_of(small_engine)
    assert not manager.allocations and not any(manager.req_to_blocks.values())
    assert len(watcher.preempted) >= 8 and watcher.repeated
    for name in sorted(set(asked) - aborted):
        ids, tokens = asked[name]
        assert len(watcher.tokens[name]) == tokens
        assert serve(small_engine, [ids], greedy(tokens)).tokens == [watcher.tokens[name]], name


@pytest.mark.parametrize("method", ["random", "snapkv:window=16", "tova", "cask:mass=none"])
def test_what_a_method_has_seen_is_fed_again_too(small_engine: Any, method: str) -> None:
    """Its seed, recent queries, what was observed of every query, and the text, of requests that are preempted twice."""
    runtime, asked = runtime_of(small_engine), prompts((12, 90, 130))
    before = runtime.config
    runtime.use(EngineConfig.parse({"method": method, "calibration": CALIBRATION, **SMALL}))
    try:
        seeds = [{"reasonkv": {"seed": 5 + number}} for number in range(3)]
        uninterrupted = serve(small_engine, asked, [greedy(90, extra_args=seed) for seed in seeds])
        assert len(uninterrupted.kept) >= 3 * 3 * 2
        watcher = Watcher(small_engine, repeats=True)
        for number, ids in enumerate(asked):
            watcher.add(str(number), ids, 90, extra_args=seeds[number])
        for _ in range(2):
            for _ in range(40):
                watcher.step()
            watcher.preempt_all()
        watcher.run()
    finally:
        runtime.use(before)
    assert watcher.preempted == {"0", "1", "2"} and watcher.repeated
    assert [watcher.tokens[str(number)] for number in range(3)] == uninterrupted.tokens


def test_a_request_that_opts_out_keeps_full_kv_beside_compressed_ones(small_engine: Any) -> None:
    before = free_blocks(small_engine)
    asked, opted_out = prompts((90, 200, 47, 130, 64)), {"0", "1"}
    watcher = Watcher(small_engine)
    for number, ids in enumerate(asked):
        options = {"extra_args": FULL_KV} if str(number) in opted_out else {}
        watcher.add(str(number), ids, 300, **options)
    watcher.step()
    watcher.step()
    # 13 and 16 of 32 blocks are promised to the first two until they end, so there is room for one of the others
    assert {name.rsplit("-", 1)[0] for name in manager_of(small_engine).req_to_blocks} <= {"0", "1", "2"}
    watcher.run()
    assert not watcher.preempted
    assert [watcher.most[name] for name in ("0", "1", "2", "3", "4")] == [13, 16, 3, 5, 3]
    stock, compressed = full_kv(asked[:2], 300), reference("random", BUDGET, asked[2:], 300, seed=SEED).tokens
    assert [watcher.tokens[str(number)] for number in range(5)] == stock + compressed
    assert free_blocks(small_engine) == before


def test_a_chunked_prompt_stays_within_its_bound_and_equals_a_replay_in_the_same_pieces(folder: Path) -> None:
    given = {"method": "random", "seed": SEED, "prefill_chunk": 32, **SMALL}
    options = {"block_size": BLOCK, "num_gpu_blocks_override": 17, "max_num_batched_tokens": 48}
    budget = Budget(64, interval=32, sinks=4, recent=16, prefill_chunk=32, prompt="count")
    asked = prompts((310, 250))
    with engine(folder, given, max_model_len=768, **options) as llm:
        watcher = Watcher(llm)
        for number, ids in enumerate(asked):
            watcher.add(str(number), ids, 50)
        watcher.run()
        assert free_blocks(llm) == 16
    for number, ids in enumerate(asked):
        assert watcher.most[str(number)] == -(-(64 + 32 - 1 + 48) // BLOCK) == 5  # of 10 for the whole prompt
        assert replay(ids, watcher.tokens[str(number)], watcher.pieces[str(number)], budget) >= 50 - 1


def test_our_scheduler_cuts_a_prompt_at_its_chunks_whatever_else_is_fed(folder: Path) -> None:
    given = {"method": "random", "seed": SEED, "prefill_chunk": 32, **SMALL}
    options = {"block_size": BLOCK, "num_gpu_blocks_override": 17, "max_num_batched_tokens": 48}
    budget = Budget(64, interval=32, sinks=4, recent=16, prefill_chunk=32, prompt="count")
    asked = prompts((310, 250, 20))
    with engine(folder, given, max_model_len=768, scheduler_cls=SCHEDULER, **options) as llm:
        watcher = Watcher(llm)
        for number, ids in enumerate(asked):
            watcher.add(str(number), ids, 50)
        watcher.run()
        assert max(watcher.most.values()) == -(-(64 + 32) // BLOCK) == 3
        for number, ids in enumerate(asked):
            in_chunks = [32] * (len(ids) // 32) + [len(ids) % 32] + [1] * 49
            assert watcher.pieces[str(number)] != in_chunks  # it was fed beside the others
            assert replay(ids, watcher.tokens[str(number)], in_chunks, budget) == 50

        # With full KV the cache of 16 blocks is full at 512 tokens, where such a request ends.
        watcher.add("long", asked[0], 400, extra_args=FULL_KV)
        watcher.add("too long", asked[0] * 2, 10, extra_args=FULL_KV)
        watcher.run()
        assert watcher.ends["long"] == "length" and len(watcher.tokens["long"]) == 512 + 1 - 310
        assert watcher.ends["too long"] == "error"
        assert watcher.tokens["long"] == full_kv(asked[:1], 512 + 1 - 310)[0]
        assert free_blocks(llm) == 16


def test_a_share_of_the_text_takes_blocks_as_it_grows_and_equals_the_transformers_runtime(folder: Path) -> None:
    share = {"keep": 0.5, "interval": 32, "sinks": 4, "recent": 16, "prompt": "count"}
    options = {"block_size": BLOCK, "num_gpu_blocks_override": 65, "scheduler_cls": SCHEDULER}
    asked = prompts((40, 90, 200))
    with engine(folder, {"method": "random", "seed": SEED, **share}, max_model_len=768, **options) as llm:
        watcher = Watcher(llm)
        for number, ids in enumerate(asked):
            watcher.add(str(number), ids, 240)
        watcher.run()
        assert free_blocks(llm) == 64 and not watcher.preempted
    for number, ids in enumerate(asked):
        length = len(ids) + 240 - 1
        most = max(len(ids), schedule.capacity(Budget(**share), len(ids), length))
        assert watcher.last[str(number)] <= watcher.most[str(number)] <= -(-most // BLOCK) < -(-length // BLOCK)
    theirs = reference("random", Budget(**share), asked, 240, seed=SEED)
    assert [watcher.tokens[str(number)] for number in range(3)] == theirs.tokens


@pytest.mark.parametrize("is_async", [False, True])
def test_our_scheduler_feeds_a_preempted_request_as_if_it_had_never_been(folder: Path, is_async: bool) -> None:
    from reasonkv.runtimes.vllm.scheduler import AsyncScheduler

    given = {"method": "random", "seed": SEED, "window": {"size": 48, "buffer": 16, "retention": 0.5}}
    options = {"block_size": BLOCK, "num_gpu_blocks_override": 25, "max_num_batched_tokens": 96}
    # The CPU platform steps synchronously; there the asynchronous class goes through the same motions, one at a time.
    options["scheduler_cls"] = AsyncScheduler if is_async else SCHEDULER
    asked = prompts((64, 70, 75, 80, 90, 100))
    with engine(folder, given, max_model_len=640, **options) as llm:
        watcher = Watcher(llm, repeats=True)
        for number, ids in enumerate(asked):
            watcher.add(str(number), ids, 240)
        watcher.run()
        assert watcher.preempted and watcher.repeated  # a window's cache grows, until blocks run out
        assert free_blocks(llm) == 24
    theirs = reference("random", Window(size=48, buffer=16, retention=0.5), asked, 240, seed=SEED)
    assert [watcher.tokens[str(number)] for number in range(6)] == theirs.tokens


def test_a_preempted_request_goes_on_as_a_replay_in_its_pieces_and_others_as_alone(folder: Path) -> None:
    given = {"method": "random", "seed": SEED, "window": {"size": 48, "buffer": 16, "retention": 0.5}}
    options = {"block_size": BLOCK, "num_gpu_blocks_override": 25, "max_num_batched_tokens": 96}
    budget = Window(size=48, buffer=16, retention=0.5)
    asked = prompts((64, 70, 75, 80, 90, 100))
    with engine(folder, given, max_model_len=640, **options) as llm:
        watcher = Watcher(llm)
        for number, ids in enumerate(asked):
            watcher.add(str(number), ids, 240)
        watcher.run()
        assert watcher.preempted and len(watcher.preempted) < len(asked)
        assert free_blocks(llm) == 24
        for number, ids in enumerate(asked):
            if str(number) not in watcher.preempted:
                assert serve(llm, [ids], greedy(240)).tokens == [watcher.tokens[str(number)]]
    for name in watcher.preempted:
        ids, tokens = asked[int(name)], watcher.tokens[name]
        pieces = watcher.pieces[name]
        # after the last time it was preempted, all it had was fed again
        start = max(i for i in range(len(pieces)) if sum(pieces[i:]) == len(ids) + len(tokens) - 1)
        again = pieces[start:]
        resumed = sum(piece for piece in again if piece > 1)
        assert replay(ids, tokens, again, budget, since=resumed) >= 1


def replay(ids: list[int], tokens: list[int], pieces: list[int], budget: Budget, since: int = 0) -> int:
    """Feed a finished request to the transformers runtime in given pieces; the tokens it would say, from `since` on.

    Returns:
        How many tokens were compared; all are equal.
    """
    model, _ = load_testbed()
    text, fed, compared = ids + tokens, 0, 0
    with CompressedCache(model, "random", budget, seed=SEED, prompt_lengths=[len(ids)]) as cache, torch.no_grad():
        for piece in pieces:
            logits = model(torch.tensor([text[fed : fed + piece]]), past_key_values=cache).logits[0, -1]
            fed += piece
            if fed >= max(len(ids), since) and fed < len(text):
                assert int(logits.argmax()) == text[fed], fed
                compared += 1
    return compared
