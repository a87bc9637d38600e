"""CASK's promises: mass, protection, exact sizes, rows that do not see each other."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from cask_reference import CaskReference
from cask_views import random_views
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reasonkv.compaction import compact_pair
from reasonkv.methods import MethodError, get_method
from reasonkv.methods.cask import CASK, CaskPlan, Row
from reasonkv.methods.frequency import frequency_scores
from reasonkv.methods.phases import parse_markers, phase_markers, phases_of_tokens
from reasonkv.plan import Plan
from reasonkv.view import SlotView

SPECS = [
    "cask",
    "cask:similarity=0.3",
    "cask:fold=neighbours",
    "cask:per_layer=true",
    "cask:variant=paper",
    "cask:markers=0;1-2",
    "cask:fold=none",
    "cask:core_ratio=0,fold=neighbours,mass=none",
]
REFERENCES = [
    CaskReference(),
    CaskReference(pin_prompt=True),
    CaskReference(representative="weighted_latest"),
    CaskReference(mass_gate=1.5, promotion=0.9),
]
METHODS = [*map(get_method, SPECS), *REFERENCES]
IDS = [*SPECS, "reference", "pinned", "means", "gates"]


def of(spec: str) -> CASK:
    method = get_method(spec)
    assert isinstance(method, CASK)
    return method


def attention(query_D: Tensor, keys_ND: Tensor, values_ND: Tensor, bias_N: Tensor | float = 0.0) -> Tensor:
    return (keys_ND @ query_D * keys_ND.shape[1] ** -0.5 + bias_N).softmax(0) @ values_ND


def folded_attention(view: SlotView, plan: Plan, query_D: Tensor) -> Tensor:
    keys, values = compact_pair(view.keys_BHND, view.values_BHND, [0], plan, view.positions_BHN)
    return attention(query_D, keys[0, 0], values[0, 0], 0.0 if plan.log_mass_BHK is None else plan.log_mass_BHK[0, 0])


def repeated(method: CASK) -> list[SlotView]:
    """Every decode token has the same rotated key, and a value of its own; the prompt is protected."""
    views = random_views(method, N=60, prompts=(8,), dtype=torch.float64, recent=4, keep_prompt=True)
    for view in views:
        view.keys_BHND[:, :, 8:] = view.keys_BHND[:, :, 8:9].clone()
    return views


@pytest.mark.parametrize("fold", ["similar,similarity=-1", "neighbours"])
def test_groups_of_identical_keys_attend_exactly_as_full_attention_does(fold: str) -> None:
    method = of(f"cask:fold={fold}")
    views = repeated(method)
    plans = method.plan_layers(views, 30)
    assert all(plan.merge is not None for plan in plans)
    for view, plan in zip(views, plans, strict=True):
        query = torch.randn(16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        full = attention(query, view.keys_BHND[0, 0], view.values_BHND[0, 0])
        torch.testing.assert_close(folded_attention(view, plan, query), full, atol=1e-12, rtol=0)


def test_the_papers_fold_loses_the_mass_of_identical_keys() -> None:
    method = of("cask:variant=paper")
    views = repeated(method)
    plan = method.plan_layers(views, 30)[0]
    query = torch.zeros(16, dtype=torch.float64)  # every token gets the same attention: 52 of 60 decode, 22 of 30 slots
    keys, _ = compact_pair(views[0].keys_BHND, views[0].values_BHND, [0], plan, views[0].positions_BHN)
    full = attention(query, views[0].keys_BHND[0, 0], torch.eye(60, dtype=torch.float64))
    held = attention(query, keys[0, 0], torch.eye(30, dtype=torch.float64))
    assert full[8:].sum() == pytest.approx(52 / 60)
    assert held[8:].sum() == pytest.approx(22 / 30)
    difference = folded_attention(views[0], plan, query) - attention(
        query, views[0].keys_BHND[0, 0], views[0].values_BHND[0, 0]
    )
    assert float(difference.abs().max()) > 0.02


def test_log_mass_is_the_log_of_all_source_tokens_over_successive_folds() -> None:
    method = of("cask:similarity=0.3")
    views = random_views(method, counts=True, N=80)
    plan = method.plan_layers(views, 40)[0]
    assert isinstance(plan, CaskPlan) and plan.log_mass_BHK is not None and plan.merge is not None
    earlier = views[0].state["log_mass"].double().exp()
    for slot, log_mass in enumerate(plan.log_mass_BHK[0, 0].tolist()):
        assert log_mass == pytest.approx(
            math.log(float(earlier[0, 0][plan.merge.into_BHN[0, 0] == slot].sum())), abs=1e-6
        )


@settings(max_examples=60, deadline=None)
@given(st.data())
@pytest.mark.parametrize("method", METHODS, ids=IDS)
def test_every_plan_keeps_exactly_its_slots_and_all_that_is_protected(method: CASK, data: st.DataObject) -> None:
    sinks, recent = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 12))
    N = data.draw(st.integers(16, 70))
    prompt = data.draw(st.integers(0, N))
    least = max(1, sinks + max(recent, method.needs.recent))
    if least >= N:
        return
    keep = data.draw(st.integers(least, N - 1))
    views = random_views(
        method, N=N, prompts=(prompt,), sinks=sinks, recent=recent, counts=data.draw(st.booleans()), D=4, H=1,
        seed=data.draw(st.integers(0, 99)),
    )  # fmt: skip
    for view, plan in zip(views, method.plan_layers(views, keep), strict=True):
        plan.check((1, 1, N), keep, view.is_protected_BHN)
        assert isinstance(plan, CaskPlan)
        target = plan.rows[0].target_N
        assert np.flatnonzero(target == np.arange(N)).tolist() == plan.kept_BHK[0, 0].tolist()
        assert set(target[target >= 0].tolist()) == set(plan.kept_BHK[0, 0].tolist())


@pytest.mark.parametrize("method", METHODS, ids=IDS)
def test_rows_of_different_prompts_are_planned_as_each_alone(method: CASK) -> None:
    prompts = (0, 13, 60)
    views = random_views(method, B=3, N=90, prompts=prompts, recent=8)
    together = method.plan_layers(views, 50)
    for b in range(3):
        alone = [
            replace(
                view,
                **{
                    name: value[b : b + 1]
                    for name, value in view.__dict__.items()
                    if isinstance(value, Tensor) and name != "output_projection_HqDM"
                },
                state={name: value[b : b + 1] for name, value in view.state.items()},
                token_ids=(view.token_ids or ())[b : b + 1],
            )
            for view in views
        ]
        for one, many in zip(method.plan_layers(alone, 50), together, strict=True):
            assert torch.equal(one.kept_BHK[0], many.kept_BHK[b])
            if one.merge is not None and many.merge is not None:
                assert torch.equal(one.merge.into_BHN[0], many.merge.into_BHN[b])
                assert torch.equal(one.merge.value_weights_BHN[0], many.merge.value_weights_BHN[b])


def test_decode_tokens_get_their_share_beside_a_long_prompt_and_two_slots_under_the_papers_rule() -> None:
    for spec, decode in (("cask", 8 + 4), ("cask:prompt_share=0.5", 8 + 20), ("cask:variant=paper", 8 + 2)):
        method = of(spec)
        plan = method.plan_layers(random_views(method, N=160, prompts=(100,)), 48)[0]
        assert int((plan.kept_BHK[0, 0] >= 100).sum()) == decode


def test_a_protected_prompt_stays_whole_and_only_the_references_pinned_one_loses_the_sinks() -> None:
    corrected = of("cask")
    plan = corrected.plan_layers(random_views(corrected, N=90, prompts=(20,), keep_prompt=True), 40)[0]
    assert plan.kept_BHK[0, 0, :20].tolist() == list(range(20))
    pinned = CaskReference(pin_prompt=True)
    plan = pinned.plan_layers(random_views(pinned, N=90, prompts=(60,)), 40)[0]
    assert plan.fallbacks == ("prefix_budget_exhausted",)
    assert plan.kept_BHK[0, 0].tolist() == list(range(50, 90))


def row_of(n: int, **changes: object) -> Row:
    index = np.arange(n)
    values: dict[str, object] = {
        "scores_MN": torch.arange(float(n))[None], "counts_N": np.ones(n, dtype=np.int64), "starts_N": index,
        "ends_N": index, "phases_N": np.zeros(n, dtype=np.int64), "protected_N": np.zeros(n, dtype=bool),
        "vectors_ND": np.ones((n, 2)), "prompt": 0, "prompt_length": 0,
    }  # fmt: skip
    return Row(**{**values, **changes})  # type: ignore[arg-type]


def test_no_group_spans_a_protected_slot() -> None:
    target = (
        of("cask:window=0,core_ratio=0,fold=neighbours")
        .plan_row(row_of(12, protected_N=np.arange(12) == 5), 4)
        .target_N
    )
    assert (target == 5).sum() == 1
    kept = set(target.tolist())
    assert len(kept) == 4
    for slot in kept:
        assert len(np.unique(np.flatnonzero(target == slot) > 5)) == 1


@pytest.mark.parametrize("variant", ["corrected", "paper"])
def test_a_source_weighs_its_tokens_and_in_the_paper_its_support_too(variant: str) -> None:
    method = of(f"cask:variant={variant},fold=neighbours,core_ratio=0")
    [view, *others] = random_views(method, N=60, prompts=(0,), counts=True)
    [plan, *_] = method.plan_layers([view, *others], 30)
    assert isinstance(plan, CaskPlan) and plan.merge is not None
    into, weights = plan.merge.into_BHN[0, 0].numpy(), plan.merge.value_weights_BHN[0, 0].numpy()
    scores = torch.cat([frequency_scores(v.keys_BHND, v.calibration, v.rotary, v.length_B)[0] for v in (view, *others)])
    mass = view.counts_BHN[0, 0].double().numpy()
    if variant == "paper":
        mass = mass * (np.log1p(np.exp(scores.double().amax(0).numpy())) + 1e-4)
    compared = 0
    for slot in range(30):
        members = np.flatnonzero(into == slot)
        if len(members) == 1:
            assert weights[members] == 1.0
            continue
        total = mass[members].sum() if variant == "corrected" else max(mass[members].sum(), 1.0)
        np.testing.assert_allclose(weights[members], mass[members] / total, rtol=1e-5)
        compared += 1
    assert compared > 2


def test_phases_count_markers_that_were_decoded_and_end_with_their_last_token() -> None:
    ids = torch.tensor([9, 1, 2, 1, 2, 5, 9, 9, 7]).numpy()
    assert phases_of_tokens(ids, 3, [(9,), (1, 2)]).tolist() == [-1, -1, -1, 0, 0, 1, 1, 2, 3]


class Words:
    unk_token_id = 0

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        assert not add_special_tokens
        return {"\n": [198], "\n\n": [271], " So": [12, 13], "So": [0]}.get(text, [])


def test_markers_come_from_a_tokenizer_without_what_it_cannot_write() -> None:
    assert phase_markers(Words()) == "198;271;12-13"
    assert of("cask").for_tokenizer(Words()).markers == "198;271;12-13"
    assert of("cask:markers=7").for_tokenizer(Words()).markers == "7"
    assert of("cask:markers=none").for_tokenizer(Words()).markers == "none"
    assert parse_markers("198;271;12-13") == ((198,), (271,), (12, 13))
    assert parse_markers("") == parse_markers("none") == ()


def test_needs_follow_the_options() -> None:
    needs = of("cask:markers=1").needs
    assert (needs.scope, needs.log_mass, needs.merges, needs.token_ids, needs.recent) == ("model", True, True, True, 8)
    assert not of("cask").needs.token_ids  # no tokenizer, no markers
    plain = of("cask:variant=paper,fold=none,per_layer=true").needs
    assert (plain.scope, plain.log_mass, plain.merges, plain.recent) == ("layer", False, False, 0)


@pytest.mark.parametrize("spec", [*SPECS, "cask:variant=paper,mass=log"])
def test_the_short_form_gives_the_method_back(spec: str) -> None:
    assert get_method(of(spec).spec()) == of(spec)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("cask:variant=x", "cask: variant must be corrected or paper, not x."),
        ("cask:mass=x", "cask: mass must be log or none, not x."),
        ("cask:core_ratio=1.5", "cask: core_ratio must be at most 1, not 1.5."),
        ("cask:window=-1", "cask: window must be at least 0, not -1."),
        ("cask:markers=a", "cask: markers must be token ids like 198;271;12-13, or none, not 'a'."),
    ],
)
def test_a_bad_option_is_one_sentence(spec: str, message: str) -> None:
    with pytest.raises(MethodError) as caught:
        get_method(spec)
    assert str(caught.value) == message
