"""VaSE: the authors' code on its own recorded inputs, the statistics of what is drawn, and what the options promise."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import chi2
from slot_views import make_view, random_view
from torch import Tensor
from torch.testing import assert_close

from reasonkv import noise
from reasonkv.methods import Method
from reasonkv.methods.ops import average_pool, squared_norms, window_attention
from reasonkv.methods.vase_attnv import VaseAttnV, sampling_keys, value_range
from reasonkv.methods.vase_dkv import VaseDKV
from reasonkv.view import SlotView

DATA = Path(__file__).parent / "data"
TENSORS = load_file(DATA / "field_vase.safetensors")
JSON = json.loads((DATA / "field_vase.json").read_text())
CLOSE = {"rtol": 1e-5, "atol": 1e-7}
SHORT = {"window": 16}


def read(leaf: dict[str, str]) -> Tensor:
    tensor = TENSORS[leaf["tensor"]]
    return tensor.long() if tensor.dtype == torch.int16 else tensor


def cases(group: str) -> list[Any]:
    return [pytest.param(case, id=f"{case['index']}-{case['input']}") for case in JSON["cases"][group]]


def public_view(case: dict[str, Any], event: int) -> tuple[SlotView, dict[str, Any]]:
    """The slots of one event in the order the public code holds them, which after its first event is not by position."""
    record, inputs = case["events"][event], JSON["inputs"][case["input"]]
    window = case["options"]["residual_length"]
    positions = read(record["slot_positions_before"])
    keys, values = read(inputs["keys"]), read(inputs["values"])
    index = positions.unsqueeze(-1).expand(-1, -1, -1, keys.shape[-1])
    queries = read(inputs["queries_rot"])[:, :, event * window : (event + 1) * window]
    view = make_view(keys.gather(2, index), queries, positions=positions, recent=window, event=event)
    return replace(view, values_BHND=values.gather(2, index)), record


def sorted_view(view: SlotView) -> SlotView:
    """The same slots by position, as our caches hold them, and the order they had as state."""
    place = view.positions_BHN.argsort(-1)
    index = place.unsqueeze(-1).expand_as(view.keys_BHND)
    order = {"order": place.int()}
    return replace(
        view,
        keys_BHND=view.keys_BHND.gather(2, index),
        values_BHND=view.values_BHND.gather(2, index),
        positions_BHN=view.positions_BHN.gather(2, place),
        is_protected_BHN=view.is_protected_BHN.gather(2, place),
        is_prompt_BHN=view.is_prompt_BHN.gather(2, place),
        state=order,
    )


def attnv(case: dict[str, Any], **options: Any) -> VaseAttnV:
    given = case["options"]
    kernel = given["kernel_size"] if given["smooth"] else 1
    same = {key: given[key] for key in ("n_large", "n_sink", "temperature")}
    return VaseAttnV(**{"window": given["residual_length"], "kernel": kernel, **same, **options})


def as_set(slots: Tensor) -> Tensor:
    return slots.sort(-1).values


def mask_of(slots: Tensor, n: int) -> Tensor:
    return torch.zeros(*slots.shape[:2], n, dtype=torch.bool).scatter_(2, slots, True)


# ------------------------------------------------------------------------------------------------ the authors' AttnV


@pytest.mark.parametrize("event", [0, 1])
@pytest.mark.parametrize("case", cases("range_sink_sample_attn"))
def test_attnv_reserves_and_weighs_as_the_authors_code(case: dict[str, Any], event: int) -> None:
    (view, record), method = public_view(case, event), attnv(case)
    n, keep = record["n_candidates"], record["K"] + method.window
    assert_close(value_range(view.values_BHND[:, :, :n]), read(record["value_range_m"]), **CLOSE)
    attention = method.attention(view)
    assert_close(attention, read(record["attention_a"]), **CLOSE)
    if "attention_mean_over_queries" in record:
        over_queries = read(record["attention_mean_over_queries"])
        assert_close(window_attention(view, over="old").view_as(over_queries), over_queries, **CLOSE)
        assert_close(average_pool(over_queries.mean(2), method.kernel), attention, **CLOSE)
    assert record["topk_margin_I1"] > 1e-3
    reserved = method.reserve(view, keep, method.magnitudes(view))
    assert torch.equal(reserved, mask_of(read(record["reserved_I1_in_code_order"]), n))
    weights = attention.masked_fill(reserved, 0.0)
    assert_close(weights, read(record["sampling_weights"]), **CLOSE)
    quarter = attnv(case, n_large=-1)
    assert quarter.options()["n_large"] == -1 and method.n_large == case["options"]["token_budget"] // 4
    assert torch.equal(quarter.plan(view, keep).kept_BHK, method.plan(view, keep).kept_BHK)


@pytest.mark.parametrize("case", cases("range_sink_sample_attn"))
def test_attnv_includes_slots_as_often_as_the_authors_sampler(case: dict[str, Any]) -> None:
    record, draws = case["events"][0], 2000
    weights, theirs = read(record["sampling_weights"]), read(record["inclusion_frequency"])
    reserved = mask_of(read(record["reserved_I1_in_code_order"]), weights.shape[2])
    drawn = record["K"] - case["options"]["n_large"]
    ours = frequencies(weights, reserved, drawn, draws)
    is_open = ~reserved
    if bool((theirs[reserved] == 1).all()):  # counted as kept
        assert float(ours.masked_fill(reserved, 0).sum()) == pytest.approx(
            drawn * reserved.shape[0] * reserved.shape[1]
        )
    mean = ((ours + theirs) / 2)[is_open].clamp(0.5 / draws, 1 - 0.5 / draws)
    z = (ours - theirs)[is_open] / (2 * mean * (1 - mean) / draws).sqrt()
    assert float(z.abs().max()) < 5.0
    assert float(z.square().mean()) == pytest.approx(1.0, abs=5 * (2 / z.numel()) ** 0.5)


def frequencies(weights: Tensor, reserved: Tensor, drawn: int, draws: int) -> Tensor:
    B, H, n = weights.shape
    uniform = noise.uniform(
        torch.arange(n), seed=1, row_seed=torch.arange(B)[:, None, None, None], layer=0,
        head=torch.arange(H)[:, None, None], event=torch.arange(draws)[:, None],
    )  # fmt: skip
    keys = sampling_keys(weights[:, :, None], uniform).masked_fill(reserved[:, :, None], -torch.inf)
    chosen = keys.topk(drawn, dim=-1).indices
    return torch.zeros(B, H, draws, n).scatter_(3, chosen, 1.0).mean(2)


def test_a_plan_includes_slots_as_often_as_the_authors_sampler() -> None:
    case, rows = JSON["cases"]["range_sink_sample_attn"][0], 600
    (view, record), method = public_view(case, 0), attnv(case)
    many = {
        name: value.expand(rows, *value.shape[1:])
        for name, value in vars(view).items()
        if isinstance(value, Tensor) and value.shape[0] == 1
    }
    kept = method.plan(
        replace(view, **{**many, "row_seed_B": torch.arange(rows)}), record["K"] + method.window
    ).kept_BHK
    n, reserved = record["n_candidates"], mask_of(read(record["reserved_I1_in_code_order"]), record["n_candidates"])
    ours = torch.zeros(rows, 2, view.positions_BHN.shape[2]).scatter_(2, kept, 1.0).mean(0, keepdim=True)
    assert bool((ours[..., n:] == 1).all()) and bool((ours[..., :n][reserved] == 1).all())
    theirs = read(record["inclusion_frequency"])[~reserved].clamp(0.001, 0.999)
    z = (ours[..., :n][~reserved] - theirs) / (theirs * (1 - theirs) * (1 / rows + 1 / 2000)).sqrt()
    assert float(z.abs().max()) < 5.0


@pytest.mark.parametrize("case", [c for c in cases("range_sink_sample_attn") if c.values[0]["options"]["smooth"]])
def test_the_public_form_pools_and_orders_slots_as_the_authors_code(case: dict[str, Any]) -> None:
    method = attnv(case, variant="paper")
    assert method.kernel == 5
    for event in (0, 1):
        held, record = public_view(case, event)
        view = sorted_view(held)
        theirs = read(record["attention_a"]).gather(2, view.state["order"][..., : record["n_candidates"]].long())
        assert_close(method.attention(view), theirs, **CLOSE)
        plan = method.plan(view, record["K"] + method.window)
        kept_in_order = plan.kept_BHK.gather(2, plan.state["order"].argsort(-1))
        positions = view.positions_BHN.gather(2, kept_in_order)
        large, K = method.n_large, record["K"]
        theirs = read(record["positions_after_in_slot_order"])[..., :large]
        assert torch.equal(as_set(positions[..., :4]), torch.arange(4).expand(*positions.shape[:2], 4))
        assert torch.equal(positions[..., 4:large], theirs[..., 4:])
        uniform = view.uniform_BHN()[..., : record["n_candidates"]]
        drawn = sampling_keys(method.attention(view), uniform).gather(2, kept_in_order[..., large:K])
        assert bool((drawn[..., 1:] <= drawn[..., :-1]).all())
        assert torch.equal(positions[..., K:], view.positions_BHN[..., -method.window :])


# -------------------------------------------------------------------------------------------------- the authors' DKV


def dkv(case: dict[str, Any]) -> VaseDKV:
    options = case["options"]
    return VaseDKV(
        window=options["residual_length"],
        n_sink=options["n_sink"],
        projection=options["p_gauss"],
        redraw=options["mode"] == "cur_resample_gauss",
    )


class WithProjection(VaseDKV):
    """The recorded projection in the place of the hashed one."""

    def gaussian(self, view: SlotView) -> Tensor:
        return view.state["G"]


@pytest.mark.parametrize("event", [0, 1])
@pytest.mark.parametrize("case", cases("cur_resample_gauss") + cases("cur_fixed_gauss"))
def test_dkv_scores_and_keeps_as_the_authors_code(case: dict[str, Any], event: int) -> None:
    view, record = public_view(case, event)
    method, n = WithProjection(**dkv(case).options()), record["n_candidates"]
    projection = read(record["G"]).expand(*view.keys_BHND.shape[:2], -1, -1)
    keys, values = view.keys_BHND[:, :, :n], view.values_BHND[:, :, :n]
    assert_close(squared_norms(keys, projection), read(record["k2"]), **CLOSE)
    assert_close(squared_norms(values, projection), read(record["v2"]), **CLOSE)
    view = replace(view, state={"G": projection})
    assert_close(method.score(view)[..., :n], read(record["scores"]), **CLOSE)
    kept = method.plan(view, record["K"] + method.window).kept_BHK
    assert record["topk_margin"] > 2e-7
    assert torch.equal(kept[..., : record["K"]], read(record["kept_slots_sorted"]))


# ----------------------------------------------------------------------------------------------------- what is drawn


@pytest.mark.parametrize("weights", [[1.0, 2, 3, 4, 5, 6], [0.9, 0.05, 0.03, 0.01, 0.007, 0.003], [1.0, 1, 1, 1, 0, 0]])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_sampler_draws_one_after_the_other_without_replacement(weights: list[float], k: int) -> None:
    draws, n = 20000, len(weights)
    exact = {}
    for order in permutations(range(n), k):
        chance, left = 1.0, sum(weights)
        for slot in order:
            chance, left = chance * weights[slot] / max(left, 1e-12), left - weights[slot]
        exact[order] = chance
    events = torch.arange(draws)[:, None]
    uniform = noise.uniform(torch.arange(n), seed=5, row_seed=0, layer=0, head=0, event=events)
    chosen = sampling_keys(torch.tensor(weights), uniform).topk(k, dim=-1).indices.tolist()
    seen: dict[tuple[int, ...], int] = {}
    for row in chosen:
        seen[tuple(row)] = seen.get(tuple(row), 0) + 1
    ordered = {order: chance for order, chance in exact.items()}
    check_chi_square(seen, ordered, draws)
    sets = {group: sum(exact[order] for order in permutations(group)) for group in combinations(range(n), k)}
    check_chi_square({group: sum(seen.get(order, 0) for order in permutations(group)) for group in sets}, sets, draws)


def check_chi_square(seen: dict[Any, int], chances: dict[Any, float], draws: int) -> None:
    """At the 0.1 % level; outcomes expected fewer than 5 times share a bin, and impossible ones never happen."""
    assert all(seen.get(outcome, 0) == 0 for outcome, chance in chances.items() if chance == 0)
    rare = [outcome for outcome, chance in chances.items() if chance * draws < 5]
    bins = [(seen.get(outcome, 0), chance * draws) for outcome, chance in chances.items() if outcome not in rare]
    bins.append((sum(seen.get(outcome, 0) for outcome in rare), sum(chances[outcome] for outcome in rare) * draws))
    bins = [(count, expected) for count, expected in bins if expected >= 1]
    statistic = sum((count - expected) ** 2 / expected for count, expected in bins)
    assert statistic < chi2.isf(1e-3, max(1, len(bins) - 1))


def test_slots_without_weight_are_drawn_last_and_only_if_they_must() -> None:
    weights = torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0])
    uniform = noise.uniform(torch.arange(5), seed=0, row_seed=0, layer=0, head=0, event=torch.arange(3000)[:, None])
    chosen = sampling_keys(weights, uniform).topk(3).indices
    assert torch.equal(as_set(chosen[:, :2]), torch.tensor([1, 3]).expand(3000, 2))
    share = torch.bincount(chosen[:, 2], minlength=5)[[0, 2, 4]] / 3000
    assert float((share - 1 / 3).abs().max()) < 0.04


def test_dkv_scores_are_the_norm_product_on_average() -> None:
    draws, D, p = 6000, 16, 20
    keys, values = torch.randn(2, 1, 1, 5, D, generator=torch.Generator().manual_seed(0))
    values[..., 0, :] = 2 * keys[..., 0, :]  # the same direction: both norms see the same draw
    view = random_view(1, 1, 8, D, queries=0)
    many = replace(view, row_seed_B=torch.zeros(draws, dtype=torch.long), event_B=torch.arange(draws))
    gaussian = VaseDKV(projection=p).gaussian(many)
    assert gaussian is not None
    assert tuple(gaussian.shape) == (draws, 1, D, p)
    assert float(gaussian.mean()) == pytest.approx(0, abs=5 * (1 / p / gaussian.numel()) ** 0.5)
    assert float(gaussian.var() * p) == pytest.approx(1, abs=5 * (2 / gaussian.numel()) ** 0.5)
    both = [squared_norms(x.expand(draws, 1, 5, D), gaussian)[:, 0] for x in (keys, values)]
    scores, norms = both[0] * both[1], (squared_norms(keys) * squared_norms(values))[0, 0]
    cosine = torch.cosine_similarity(keys, values, dim=-1)[0, 0]
    error = scores.std(0) / draws**0.5
    assert bool(((scores.mean(0) - norms * (1 + 2 * cosine.square() / p)).abs() < 4 * error).all())
    spread = scores[:, 1:].std(0) / scores[:, 1:].mean(0)  # of directions with little in common: 0.46 at p = 20
    assert float(spread.mean()) == pytest.approx(((1 + 2 / p) ** 2 - 1) ** 0.5, abs=0.05)


def test_a_projection_is_one_per_row_layer_and_event_and_shared_by_heads() -> None:
    view = replace(random_view(2, 2, 32, 8, queries=0, row_seeds=(0, 7)), layer=3, first_head=0)
    method = VaseDKV(window=8)
    drawn = method.gaussian(view)
    assert drawn is not None
    assert torch.equal(method.gaussian(replace(view, first_head=2)), drawn)  # type: ignore[arg-type]
    others = [replace(view, layer=4), replace(view, seed=1), replace(view, event_B=torch.tensor([1, 1]))]
    for other in others:
        redrawn = method.gaussian(other)
        assert redrawn is not None
        assert float((redrawn - drawn).abs().mean()) > 0.1
    assert float((drawn[0] - drawn[1]).abs().max()) > 0.1
    fixed = VaseDKV(window=8, redraw=False)
    assert torch.equal(fixed.gaussian(others[2]), drawn)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", [VaseAttnV(**SHORT), VaseDKV(**SHORT)], ids=lambda m: m.name)
def test_the_same_seeds_keep_the_same_slots_and_others_keep_others(method: Method) -> None:
    view = random_view(1, 2, 160, 16, sinks=4, recent=16)
    kept = method.plan(view, 80).kept_BHK
    assert torch.equal(method.plan(view, 80).kept_BHK, kept)
    others = [replace(view, seed=1), replace(view, row_seed_B=torch.ones(1).long()), replace(view, layer=1)]
    for other in [*others, replace(view, event_B=torch.ones(1).long())]:
        assert not torch.equal(method.plan(other, 80).kept_BHK, kept)
