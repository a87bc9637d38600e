"""VaSE: plans of rows, reserve, ablations and options of both variants."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from same_choice import check_same_choice
from slot_views import make_view, random_view
from test_vase import SHORT, mask_of
from test_vase_cache import SPECS, ids
from torch import Tensor

from reasonkv.methods import Method
from reasonkv.methods.vase_attnv import VaseAttnV, evened, value_range
from reasonkv.methods.vase_dkv import VaseDKV
from reasonkv.plan import Plan, PlanError
from reasonkv.view import SlotView

DOCS = Path(__file__).parents[1] / "docs" / "methods"


def with_state(view: SlotView) -> SlotView:
    """The state the public form of AttnV declares, as if no event had been."""
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(view.keys_BHND.shape, generator=generator).to(view.keys_BHND.dtype)
    return replace(view, values_BHND=values, state={"order": view.positions_BHN.int()})


def mixed_rows() -> tuple[SlotView, list[SlotView]]:
    """Rows that hold equally many slots but differ in prompt, length, event number and seed; and each alone."""
    whole = with_state(random_view(3, 2, 200, 32, recent=16, sinks=4))
    rows = []
    for b, (prompt, dropped, event, row_seed) in enumerate([(0, 0, 0, 5), (40, 64, 2, 0), (60, 640, 9, 5)]):
        age = torch.arange(200)
        positions = torch.where(age < 100, age, age + dropped)
        queries = whole.queries_BHqTD
        assert queries is not None
        alone = make_view(
            whole.keys_BHND[b : b + 1], queries[b : b + 1], positions=positions, sinks=4, recent=16, prompt=prompt,
            keep_prompt=True, event=event, row_seeds=(row_seed,),
        )  # fmt: skip
        state = {"order": alone.positions_BHN.int()}
        rows.append(replace(alone, values_BHND=whole.values_BHND[b : b + 1], state=state))
    tensors = {name for name, value in vars(rows[0]).items() if isinstance(value, Tensor)}
    joined = {name: torch.cat([getattr(row, name) for row in rows]) for name in tensors}
    state = {"order": torch.cat([row.state["order"] for row in rows])}
    return replace(whole, **{**joined, "state": state}), rows


@pytest.mark.parametrize("method", SPECS, ids=ids)
def test_rows_are_planned_as_each_alone(method: Method) -> None:
    view, rows = mixed_rows()
    together = method.plan(view, 120)
    together.check((3, 2, 200), 120, view.is_protected_BHN)
    for b, row in enumerate(rows):
        alone = method.plan(row, 120)
        if check_same_choice(method, [row], [Plan(together.kept_BHK[b : b + 1])], [alone]):
            for name, values in alone.state.items():
                assert torch.equal(values[0], together.state[name][b])
    order = torch.tensor([2, 0, 1])
    moved = {name: value[order] for name, value in vars(view).items() if isinstance(value, Tensor)}
    state = {"order": view.state["order"][order]}
    again = replace(view, **{**moved, "state": state})
    check_same_choice(method, [again], [Plan(together.kept_BHK[order])], [method.plan(again, 120)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", SPECS, ids=ids)
def test_a_plan_keeps_exactly_the_budget_with_every_protected_slot(method: Method, dtype: torch.dtype) -> None:
    view = with_state(random_view(2, 3, 96, dtype=dtype, sinks=2, recent=16))
    for keep in (18, 19, 41, 95):
        method.plan(view, keep).check((2, 3, 96), keep, view.is_protected_BHN)


@pytest.mark.parametrize("method", SPECS, ids=ids)
def test_a_broken_value_is_an_error_and_not_a_winner(method: Method) -> None:
    view = with_state(random_view(1, 2, 96, sinks=4, recent=16))
    view.values_BHND[0, 0, 30, 0] = float("nan")
    if isinstance(method, VaseAttnV) and method.magnitude == "random":
        return  # reads no values
    with pytest.raises(PlanError, match="NaN"):
        method.plan(view, 40)


def test_scores_are_float32_and_float64_models_are_scored_in_float64() -> None:
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        view = with_state(random_view(1, 2, 96, dtype=dtype, sinks=4, recent=16))
        assert VaseDKV(**SHORT).score(view).dtype == expected
        assert VaseAttnV(**SHORT).attention(view).dtype == VaseAttnV(**SHORT).magnitudes(view).dtype == expected


# ------------------------------------------------------------------------------------------------ reserve and ablations


def kept_ranges(method: VaseAttnV, view: SlotView, keep: int) -> tuple[Tensor, Tensor]:
    """Whether every slot before the window is kept, and its rank by falling value range (sinks apart)."""
    n = view.positions_BHN.shape[2] - method.window
    kept = mask_of(method.plan(view, keep).kept_BHK, view.positions_BHN.shape[2])[..., 4:n]
    ranges = view.values_BHND[:, :, 4:n].amax(-1) - view.values_BHND[:, :, 4:n].amin(-1)
    return kept, ranges.argsort(-1, descending=True).argsort(-1)


@pytest.mark.parametrize("variant", ["corrected", "paper"])
@pytest.mark.parametrize("n_large", [-1, 4, 20, 39])
def test_the_reserve_holds_the_largest_value_ranges(n_large: int, variant: Any) -> None:
    view = with_state(random_view(2, 2, 200, sinks=4, recent=16))
    method = VaseAttnV(**SHORT, n_large=n_large, variant=variant)
    kept, rank = kept_ranges(method, view, 80)
    reserved = (20 if n_large == -1 else n_large) - 4  # the sinks are among them
    assert bool(kept[rank < reserved].all())
    share = kept[rank >= reserved].float().mean()
    assert float(share) == pytest.approx((80 - 16 - 4 - reserved) / (180 - reserved), abs=1e-6)


def test_evicting_large_ranges_first_keeps_the_smallest_and_the_sinks() -> None:
    view = with_state(random_view(2, 2, 200, sinks=0, recent=16))
    method = VaseAttnV(**SHORT, evict_large=True)
    assert method.needs.queries == 0
    kept, rank = kept_ranges(method, replace(view, queries_BHqTD=None, query_positions_BT=None), 80)
    assert torch.equal(kept, rank >= 180 - 60)
    plan = method.plan(view, 80).kept_BHK
    assert torch.equal(plan[..., :4], torch.arange(4).expand(2, 2, 4))


def test_without_sampling_the_most_attended_slots_fill_what_the_reserve_leaves() -> None:
    view = with_state(random_view(1, 2, 200, sinks=4, recent=16))
    method = VaseAttnV(**SHORT, sample=False)
    kept = mask_of(method.plan(view, 80).kept_BHK, 200)[..., :184]
    reserved = method.reserve(view, 80, method.magnitudes(view)) | view.is_protected_BHN[..., :184]
    attention = method.attention(view).masked_fill(reserved, -1)
    assert torch.equal(kept, reserved | mask_of(attention.topk(80 - 16 - 20).indices, 184))
    assert torch.equal(method.plan(replace(view, seed=9), 80).kept_BHK, method.plan(view, 80).kept_BHK)


def test_a_low_temperature_sharpens_the_attention_that_slots_are_drawn_by() -> None:
    view = with_state(random_view(1, 2, 96, sinks=4, recent=16))
    soft, even, sharp = (VaseAttnV(**SHORT, temperature=T).attention(view) for T in (4.0, 1.0, 0.25))
    entropy = [float(-(a * a.log()).sum(-1).mean()) for a in (soft, even, sharp)]
    assert entropy == sorted(entropy, reverse=True)
    scaled = replace(view, scaling=view.scaling / 4)
    assert torch.equal(VaseAttnV(**SHORT).attention(scaled), soft)


def test_a_random_reserve_is_another_than_the_one_by_range() -> None:
    view = with_state(random_view(1, 64, 200, sinks=4, recent=16, group=1))
    method = VaseAttnV(**SHORT, magnitude="random", n_large=40)
    reserved = method.reserve(view, 80, method.magnitudes(view)) & ~view.is_protected_BHN[..., :184]
    assert bool((reserved.sum(-1) == 36).all())
    share = reserved[..., 4:].float().mean((0, 1))
    assert float((share - 36 / 180).abs().max()) < 5 * (0.2 * 0.8 / 64) ** 0.5


def test_a_kept_prompt_is_never_drawn_and_takes_its_part_of_the_quarter() -> None:
    view, _ = mixed_rows()  # prompts of 0, 40 and 60 tokens, kept
    method = VaseAttnV(**SHORT)
    reserved = method.reserve(view, 120, method.magnitudes(view)) & ~view.is_protected_BHN[..., :184]
    assert reserved.sum(-1).tolist() == [[26, 26], [(120 - 36) // 4 - 4] * 2, [(120 - 56) // 4 - 4] * 2]
    tight = VaseAttnV(**SHORT, n_large=100).plan(view, 80)  # fewer places than the reserve asks for
    tight.check((3, 2, 200), 80, view.is_protected_BHN)


@pytest.mark.parametrize("method", [VaseAttnV(**SHORT, n_large=0), VaseDKV(**SHORT)], ids=lambda m: m.name)
def test_sinks_stay_when_the_budget_protects_none(method: Method) -> None:
    kept = method.plan(with_state(random_view(2, 2, 96, recent=16)), 24).kept_BHK
    assert torch.equal(kept[..., :4], torch.arange(4).expand(2, 2, 4))


@pytest.mark.parametrize(("variant", "is_settled"), [("corrected", True), ("paper", False)])
def test_rounding_does_not_choose_among_the_slots_of_one_word(variant: Any, is_settled: bool) -> None:
    view = random_view(1, 2, 60, 16, queries=8, recent=8)
    words = torch.randn(5, 16, generator=torch.Generator().manual_seed(2))
    values = words[torch.arange(60) % 5].expand(1, 2, 60, 16)  # 52 slots before the window, 10 or 11 of every word
    method = VaseAttnV(variant=variant, window=8, n_large=25, n_sink=0)
    reserved = []
    for draw in range(8):
        noise = torch.randn(values.shape, generator=torch.Generator().manual_seed(draw))
        rounded = replace(view, values_BHND=values * (1 + 2e-7 * noise))
        reserved.append(method.reserve(rounded, 40, method.magnitudes(rounded)))
    assert all(torch.equal(one, reserved[0]) for one in reserved) == is_settled
    if is_settled:  # of the word that does not fit whole, the newest
        order = value_range(words[None, None])[0, 0].argsort(descending=True).tolist()
        slots = [slot for word in order for slot in range(51, -1, -1) if slot % 5 == word][:25]
        assert reserved[0][0, 0].nonzero()[:, 0].tolist() == sorted(slots)


def test_evening_keeps_12_bits_and_what_is_not_finite() -> None:
    given = torch.tensor([1.0, 1 + 2.0**-14, 1 + 2.0**-10, 3.3e-20, torch.inf, -torch.inf])
    found = evened(given)
    assert found[0] == found[1] and found[2] > found[1]
    torch.testing.assert_close(found, given, rtol=2.0**-12, atol=0)
    assert torch.isnan(evened(torch.tensor(torch.nan)))
