"""A budget of its own for every layer: shares divide what is not protected, attention is exact, calibration has them."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import run
from models import batch, calibration, tiny_model
from oracle import run_compressed
from test_exactness import Case, check

from reasonkv import Budget, BudgetError, CompressedCache, get_method
from reasonkv.calibration import CalibrationError, load_calibration, save_calibration
from reasonkv.evaluate.cells import plan_cells
from reasonkv.evaluate.chunks import TraceRow
from reasonkv.evaluate.job import BudgetOptions, JobError
from reasonkv.evaluate.matching import budget_for_mean, mean_physical
from reasonkv.evaluate.sharing import add_shares, alone, shares_of
from reasonkv.methods import layer_budgets
from reasonkv.numbers import shares_in_groups
from reasonkv.runtimes.vllm.config import EngineConfig, ServingError

MODEL, PROMPTS, LENGTHS = tiny_model("qwen3"), [24, 11, 5], [60, 47, 31]
BUDGET = Budget(24, interval=6, sinks=2, recent=3, prompt="count", layer_shares="0.5/1/1.5")


def tokens_of(budget: Budget, method: str = "random", prompt: int | None = None, layers: int = 3) -> list[int | None]:
    return [one.tokens for one in layer_budgets(get_method(method), budget, layers, prompt) if one is not None]


def test_what_is_not_protected_is_divided_and_nothing_is_lost() -> None:
    assert tokens_of(BUDGET) == [15, 24, 33]
    assert tokens_of(BUDGET, "snapkv:window=6") == [8 + 8, 24, 32]  # the method's own window is protected, too
    kept = replace(BUDGET, tokens=40, prompt="keep", layer_shares="0.001/1/1")
    assert tokens_of(kept, prompt=30) == [34, 43, 43]  # one slot beside the prompt and what is recent
    for layers in (1, 7, 24):
        found = tokens_of(replace(BUDGET, tokens=100, layer_shares=range(1, layers + 1)), layers=layers)
        assert sum(map(int, filter(None, found))) == 100 * layers and found == sorted(found, key=lambda one: one or 0)
        alike = [1 + layer % 5 for layer in range(layers)]  # equal shares are equal budgets, none too many
        found = tokens_of(replace(BUDGET, tokens=100, layer_shares=alike), layers=layers)
        assert len(set(zip(alike, found, strict=True))) == len(set(alike))
        assert 100 * layers - -(-layers // 5) < sum(map(int, filter(None, found))) <= 100 * layers
    for one in layer_budgets(get_method("random"), Budget(64, layer_shares="0.5/1/1.1/1.2/1.5/0.7"), 6):
        assert one is not None and (one.sinks, one.recent) == (4, 32)  # as the defaults shrank with 64 tokens
    assert tokens_of(Budget(1, sinks=0, recent=0, layer_shares="0.2/0.3/2.5")) == [1, 1, 1]
    assert replace(BUDGET, layer_shares=[0.123456, 1]).layer_shares == "0.123456/1"
    assert replace(BUDGET, layer_shares=np.array([0.5, 1.0, 1.5])) == BUDGET
    assert replace(BUDGET, layer_shares=[0.5, 1, 1.5]) == BUDGET and Budget.from_dict(BUDGET.to_dict()) == BUDGET
    assert "layer_shares" not in Budget(64).to_dict() and Budget(64, layer_shares=()) == Budget(64)


@pytest.mark.parametrize("method", ["forecast", "snapkv", "h2o", "adakv", "d2o", "rkv"])
@pytest.mark.parametrize(
    ("pieces", "kind", "prompt"), [("decode", "single", "count"), ("forward7", "padded", "on_top")]
)
def test_attention_over_what_each_layer_holds_is_exact(method: str, pieces: str, kind: str, prompt: Any) -> None:
    check(Case(method, "qwen3", pieces, kind, "sdpa", prompt), limits=replace(BUDGET, prompt=prompt))


@pytest.mark.parametrize("method", ["forecast", "snapkv"])
@pytest.mark.parametrize(
    ("family", "changes"),
    [("gemma3", {"layer_shares": "0.5/1.5"}), ("qwen3", {"stagger": 3})],  # beside sliding windows; taking turns
)
def test_attention_is_exact_beside_other_layers_and_where_layers_take_turns(
    method: str, family: str, changes: dict[str, Any]
) -> None:
    limits = replace(BUDGET, prompt="on_top", **changes)
    check(Case(method, family, "decode", "padded", "sdpa", "on_top"), limits=limits)


def test_layers_hold_their_shares() -> None:
    (ids, mask, positions), pieces = batch(LENGTHS), [24, 7, *[1] * 15, 7, 7]
    with CompressedCache(MODEL, "random", BUDGET, prompt_lengths=PROMPTS) as cache:
        run_compressed(MODEL, cache, ids, mask, positions, pieces)
        held = [cache.slot_positions(layer)[0].shape[1] for layer in range(3)]
    assert held[0] < held[1] < held[2] < 33 + 6 and 15 <= held[0] < 15 + 6


@pytest.mark.parametrize(
    ("fields", "method", "words"),
    [
        ({"layer_shares": "1/0/2"}, "random", "layer_shares must be numbers of at least 0.001, one per layer, as in"),
        ({"layer_shares": "1/x/2"}, "random", "not '1/x/2'"),
        ({"layer_shares": "1//2"}, "random", "not '1//2'"),
        ({"layer_shares": 3}, "random", "not '3'"),
        ({"layer_shares": [True, 1, 2]}, "random", "not '[True, 1, 2]'"),
        ({"layer_shares": [1, float("nan"), 2]}, "random", "not '[1, nan, 2]'"),
        ({"layer_shares": "1/2"}, "random", "layer_shares has 2 numbers, and the model has 3 bounded layers"),
        ({"layer_shares": "1/2/3", "tokens": None, "keep": 0.5}, "random", "it needs tokens, not keep"),
        ({"tokens": 28}, "pyramidkv:window=4", "pyramidkv divides tokens among layers by itself; leave out"),
        ({}, "quest", "quest reads equally many slots in every layer; leave out layer_shares"),
        ({"layer_shares": "calibrated"}, "random", "This calibration holds no layer_shares; measure them with"),
    ],
)
def test_shares_that_cannot_be_are_one_sentence(fields: dict[str, Any], method: str, words: str) -> None:
    with pytest.raises((BudgetError, CalibrationError), match=re.escape(words)):
        CompressedCache(MODEL, method, replace(BUDGET, **fields), calibration=calibration(MODEL))
    if "calibrated" in fields.values():
        with pytest.raises(BudgetError, match="not known here"):
            layer_budgets(get_method(method), replace(BUDGET, **fields), 3)


def test_a_window_has_nothing_to_divide() -> None:
    with pytest.raises(JobError, match="which a window has none of"):
        BudgetOptions(window=64, layer_shares="1/2")
    with pytest.raises(BudgetError, match="layer_shares must be numbers"):
        BudgetOptions(layer_shares="nonsense")


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"prompt": "keep"}, "with prompt='keep' differs from request to request"),
        ({"method": "cask:mass=none"}, "cask plans all layers at once"),
        ({"method": "pyramidkv"}, "pyramidkv divides tokens among layers by itself; leave out layer_shares"),
        ({"layer_groups": 2, "layer_shares": ""}, "puts layers of like layer_shares together; give layer_shares, too"),
        ({"layer_groups": 0}, "layer_groups must be at least 1, not 0"),
        ({"layer_groups": "2"}, "layer_groups must be a whole number"),
        ({"layer_shares": "1/x"}, "layer_shares must be numbers"),
    ],
)
def test_engines_refuse_shares_that_they_cannot_give(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ServingError, match=re.escape(sentence)):
        EngineConfig.parse({"method": "random", "tokens": 64, "layer_shares": "1/2/3"} | given)


def test_layers_of_a_group_have_its_mean_and_groups_are_alike_in_size() -> None:
    assert shares_in_groups("0.4/2/0.5/1.1", 2) == "0.45/1.55/0.45/1.55"
    assert shares_in_groups("3/1/2", 3) == shares_in_groups("3/1/2", 9) == "3/1/2"
    assert shares_in_groups("3/1/2", 1) == "2/2/2"
    assert shares_in_groups("5/1/2/3/4", 2) == "4/1.5/1.5/4/4"
    assert shares_in_groups(shares_in_groups("0.4/2/0.5/1.1", 2), 2) == "0.45/1.55/0.45/1.55"


def test_a_mean_length_is_solved_over_the_layers() -> None:
    rule, method = replace(BUDGET, layer_shares="0.2/0.3/2.5"), get_method("random")
    found = budget_for_mean(rule, 40.0, [26, 13], [300, 250], method, 3)
    assert mean_physical(found, [26, 13], [300, 250], method, 3) == pytest.approx(40, abs=0.6)
    assert found.layer_shares == rule.layer_shares
    methods = [get_method("random"), get_method("snapkv:window=6")]
    cells = plan_cells(methods, [rule], [40.0], [(26, 300), (13, 250)], 3)
    for cell, known in zip(cells, methods, strict=True):
        mean = mean_physical(cell.budget, [26, 13], [300, 250], known, 3)
        assert cell.method == known and mean == pytest.approx(40, abs=0.6)


def test_calibrated_shares_are_those_of_the_file(tmp_path: Path) -> None:
    path, asked = tmp_path / "stats.safetensors", replace(BUDGET, layer_shares="calibrated")
    save_calibration(path, replace(calibration(MODEL), layer_shares="0.5/1/1.5"))
    assert load_calibration(path).layer_shares == "0.5/1/1.5"
    with CompressedCache(MODEL, "random", asked, calibration=path) as cache:
        assert cache.budget == BUDGET
    for wrong in ("1/zero", "calibrated", "", "1/1/1/1"):
        with pytest.raises(CalibrationError, match="layer_shares must be"):
            replace(calibration(MODEL), layer_shares=wrong)


def test_a_layer_that_loses_more_gets_more_and_one_that_evicts_alone_has_its_slots() -> None:
    shares = [float(one) for one in shares_of(0.1, [0.1, 0.2, 0.1 + 2 ** (1 / 0.6) / 10]).split("/")]
    assert sum(shares) == pytest.approx(3, abs=0.01) and shares[2] == pytest.approx(2 * shares[1], rel=0.01)
    assert 0 < shares[0] < shares[1] / 5
    assert shares_of(0.1, [0.1, 0.1]) == "1/1"  # nothing is lost anywhere
    own = tokens_of(alone(1, 3, Budget(128, recent=32), 4096))
    assert own[0] is not None and own[1] is not None and abs(own[1] - 128) <= 1 and own[0] > 4000
    small = alone(1, 3, Budget(64), 4096, recent=40)  # the method's window is larger than what its default shrinks to
    own = tokens_of(small, "snapkv:window=40")
    assert own[1] is not None and abs(own[1] - 64) <= 1


def test_shares_are_measured_by_replays_in_which_one_layer_evicts() -> None:
    generator, steps = torch.Generator().manual_seed(3), list[int]()
    rows = [TraceRow(*torch.randint(5, 200, (310,), generator=generator).split([40, 270])) for _ in range(2)]
    model = tiny_model("qwen3", dtype=torch.float32)
    found = add_shares(model, rows, calibration(model), progress=lambda what, done, of: steps.append(done))
    assert steps == [0, 1, 2, 3, 4] and found.forecast is not None
    shares = [float(one) for one in str(found.layer_shares).split("/")]
    assert len(shares) == 3 and sum(shares) == pytest.approx(3, abs=0.01) and len(set(shares)) == 3
    with pytest.raises(CalibrationError, match="more than 256 tokens beside the prompt"):
        add_shares(model, [TraceRow(row.prompt_P, row.output_T[:256]) for row in rows], found)


def test_the_command_line_measures_shares_and_replays_with_them(tmp_path: Path) -> None:
    stats, out = tmp_path / "stats.safetensors", tmp_path / "out"
    task = "program:lines=40"
    code, said, told = run("calibrate", "--task", task, "--limit", "2", "--layer-shares", "--out", str(stats))
    assert code == 0, told
    shares = load_calibration(stats).layer_shares
    assert shares and f"Shares of the layers, measured with forecast: {shares}." in told and stats.name in said
    assert "Kept of the calibration so far: forecast." in told and load_calibration(stats).forecast is not None
    code, _, told = run("calibrate", "--task", task, "--limit", "1", "--out", str(stats))  # over what is there
    assert code == 0 and "Kept of the calibration so far: forecast and layer_shares." in told
    assert load_calibration(stats).layer_shares == shares
    code, _, told = run(
        "replay", "--task", task, "--methods", "random", "--budget", "48", "--recent", "8", "--interval", "16",
        "--layer-shares", "calibrated", "--calibration", str(stats), "--limit", "2", "--out", str(out),
    )  # fmt: skip
    assert code == 0, told
    (budget,) = json.loads((out / "manifest.json").read_text())["arguments"]["budgets"]
    assert budget["layer_shares"] == shares
