"""A compressed request in vLLM goes as in the transformers runtime: the same slots stay, the same tokens come."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import Run, engine, greedy, prompts, reference, runtime_of, serve

from reasonkv import Budget, Window, testbed
from reasonkv.methods import Method
from reasonkv.runtimes.vllm.config import EngineConfig
from reasonkv.view import SlotView

SEED, TOKENS = 7, 160
BUDGET = Budget(96, interval=32, sinks=4, recent=16)
WINDOW = Window(size=48, buffer=16, retention=0.25)
CALIBRATION = str(testbed.testbed_path() / "reasonkv_calibration.safetensors")
THRESHOLD = {"tokens": 96, "interval": 32, "sinks": 4, "recent": 16}
WINDOWED = {"window": {"size": 48, "buffer": 16, "retention": 0.25}}
NOISE = 3e-5  # what the two engines' keys, values and queries differ by, at most


@pytest.fixture(scope="module")
def threshold_engine(folder: Path) -> Iterator[Any]:
    with engine(folder, {"method": "random", "seed": SEED, **THRESHOLD}) as llm:
        yield llm


@pytest.fixture(scope="module")
def window_engine(folder: Path) -> Iterator[Any]:
    with engine(folder, {"method": "kara", "seed": SEED, **WINDOWED}) as llm:
        yield llm


def run_both(llm: Any, method: str, schedule: dict[str, Any], budget: Budget) -> tuple[Run, Run, Method]:
    given = {"method": method, "seed": SEED, "calibration": CALIBRATION, **schedule}
    runtime_of(llm).use(EngineConfig.parse(given))
    asked = prompts()
    mine = serve(llm, asked, greedy(TOKENS))
    return mine, reference(method, budget, asked, TOKENS, seed=SEED), runtime_of(llm).config.method


def is_near_tie(method: Method, layers: list[SlotView], keep: int) -> bool:
    """The plan changes when keys, values and queries move by what the two engines differ by."""
    plans = method.plan_layers(layers, keep)
    for draw in range(40):
        generator = torch.Generator().manual_seed(draw)

        def moved(x: torch.Tensor | None, generator: torch.Generator = generator) -> torch.Tensor | None:
            return None if x is None else x + NOISE / 3 * torch.randn(x.shape, generator=generator)

        views = [
            replace(
                view,
                keys_BHND=moved(view.keys_BHND),
                values_BHND=moved(view.values_BHND),
                queries_BHqTD=moved(view.queries_BHqTD),
            )
            for view in layers
        ]
        again = method.plan_layers(views, keep)
        if any(not torch.equal(one.kept_BHK, two.kept_BHK) for one, two in zip(plans, again, strict=True)):
            return True
    return False


def check_agreement(mine: Run, theirs: Run, method: Method, identical: int) -> None:
    """As many requests as asked for agree throughout, and each other one until an event that a near tie decides."""
    same = 0
    for request in range(len(theirs.tokens)):
        events = sorted((event, layer) for number, layer, event in theirs.kept if number == request)
        assert events == sorted((event, layer) for number, layer, event in mine.kept if number == request)
        assert events, "a request without an event tests nothing"
        apart = [
            (event, layer)
            for event, layer in events
            if not torch.equal(mine.kept[request, layer, event], theirs.kept[request, layer, event])
        ]
        if not apart:
            assert mine.tokens[request] == theirs.tokens[request]
            same += 1
            continue
        event, layer = apart[0]
        view, other = theirs.views[request, layer, event], mine.views[request, layer, event]
        assert torch.equal(view.positions_BHN, other.positions_BHN)  # all before it was the same
        assert torch.equal(view.is_protected_BHN, other.is_protected_BHN)
        torch.testing.assert_close(view.keys_BHND, other.keys_BHND, atol=2 * NOISE, rtol=0)
        torch.testing.assert_close(view.values_BHND, other.values_BHND, atol=2 * NOISE, rtol=0)
        is_whole = method.needs.scope == "model"
        layers = [theirs.views[request, at, event] for at in range(3)] if is_whole else [view]
        assert is_near_tie(method, layers, theirs.kept[request, layer, event].shape[-1]), (request, event, layer)
    assert same >= identical, same


@pytest.mark.parametrize("method", ["random", "streaming"])
def test_all_tokens_and_kept_slots_equal_the_transformers_runtimes(threshold_engine: Any, method: str) -> None:
    mine, theirs, _ = run_both(threshold_engine, method, THRESHOLD, BUDGET)
    assert mine.tokens == theirs.tokens
    assert mine.kept.keys() == theirs.kept.keys() and theirs.kept
    for key, kept in theirs.kept.items():
        assert torch.equal(mine.kept[key], kept), key


@pytest.mark.parametrize(
    ("method", "identical"),
    [
        ("vase-dkv:window=16", 7),
        ("vase-attnv:window=16", 5),  # slots of the same words have value ranges that tie, and the reserve ranks them
        ("triattention", 7),
        ("cask:mass=none", 7),
        ("cask:mass=none,per_layer=true", 7),
        ("kara", 7),
        ("snapkv:window=16", 7),
        ("rkv", 7),
        ("keydiff", 7),
    ],
)
def test_requests_agree_until_a_near_tie(threshold_engine: Any, method: str, identical: int) -> None:
    mine, theirs, made = run_both(threshold_engine, method, THRESHOLD, BUDGET)
    check_agreement(mine, theirs, made, identical)


@pytest.mark.parametrize("method", ["kara", "random"])
def test_requests_agree_under_a_window(window_engine: Any, method: str) -> None:
    mine, theirs, made = run_both(window_engine, method, WINDOWED, WINDOW)
    check_agreement(mine, theirs, made, 7 if method == "kara" else 8)
