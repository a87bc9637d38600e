"""What every method promises, and what each one promises beyond that."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from same_choice import check_same_choice
from slot_views import make_view, random_view
from torch import Tensor

from reasonkv.methods import CATALOGUE, MethodError, get_method, method_class
from reasonkv.methods.random import RandomEviction
from reasonkv.methods.rkv import RKV
from reasonkv.methods.snapkv import SnapKV
from reasonkv.plan import Plan, PlanError
from reasonkv.runtimes.vllm.config import ServingError, vllm_variant
from reasonkv.view import SlotView

SPECS = [
    "streaming",
    "random",
    "random:redraw=false",
    "knorm",
    "keydiff",
    "snapkv:window=16",
    "snapkv:window=16,pooling=max,denominator=old,kernel=3",
    "rkv",
    "rkv:variant=vase,window=16",
    "rkv:weight=0.5,threshold=0.9,retain=first",
]  # oracle reads a trace instead of the view: see test_oracle_method.py
DOCS = Path(__file__).parents[1] / "docs" / "methods"


def view_for(spec: str, **options: Any) -> SlotView:
    needs = get_method(spec).needs
    return random_view(queries=needs.queries, sinks=4, recent=max(8, needs.recent), **options)


def row(view: SlotView, b: int, row_seed: int = 0) -> SlotView:
    """Row b alone."""
    queries = None if view.queries_BHqTD is None else view.queries_BHqTD[b : b + 1]
    return make_view(
        view.keys_BHND[b : b + 1],
        queries,
        sinks=4,
        recent=int(view.is_protected_BHN[b, 0].sum()) - 4,
        row_seeds=(row_seed,),
    )


# ------------------------------------------------------------------------------------------------------ every method


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", SPECS)
def test_a_plan_keeps_exactly_the_budget_with_every_protected_slot(spec: str, dtype: torch.dtype) -> None:
    view = view_for(spec, B=2, H=3, dtype=dtype)
    for keep in (20, 41, 95):
        plan = get_method(spec).plan(view, keep)
        plan.check((2, 3, 96), keep, view.is_protected_BHN)
        assert plan.merge is None
        assert plan.kept_BHK.dtype == torch.int64


@pytest.mark.parametrize("spec", SPECS)
def test_a_batch_row_is_planned_as_the_same_row_alone(spec: str) -> None:
    needs = get_method(spec).needs
    view = random_view(3, 2, 200, 32, queries=needs.queries, sinks=4, recent=max(8, needs.recent), row_seeds=(5, 0, 9))
    method = get_method(spec)
    together = method.plan(view, 80).kept_BHK
    for b, row_seed in enumerate((5, 0, 9)):
        alone = row(view, b, row_seed)
        check_same_choice(method, [alone], [Plan(together[b : b + 1])], [method.plan(alone, 80)])
        torch.testing.assert_close(method.score(alone)[0], method.score(view)[b])  # type: ignore[attr-defined]


@pytest.mark.parametrize("spec", [spec for spec in SPECS if not spec.startswith("random")])
def test_scores_are_float32_and_float64_models_are_scored_in_float64(spec: str) -> None:
    method = get_method(spec)
    half, double = view_for(spec, dtype=torch.bfloat16), view_for(spec, dtype=torch.float64)
    assert method.score(half).dtype == torch.float32  # type: ignore[attr-defined]
    if spec != "streaming":
        assert method.score(double).dtype == torch.float64  # type: ignore[attr-defined]


@pytest.mark.parametrize("spec", SPECS)
def test_planning_changes_nothing_it_was_shown(spec: str) -> None:
    view = view_for(spec)
    before = [x.clone() for x in (view.keys_BHND, view.positions_BHN, view.is_protected_BHN)]
    first = get_method(spec).plan(view, 40).kept_BHK
    assert torch.equal(get_method(spec).plan(view, 40).kept_BHK, first)
    for x, y in zip(before, (view.keys_BHND, view.positions_BHN, view.is_protected_BHN), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("spec", ["knorm", "keydiff", "snapkv:window=16", "rkv"])
def test_a_broken_key_is_an_error_and_not_a_winner(spec: str) -> None:
    view = view_for(spec)
    view.keys_BHND[0, 0, 30, 0] = float("nan")
    with pytest.raises(PlanError, match="NaN"):
        get_method(spec).plan(view, 40)


@pytest.mark.parametrize("spec", [*SPECS, "full", "oracle", "oracle:reduce=max"])
def test_the_short_form_gives_the_method_back(spec: str) -> None:
    method = get_method(spec)
    assert get_method(method.spec()) == method
    assert get_method(f"{method.name}:" + ",".join(f"{k}={v}" for k, v in method.options().items())) == method


@pytest.mark.parametrize("name", CATALOGUE)
def test_the_catalogue_says_what_the_classes_say(name: str) -> None:
    entry, cls = CATALOGUE[name], method_class(name)
    assert (entry.path, entry.title, entry.paper) == (f"{cls.__module__}:{cls.__name__}", cls.title, cls.paper)
    method = cls()
    if entry.vllm == "no":
        with pytest.raises(ServingError):
            vllm_variant(method)
    else:
        assert vllm_variant(method) == get_method(name if entry.vllm == "yes" else f"{name}:{entry.vllm}")


def test_the_catalogue_is_read_without_torch() -> None:
    code = "import sys, reasonkv.methods.catalogue as c; c.method_names(); sys.exit(bool({'torch', 'pydantic'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("SnapKV", "snapkv"),
        ("snap_kv", "snapkv"),
        ("R-KV", "rkv"),
        ("vase_dkv", "vase-dkv"),
        ("StreamingLLM", "streaming"),
        ("RandomAttention", "random-attention"),
        ("RandomEviction", "random"),
    ],
)
def test_names_match_whatever_their_case_and_punctuation(given: str, name: str) -> None:
    assert get_method(given).name == name


def test_an_unknown_name_is_answered_by_the_nearest() -> None:
    with pytest.raises(MethodError, match="Unknown method 'SnapVK'; did you mean 'snapkv'"):
        get_method("SnapVK")
    with pytest.raises(MethodError, match="Unknown option of snapkv 'windw'; did you mean 'window'"):
        get_method("snapkv:windw=3")


def test_numpy_numbers_become_python_numbers_and_other_types_are_refused() -> None:
    method = SnapKV(window=np.int64(16))  # type: ignore[arg-type]
    assert type(method.window) is int
    assert type(RKV(weight=np.float32(0.5)).weight) is float  # type: ignore[arg-type]
    for value in (0.5, "16", True, None):
        with pytest.raises(MethodError, match="snapkv: window must be a whole number, not"):
            SnapKV(window=value)  # type: ignore[arg-type]


def test_a_method_may_hold_objects_that_no_option_can_describe() -> None:
    @dataclass(frozen=True)
    class Told(SnapKV):
        views: dict[int, SlotView] = field(default_factory=dict)

    views: dict[int, SlotView] = {3: random_view(N=4)}
    made = Told(window=np.int64(8), views=views)
    assert made.views is views and made.window == 8


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_method_has_a_page_a_title_and_a_paper(name: str) -> None:
    method = get_method(name)
    page = (DOCS / f"{name}.md").read_text()
    for option, value in method.options().items():
        assert f"| `{option}` | {str(value).lower() if isinstance(value, bool) else value} |" in page
    assert method.name == name
    assert method.title
    assert method.paper


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("snapkv:window=0", "snapkv: window must be at least 1, not 0."),
        ("snapkv:kernel=4", "snapkv: kernel must be an odd number of slots, not 4."),
        ("snapkv:pooling=sum", "snapkv: pooling must be avg or max, not sum."),
        ("snapkv:denominator=new", "snapkv: denominator must be all or old, not new."),
        ("rkv:variant=official", "rkv: variant must be paper or vase, not official."),
        ("rkv:window=-1", "rkv: window must be at least 1, not -1."),
        ("rkv:kernel=2", "rkv: kernel must be an odd number of slots, not 2."),
        ("rkv:weight=1.5", "rkv: weight must be at most 1, not 1.5."),
        ("rkv:threshold=-0.5", "rkv: threshold must be at least 0, not -0.5."),
        ("rkv:retain=middle", "rkv: retain must be last or first, not middle."),
        ("oracle:reduce=mean", "oracle: reduce must be sum or max, not mean."),
        ("tova:window=0", "tova: window must be at least 1, not 0."),
        ("lagkv:lag=1", "lagkv: lag must be at least 2, not 1."),
        ("lagkv:sinks=-1", "lagkv: sinks must be at least 0, not -1."),
        ("lagkv:value_ratio=-1", "lagkv: value_ratio must be at least 0, not -1."),
        ("lagkv:value_ratio=inf", "lagkv: value_ratio must be a finite number, not inf."),
        ("curdkv:leverage=norm", "curdkv: leverage must be kv_product, kv_avg, key or value, not norm."),
        ("curdkv:window=-1", "curdkv: window must be at least 0, not -1."),
        ("chunkkv:chunk=0", "chunkkv: chunk must be at least 1, not 0."),
        ("chunkkv:base=full", "chunkkv: base must be a method that scores slots, not full."),
        ("h2o:window=0", "h2o: window must be at least 1, not 0."),
        ("h2o:recent_share=1.5", "h2o: recent_share must be at most 1, not 1.5."),
        ("defensivekv:mass=2", "defensivekv: mass must be at most 1, not 2."),
        ("beaconkv:beacons=0", "beaconkv: beacons must be at least 1, not 0."),
        ("beaconkv:beacons=4.5", "beaconkv: beacons must be a whole number, not 4.5."),
        ("random-attention:prompt=some", "random-attention: prompt must be all, cap or none, not some."),
        ("random-attention:shared=maybe", "random-attention: shared must be true or false, not maybe."),
        ("vase-attnv:variant=kvpress", "vase-attnv: variant must be corrected or paper, not kvpress."),
        ("vase-attnv:n_large=-2", "vase-attnv: n_large must be at least -1, not -2."),
        ("vase-attnv:temperature=0", "vase-attnv: temperature must be above 0, not 0."),
        ("vase-dkv:projection=-1", "vase-dkv: projection must be at least 0, not -1."),
        ("expected:epsilon=-1", "expected: epsilon must be at least 0, not -1."),
        ("expected:covariance=half", "expected: covariance must be bands, full or none, not half."),
    ],
)
def test_a_bad_option_is_one_sentence(spec: str, message: str) -> None:
    with pytest.raises(MethodError) as caught:
        get_method(spec)
    assert str(caught.value) == message


# ------------------------------------------------------------------------------------------- full, streaming, random


def test_full_takes_no_budget_and_keeps_everything() -> None:
    full = get_method("full")
    assert full.bounded is False
    assert torch.equal(full.plan(random_view(N=30), 30).kept_BHK, torch.arange(30).expand(1, 2, 30))


def test_streaming_keeps_the_sinks_and_the_newest() -> None:
    kept = get_method("streaming").plan(random_view(N=50, sinks=4), 20).kept_BHK
    assert torch.equal(kept, torch.cat([torch.arange(4), torch.arange(34, 50)]).expand(1, 2, 20))


def events(method: RandomEviction, length: int, keep: int, interval: int, heads: int = 1) -> Tensor:
    """Positions held after feeding `length` tokens with an event every `interval`: [1, heads, keep]."""
    held, event = torch.arange(keep).expand(1, heads, keep), 0
    for start in range(keep, length, interval):
        new = torch.arange(start, min(start + interval, length)).expand(1, heads, -1)
        held = torch.cat([held, new], dim=-1)
        view = make_view(torch.zeros(1, heads, held.shape[-1], 1), positions=held, event=event)
        held, event = held.gather(2, method.plan(view, keep).kept_BHK), event + 1
    return held


def test_one_number_per_token_is_a_reservoir_sample() -> None:
    method = RandomEviction(redraw=False)
    whole = make_view(torch.zeros(1, 4, 1000, 1))
    at_once = method.plan(whole, 64).kept_BHK
    for interval in (7, 64):
        assert torch.equal(events(method, 1000, 64, interval, heads=4), at_once)


def test_redrawn_numbers_forget_with_age_and_kept_numbers_do_not() -> None:
    keep, interval, length, heads, old = 128, 16, 1024, 64, 512
    events_seen = (length - torch.arange(old).clamp(min=keep).float()).div(interval).ceil()
    forgotten = float(((keep / (keep + interval)) ** events_seen).mean())  # 0.01
    for redraw, expected in ((True, forgotten), (False, keep / length)):
        held = events(RandomEviction(redraw=redraw), length, keep, interval, heads)
        share = float((held < old).sum()) / (heads * old)
        assert share == pytest.approx(expected, abs=5 * (expected / (heads * old)) ** 0.5)


def test_random_keeps_the_prompt_when_the_budget_says_so_and_differs_between_heads() -> None:
    view = random_view(H=4, N=200, queries=0, prompt=40, keep_prompt=True, recent=8)
    kept = RandomEviction().plan(view, 100).kept_BHK
    assert torch.equal(kept[..., :40], torch.arange(40).expand(1, 4, 40))
    assert len({tuple(head) for head in kept[0].tolist()}) == 4


def test_random_is_uniform_over_what_is_not_protected() -> None:
    view = random_view(H=2000, N=24, D=1, queries=0, sinks=2, recent=2, group=1)
    kept = RandomEviction().plan(view, 14).kept_BHK
    share = torch.bincount(kept.flatten(), minlength=24)[2:22] / 2000
    assert float((share - 0.5).abs().max()) < 4 * 0.5 / 2000**0.5


# --------------------------------------------------------------------------------------------- knorm, keydiff, snapkv


def test_knorm_keeps_the_small_keys() -> None:
    keys = torch.ones(1, 1, 10, 4) * torch.tensor([5.0, 1, 9, 2, 8, 3, 7, 4, 6, 10])[None, None, :, None]
    assert get_method("knorm").plan(make_view(keys), 4).kept_BHK.tolist() == [[[1, 3, 5, 7]]]


def test_keydiff_keeps_the_key_that_points_elsewhere_whatever_its_length() -> None:
    keys = torch.tensor([1.0, 0.1, 0.0]).repeat(12, 1) + 0.01 * torch.randn(
        12, 3, generator=torch.Generator().manual_seed(0)
    )
    keys[4], keys[9] = torch.tensor([0.0, -1.0, 0.2]), torch.tensor([-100.0, 0.0, 5.0])
    assert get_method("keydiff").plan(make_view(keys[None, None]), 2).kept_BHK.tolist() == [[[4, 9]]]


def attended_view(slot: int, N: int = 60, window: int = 8) -> SlotView:
    """All queries point at the key of one slot."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 2, N, 32, generator=generator)
    queries = (8 * keys[:, :, slot]).repeat_interleave(2, 1).unsqueeze(2).expand(1, 4, window, 32)
    return make_view(keys, queries, recent=window)


@pytest.mark.parametrize(
    "spec", ["snapkv:window=8", "snapkv:window=8,denominator=old", "rkv", "rkv:variant=vase,window=8"]
)
def test_what_the_recent_queries_attend_to_stays_with_its_neighbours(spec: str) -> None:
    method = get_method(spec)
    kept = method.plan(attended_view(slot=20), 13).kept_BHK
    half = 2 if isinstance(method, SnapKV) or method.variant == "vase" else 3  # type: ignore[attr-defined]
    if half == 2:
        assert torch.equal(kept, torch.cat([torch.arange(18, 23), torch.arange(52, 60)]).expand(1, 2, 13))
    else:
        assert {17, 18, 19, 20, 21, 22, 23} >= set(kept[0, 0, :5].tolist())


def test_snapkv_asks_for_its_window() -> None:
    needs = SnapKV(window=24).needs
    assert (needs.queries, needs.recent) == (24, 24)
