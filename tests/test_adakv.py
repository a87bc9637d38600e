"""AdaKV: one budget for the heads of a layer, padding that nothing attends to, and what records say about both."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import batch, tiny_model
from oracle import run_compressed
from safetensors.torch import load_file
from slot_views import random_view

from reasonkv import Budget, BudgetError, CompressedCache, MethodError, SlotView, get_method
from reasonkv.budget import Window
from reasonkv.methods.adakv import AdaKV, shared_top_k
from reasonkv.plan import PlanError

DATA = Path(__file__).parent / "data"
TENSORS = load_file(DATA / "field_uneven.safetensors")
CASES = json.loads((DATA / "field_uneven.json").read_text())["cases"]["adakv"]
MODEL = tiny_model("qwen3")
METHOD, BUDGET = AdaKV("snapkv:window=6;kernel=3"), Budget(16, interval=5, sinks=2, recent=3, prompt="count")
EVEN = 11  # slots a head attends to on average after an event: 16 / 1.5
INF = float("inf")


# ------------------------------------------------------------------------------------------------------------ the rule


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['index']}-{case['options']['base']}")
def test_the_shared_top_k_equals_kvpress(case: dict[str, Any]) -> None:
    scores, masked, counts = (TENSORS[case[name]["tensor"]] for name in ("base_score", "masked", "kept_per_head"))
    assert case["margin_flattened"] > 1e-6
    chosen = shared_top_k(
        scores, case["n_kept"], int(case["options"]["alpha_safeguard"] * case["n_kept"]), torch.zeros_like(scores) > 0
    )
    assert int(case["options"]["alpha_safeguard"] * case["n_kept"]) == case["n_safe"]
    assert torch.equal(~chosen, masked.bool())
    assert torch.equal(chosen.sum(-1), counts.long())


def ada_view(B: int = 2, H: int = 3, N: int = 60, *, padding: int = 0, seed: int = 0, **options: Any) -> SlotView:
    """Random keys; in every head up to `padding` of the slots that are not protected are padding."""
    view = random_view(B, H, N, queries=6, key_seed=seed, sinks=2, recent=6, **options)
    draw = torch.Generator().manual_seed(seed + 1)
    order = torch.rand(view.positions_BHN.shape, generator=draw).masked_fill(view.is_protected_BHN, 2.0).argsort(-1)
    count = torch.randint(0, padding + 1, (B, H, 1), generator=draw)
    dead = torch.zeros_like(view.is_protected_BHN).scatter_(2, order, torch.arange(N).expand(B, H, N) < count)
    return replace(view, state={"log_mass": torch.zeros(B, H, N).masked_fill(dead, -INF)})


def slowly(method: AdaKV, view: SlotView, keep: int, row: int) -> tuple[list[list[int]], list[set[int]]]:
    """The rule in plain lists: what every head stores, and what of it it attends to."""
    scores, mean = method.scorer.score(view)[row].tolist(), round((keep - 2) / method.stretch)  # beside two sinks
    dead, protected = view.state["log_mass"][row].isneginf().tolist(), view.is_protected_BHN[row].tolist()
    stored, chosen, rest = [], [], []
    for h, own in enumerate(scores):
        order = sorted(range(len(own)), key=lambda n: (not protected[h][n], dead[h][n], -own[n], -n))
        stored.append(sorted(order[:keep]))
        alive = [n for n in order[:keep] if not dead[h][n]]
        sure = [n for rank, n in enumerate(alive) if protected[h][n] or rank < 2 + int(method.alpha * mean)]
        chosen.append(set(sure))
        rest += [(-own[n], h, n) for n in alive if n not in chosen[h]]
    for _, h, n in sorted(rest)[: max(0, len(scores) * (2 + mean) - sum(len(c) for c in chosen))]:
        chosen[h].add(n)
    return stored, chosen


@pytest.mark.parametrize("padding", [0, 12])
@pytest.mark.parametrize("method", [METHOD, replace(METHOD, alpha=0.9), replace(METHOD, alpha=0.0, stretch=3.0)])
def test_a_plan_is_the_rule_written_out(method: AdaKV, padding: int) -> None:
    for seed in range(4):
        view = ada_view(padding=padding, seed=seed)
        plan = method.plan(view, 40)
        assert plan.log_mass_BHK is not None
        assert set(plan.log_mass_BHK.unique().tolist()) == {-INF, 0.0}
        for row in range(2):
            stored, chosen = slowly(method, view, 40, row)
            assert plan.kept_BHK[row].tolist() == stored
            for h in range(3):
                attended = plan.kept_BHK[row, h][~plan.log_mass_BHK[row, h].isneginf()].tolist()
                assert set(attended) == chosen[h]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    N=st.integers(30, 90),
    H=st.integers(1, 4),
    alpha=st.floats(0, 1),
    stretch=st.floats(1.01, 5),
    padding=st.integers(0, 8),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    data=st.data(),
)
def test_a_layer_attends_to_its_share_and_every_head_to_what_it_is_sure_of(
    N: int, H: int, alpha: float, stretch: float, padding: int, seed: int, dtype: Any, data: st.DataObject
) -> None:
    method = AdaKV("snapkv:window=6;kernel=3", alpha, stretch)
    view = ada_view(2, H, N, padding=padding, seed=seed, dtype=dtype)
    keep = data.draw(st.integers(8, N - padding - 1))
    plan = method.plan(view, keep)
    plan.check((2, H, N), keep, view.is_protected_BHN)
    assert plan.log_mass_BHK is not None
    attended = ~plan.log_mass_BHK.isneginf()
    mean = max(1, round((keep - 2) / stretch))  # beside two sinks
    assert (attended.flatten(1).sum(-1) == H * max(2 + mean, 8)).all()  # 8 are protected in every head
    assert (attended.sum(-1) >= 2 + int(alpha * mean)).all()
    assert attended[view.is_protected_BHN.gather(2, plan.kept_BHK)].all()
    assert not attended[view.state["log_mass"].isneginf().gather(2, plan.kept_BHK)].any()


def test_heads_with_equal_scores_share_evenly_and_the_newer_slots_win() -> None:
    chosen = shared_top_k(torch.zeros(1, 3, 10), 4, 0, torch.zeros(1, 3, 10) > 0)
    assert chosen[0].tolist() == [[False] * 6 + [True] * 4] * 3


def test_a_head_with_much_attention_gets_more_and_the_rule_is_not_that_of_single_heads() -> None:
    scores = torch.rand(1, 2, 40, generator=torch.Generator().manual_seed(0))
    scores[0, 1] += 1
    assert shared_top_k(scores, 15, 3, scores.isnan())[0].sum(-1).tolist() == [3, 27]
    capped = shared_top_k(scores, 25, 3, torch.zeros(1, 2, 40, dtype=torch.bool))
    assert capped[0].sum(-1).tolist() == [10, 40]


def test_without_stretch_it_is_its_base_method() -> None:
    view, method = ada_view(), AdaKV("snapkv:window=6;kernel=3", stretch=1.0)
    base = get_method("snapkv:window=6,kernel=3")
    plan = method.plan(replace(view, state={}), 40)
    assert torch.equal(plan.kept_BHK, base.plan(view, 40).kept_BHK)
    assert plan.log_mass_BHK is None
    assert method.needs == base.needs and not method.needs.log_mass


def test_nan_is_an_error_and_not_a_winner() -> None:
    view = ada_view()
    view.keys_BHND[0, 0, 30, 0] = float("nan")
    with pytest.raises(PlanError, match="NaN"):
        METHOD.plan(view, 40)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("adakv:alpha=1.5", "adakv: alpha must be at most 1, not 1.5."),
        ("adakv:stretch=0.5", "adakv: stretch must be at least 1, not 0.5."),
        ("adakv:base=cask", "adakv: base must be a method that scores slots, not cask."),
        (
            "adakv:base=tova",
            "adakv: base must score every head by itself and store nothing beside slots, unlike tova.",
        ),
    ],
)
def test_a_bad_option_is_one_sentence(spec: str, message: str) -> None:
    with pytest.raises(MethodError) as caught:
        get_method(spec)
    assert str(caught.value) == message


@pytest.mark.parametrize("base", ["keydiff", "random", "rkv", "curdkv", "expected", "beaconkv", "vase-dkv", "lagkv"])
def test_any_method_that_scores_heads_can_be_the_base(base: str) -> None:
    options = {"rkv": ":window=6", "beaconkv": ":beacons=4;window=4;recent=6", "vase-dkv": ":window=6"}.get(base, "")
    ids, mask, positions = batch([60])
    with CompressedCache(MODEL, f"adakv:base={base}{options}", BUDGET) as cache:
        run = run_compressed(MODEL, cache, ids, mask, positions, [24] + [1] * 36)
    assert run.logits.isfinite().all()
    assert cache.rows[0].events > 5 and cache.rows[0].padding == 16 - EVEN


def test_a_window_is_refused() -> None:
    with pytest.raises(BudgetError, match="divides all slots of a layer at every compaction; give it a Budget"):
        CompressedCache(MODEL, METHOD, Window(16, 8, 0.5))


# ------------------------------------------------------------------------------------------------------------- a cache


def attended(cache: CompressedCache, layer: int, row: int) -> list[list[int]]:
    """Tokens that a row's next query attends to, by head."""
    storage, state = cache.compressed_layers[layer].storage, cache.rows[row].state
    assert storage is not None
    mass = storage.log_mass(storage.allocated)
    held = cache.slot_positions(layer)[row]
    if mass is None:
        return held.tolist()
    alive = ~mass[row, :, : state.physical].isneginf()
    return [held[h][alive[h]].tolist() for h in range(held.shape[0])]
