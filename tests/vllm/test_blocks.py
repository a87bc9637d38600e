"""Blocks: as many as the formula says, all of them back in the end, and both sides of the engine agree at every step."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import core_of, engine, greedy, manager_of, prompts, reference, runtime_of, serve

from reasonkv import Budget, CompressedCache, Window, schedule
from reasonkv.testbed import load_testbed

SEED, BLOCK = 7, 32
SMALL = {"tokens": 64, "interval": 32, "sinks": 4, "recent": 16}
BUDGET = Budget(64, interval=32, sinks=4, recent=16)


@pytest.fixture(scope="module")
def small_engine(folder: Path) -> Iterator[Any]:
    """32 blocks of 32 tokens, prompts fed at most 48 tokens a step."""
    options = {"block_size": BLOCK, "num_gpu_blocks_override": 33, "max_num_batched_tokens": 48}
    with engine(folder, {"method": "random", "seed": SEED, **SMALL}, max_model_len=768, **options) as llm:
        yield llm


class Watcher:
    """Steps an engine and looks at both sides after every step."""

    def __init__(self, llm: Any) -> None:
        self.llm, self.engine = llm, llm.llm_engine
        self.most: dict[str, int] = defaultdict(int)
        self.last: dict[str, int] = {}
        self.pieces: dict[str, list[int]] = defaultdict(list)
        self.preempted: set[str] = set()
        self.tokens: dict[str, list[int]] = {}

    def add(self, name: str, ids: list[int], tokens: int) -> None:
        self.engine.add_request(name, {"prompt_token_ids": ids}, greedy(tokens))

    def step(self) -> None:
        runtime, manager = runtime_of(self.llm), manager_of(self.llm)
        before = {name: one.state.length for name, one in runtime.sequences.items()}
        for output in self.engine.step():
            self.tokens[output.request_id] = list(output.outputs[0].token_ids)
        batch = core_of(self.llm).model_executor.driver_worker.worker.model_runner.input_batch
        for name, one in runtime.sequences.items():
            if name not in manager.req_to_blocks:  # it has finished, or was preempted
                continue
            short = name.rsplit("-", 1)[0]
            if name not in before and self.pieces[short]:
                self.preempted.add(short)
            start = before.get(name, 0)
            if one.state.length > start:
                self.pieces[short].append(one.state.length - start)
            blocks = [block.block_id for block in manager.req_to_blocks[name]]
            assert len(set(blocks)) == len(blocks)
            assert manager.holdings[name].state == one.state  # the scheduler's integers are the worker's
            assert one.state.held <= len(blocks) * manager.block_size
            if name in batch.req_id_to_index:
                row = batch.block_table[0].block_table.np[batch.req_id_to_index[name]]
                assert row[: len(blocks)].tolist() == blocks
            self.most[short] = max(self.most[short], len(blocks))
            self.last[short] = len(blocks)
        owned = [block.block_id for blocks in manager.req_to_blocks.values() for block in blocks]
        assert len(set(owned)) == len(owned)  # no block belongs to two requests

    def run(self) -> None:
        while self.engine.has_unfinished_requests():
            self.step()


def free_blocks(llm: Any) -> int:
    return manager_of(llm).block_pool.get_num_free_blocks()


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


def test_all_blocks_come_back_from_many_requests_of_which_some_are_aborted(small_engine: Any) -> None:
    before, draw = free_blocks(small_engine), random.Random(0)
    longest = prompts((310,) * 8)
    watcher = Watcher(small_engine)
    asked: dict[str, tuple[list[int], int]] = {}
    for number in range(200):
        ids = draw.choice(longest)[: draw.randint(1, 180)]
        asked[f"r{number}"] = (ids, draw.randint(1, 90))
    aborted = set(draw.sample(sorted(asked), 40))
    for name, (ids, tokens) in asked.items():
        watcher.add(name, ids, tokens)
    doomed = {name: draw.randint(0, 40) for name in aborted}  # tokens after which they are aborted
    while watcher.engine.has_unfinished_requests():
        watcher.step()
        for name in [name for name, after in doomed.items() if len(watcher.tokens.get(name, ())) >= after]:
            watcher.engine.abort_request([name])
            del doomed[name]
    assert free_blocks(small_engine) == before
    manager = manager_of(small_engine)
    assert not manager.holdings and not any(manager.req_to_blocks.values())
    assert not watcher.preempted  # admission reserves all a request will need
    finished = sorted(set(asked) - aborted)
    for name in finished[::8]:
        ids, tokens = asked[name]
        assert len(watcher.tokens[name]) == tokens
        assert serve(small_engine, [ids], greedy(tokens)).tokens == [watcher.tokens[name]]


def test_a_chunked_prompt_stays_within_its_bound_and_equals_a_replay_in_the_same_pieces(folder: Path) -> None:
    given = {"method": "random", "seed": SEED, "prefill_chunk": 32, **SMALL}
    options = {"block_size": BLOCK, "num_gpu_blocks_override": 17, "max_num_batched_tokens": 48}
    budget = Budget(64, interval=32, sinks=4, recent=16, prefill_chunk=32)
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
