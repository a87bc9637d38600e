"""The methods of the field: what all promise, and each one's formula against a slow explicit implementation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from field_views import ROTARY, D, attention, field_view, observe, ring
from hypothesis import given, settings
from hypothesis import strategies as st
from same_choice import check_same_choice, row_of
from torch.testing import assert_close

from reasonkv.methods.ams import AMS
from reasonkv.methods.base import Method, Observed
from reasonkv.methods.beaconkv import BeaconKV, farthest
from reasonkv.methods.cake import CAKE
from reasonkv.methods.chunkkv import ChunkKV
from reasonkv.methods.curdkv import CurDKV
from reasonkv.methods.d2o import D2O
from reasonkv.methods.defensivekv import DefensiveKV, projected_norms
from reasonkv.methods.gkv import GKV
from reasonkv.methods.h2o import H2O
from reasonkv.methods.inertiakv import InertiaKV
from reasonkv.methods.keyformer import Keyformer
from reasonkv.methods.lagkv import LagKV
from reasonkv.methods.lazyeviction import LazyEviction
from reasonkv.methods.nacl import NACL
from reasonkv.methods.raas import RaaS
from reasonkv.methods.random import RandomAttention
from reasonkv.methods.rpc import RPC
from reasonkv.methods.sagekv import SageKV
from reasonkv.methods.scissorhands import Scissorhands
from reasonkv.methods.snapkv import SnapKV
from reasonkv.methods.tova import TOVA
from reasonkv.plan import Plan, PlanError
from reasonkv.view import SlotView

METHODS: list[Method] = [
    TOVA(),
    TOVA(window=4),
    LagKV(),
    LagKV(lag=8, sinks=2, cross=True, fit=False),
    CurDKV(),
    CurDKV("kv_avg", window=0, rank=5),
    CurDKV("key", tail="padded"),
    ChunkKV("snapkv:window=8"),
    ChunkKV("keydiff", chunk=7),
    H2O(window=16),
    DefensiveKV(window=8),
    DefensiveKV(window=8, variant="paper"),
    DefensiveKV(window=8, output_norm=False, mass=0.0),
    BeaconKV(beacons=4, window=3, recent=6),
    RandomAttention(recent=8),
    RandomAttention(recent=8, prompt="cap", cap=5, pinned=3, block=4, shared=True),
    GKV(),
    GKV("paper", memory="mean", kernel=5, weight=0.1),
    LazyEviction(alpha=0.01, window=32),
    RaaS(page=4, window=32),
    CAKE(window=8),
    Keyformer(window=16),
    NACL(window=8),
    Scissorhands(window=32),
    SageKV(),
    RPC(window=8),
    InertiaKV(refresh=4, window=32),
    D2O(window=16),
    AMS("snapkv:window=8", window=8, least=6),
    AMS("keydiff", window=16, least=3, floor=1, most=9),
]
ids = [f"{number}-{method.spec()}" for number, method in enumerate(METHODS)]


# ------------------------------------------------------------------------------------------------------ every method


@pytest.mark.parametrize("method", METHODS, ids=ids)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_plan_keeps_exactly_the_budget_with_every_protected_slot(method: Method, data: st.DataObject) -> None:
    N = data.draw(st.integers(35, 140))
    lengths = tuple(data.draw(st.lists(st.integers(N, 3 * N), min_size=1, max_size=3)))
    prompts = tuple(data.draw(st.integers(1, 20)) for _ in lengths)
    H, group = data.draw(st.sampled_from([(1, 1), (2, 3), (3, 2)]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
    view = field_view(method, N, lengths, prompts, H=H, group=group, keep_prompt=data.draw(st.booleans()), dtype=dtype)
    keep = data.draw(st.integers(int(view.is_protected_BHN.sum(-1).max()), N - 1))
    plan = method.plan(view, keep)
    plan.check((len(lengths), H, N), keep, view.is_protected_BHN)
    if method.needs.scope != "head":
        assert torch.equal(plan.kept_BHK, plan.kept_BHK[:, :1].expand_as(plan.kept_BHK))


@pytest.mark.parametrize("method", METHODS, ids=ids)
def test_a_row_is_planned_as_it_would_be_alone(method: Method) -> None:
    view = field_view(method, 80, (80, 131, 300), (20, 7, 40))
    together = method.plan(view, 50)
    for b in range(3):
        row = row_of(view, b)
        alone = method.plan(row, 50)
        if check_same_choice(method, [row], [Plan(together.kept_BHK[b : b + 1])], [alone]):
            for name, state in alone.state.items():
                torch.testing.assert_close(state[0], together.state[name][b])


@pytest.mark.parametrize("method", [m for m in METHODS if not isinstance(m, RandomAttention)], ids=lambda m: m.spec())
def test_a_broken_key_or_value_is_an_error_and_not_a_winner(method: Method) -> None:
    view = field_view(method)
    view.keys_BHND[0, 0, 30, 0] = view.values_BHND[0, 0, 30, 0] = float("nan")
    if "output_norm" in view.state:
        view.state["output_norm"][0, 0, 30] = -1.0
    with pytest.raises(PlanError, match="NaN"):
        method.plan(view, 40)


# ------------------------------------------------------------------------------------ formulas, slowly and explicitly


def test_tova_is_the_mean_over_all_query_heads() -> None:
    view = field_view(TOVA(), 60, (99,))
    rows = [attention(view, 0, q // 2, *ring(view, 0, q))[0] for q in range(4)]
    expected = torch.tensor(rows).mean(0).expand(2, -1)
    assert_close(TOVA().score(view)[0], expected, rtol=1e-5, atol=1e-7)


def test_lagkv_ranks_within_a_chunk_against_the_next_one() -> None:
    method = LagKV(lag=8, sinks=3)
    view = field_view(method, 61, (61,))
    found = method.score(view)
    for h in range(2):
        expected = [1.0] * 61
        for start in range(3, 61 - 16 + 1, 8):
            sums = torch.zeros(8, dtype=torch.float64)
            for x in (view.keys_BHND[0, h].double(), view.values_BHND[0, h].double()):
                mine, after = x[start : start + 8], x[start + 8 : start + 16]
                scaled = (mine - after.min(0).values) / (after.max(0).values - after.min(0).values)
                sums += scaled.std(1).exp() / scaled.std(1).exp().sum()
            for i in range(8):
                expected[start + i] = int((sums < sums[i]).sum()) / 8
        assert found[0, h].tolist() == pytest.approx(expected)


def test_curdkvs_projection_is_a_rows_own_and_keeps_norms_on_average() -> None:
    method = CurDKV(rank=64)
    view = field_view(method, 60, (99, 99), (20, 20))
    G = method.projection(view)
    assert not torch.equal(G[0], G[1])
    assert torch.equal(G[:1], method.projection(row_of(view, 0)))
    assert torch.equal(G, method.projection(replace(view, event_B=view.event_B + 5)))
    assert float((G.square().sum(-1).mean() - 1).abs()) < 0.05


def test_chunkkv_keeps_whole_chunks_and_the_best_of_the_last() -> None:
    method, keep = ChunkKV("snapkv:window=8", chunk=6), 50
    view = field_view(method, 90, (130,))
    votes = SnapKV(window=8).score(view).sum(1)[0].tolist()
    positions, protected = view.positions_BHN[0, 0].tolist(), view.is_protected_BHN[0, 0].tolist()
    chunks: dict[int, list[int]] = {}
    for slot, position in enumerate(positions):
        if not protected[slot]:
            chunks.setdefault(position // 6, []).append(slot)
    kept = {slot for slot in range(90) if protected[slot]}
    for chunk in sorted(chunks, key=lambda c: -sum(votes[s] for s in chunks[c]) / len(chunks[c])):
        kept |= set(sorted(chunks[chunk], key=lambda s: -votes[s])[: keep - len(kept)])
    assert method.plan(view, keep).kept_BHK[0].tolist() == [sorted(kept)] * 2


def test_chunkkv_reuses_the_choice_of_a_layer() -> None:
    method = ChunkKV("snapkv:window=8", reuse=2)
    views = [field_view(method, 90, (130,), seed=0), field_view(method, 90, (130,), seed=0)]
    views += [replace(v, keys_BHND=v.keys_BHND.flip(-2).contiguous()) for v in views]
    plans = method.plan_layers(views, 40)
    assert method.needs.scope == "model"
    assert torch.equal(plans[1].kept_BHK, plans[0].kept_BHK)
    assert torch.equal(plans[3].kept_BHK, plans[2].kept_BHK)
    assert not torch.equal(plans[2].kept_BHK, plans[0].kept_BHK)


def slow_defensive(method: DefensiveKV, view: SlotView, h: int) -> list[float]:
    """Steps 1 to 4 of one head of row 0, without the window."""
    W, is_ours = method.window, method.variant == "corrected"
    n = view.positions_BHN.shape[-1] - W
    heads = [torch.tensor([attention(view, 0, k, *ring(view, 0, q)) for q in (2 * k, 2 * k + 1)]) for k in range(2)]
    whole, half = heads[h], method.kernel // 2  # [g, T, N]
    old = whole[..., :n]
    pooled = torch.stack([old[..., max(0, j - half) : j + half + 1].sum(-1) / method.kernel for j in range(n)], -1)
    pooled *= old.sum(-1, keepdim=True) / pooled.sum(-1, keepdim=True)
    worst = pooled.amax((0, 1))
    values, projection = view.values_BHND[0, :, :n], view.output_projection_HqDM
    assert projection is not None
    r = torch.stack(
        [(values.repeat_interleave(2, 0) @ projection).abs().sum(-1)[2 * k : 2 * k + 2].mean(0) for k in (0, 1)]
    )
    floor = worst[~view.is_protected_BHN[0, h, :n]] if is_ours else worst
    score = worst.clamp(min=float(floor.mean())) * r[h] / (r[h].sum() if is_ours else r.sum(0))
    mean, window = old.mean((0, 1)), float(whole[..., n:].sum(-1).mean())
    if not is_ours:
        mean, window = mean / mean.sum(), float(torch.stack(heads)[..., n - W : n].sum(-1).mean())
    covered, best = 0.0, float(score.max())
    for rank, slot in enumerate(mean.argsort(descending=True).tolist()):
        if (covered if is_ours else covered + float(mean[slot])) >= method.mass - window:
            break
        covered += float(mean[slot])
        score[slot] = best + 1 + n - 1 - rank
    return [float(x) for x in score]


@pytest.mark.parametrize("variant", ["corrected", "paper"])
@pytest.mark.parametrize("mass", [0.0, 0.5, 0.9])
def test_defensivekv_is_its_four_steps(mass: float, variant: Any) -> None:
    method = DefensiveKV(window=8, mass=mass, variant=variant)
    view = field_view(method, 60, (99,))
    view.state["output_norm"].fill_(-1.0)
    found = method.score(view, method.norms(view))
    for h in range(2):
        assert found[0, h, :52].tolist() == pytest.approx(slow_defensive(method, view, h), rel=1e-4)


def test_a_heads_choice_depends_on_another_heads_values_in_the_authors_variant_only() -> None:
    view = field_view(DefensiveKV(window=8), 60, (99,))
    view.state["output_norm"].fill_(-1.0)
    louder = view.values_BHND.clone()
    louder[:, 1, ::2] *= 50
    for variant in ("corrected", "paper"):
        method = DefensiveKV(window=8, mass=0.0, variant=variant)  # type: ignore[arg-type]
        before, after = (
            method.plan(replace(view, values_BHND=v), 30).kept_BHK[0, 0] for v in (view.values_BHND, louder)
        )
        assert torch.equal(before, after) == (variant == "corrected")


def test_a_slots_output_norm_is_taken_once() -> None:
    method = DefensiveKV(window=8)
    view = field_view(method, 60, (99, 140), (20, 20))
    known = view.state["output_norm"] >= 0
    norms = method.norms(view)
    assert torch.equal(norms[known], view.state["output_norm"][known])
    assert view.output_projection_HqDM is not None
    assert_close(norms[1, :, -30:], projected_norms(view.values_BHND[1], view.output_projection_HqDM)[:, -30:])
    plan = method.plan(view, 40)
    assert torch.equal(plan.state["output_norm"], norms.gather(2, plan.kept_BHK))


def test_beacons_do_not_depend_on_pieces_or_padding() -> None:
    method = BeaconKV(beacons=4)
    queries = torch.randn(1, 4, 50, D, generator=torch.Generator().manual_seed(0))
    states = []
    for sizes in ([50], [1] * 50, [21, 3, 26]):
        state, start = method.new_row_state(1, 4, D, queries.device), 0
        for size in sizes:
            observe(method, state, queries[:, :, start : start + size], start)
            start += size
        states.append(state)
    padded = method.new_row_state(2, 4, D, queries.device)
    both = torch.cat([torch.cat([torch.randn(1, 4, 9, D), queries[:, :, :41]], 2), queries])
    positions = torch.stack([torch.arange(50) - 9, torch.arange(50)])
    method.observe(padded, Observed(both, positions.clamp(min=0), positions >= 0, 0, ROTARY))
    rest, valid = torch.arange(41, 50).expand(2, -1), torch.tensor([[True], [False]]).expand(2, 9)
    method.observe(padded, Observed(queries[:, :, 41:].expand(2, -1, -1, -1), rest, valid, 0, ROTARY))
    for state in states[1:] + [{name: tensor[i : i + 1] for name, tensor in padded.items()} for i in range(2)]:
        assert torch.equal(state["beacons"], states[0]["beacons"])
    assert_close(farthest(torch.cat([states[0]["beacons"]] * 2, 2), 4).sum(2), states[0]["beacons"].sum(2))


def test_beaconkv_is_the_largest_attention_of_beacons_now_and_of_the_newest_queries() -> None:
    method = BeaconKV(beacons=4, window=3, recent=6)
    view = field_view(method, 60, (99,))
    found = method.score(view)
    for h in range(2):
        rows: list[list[float]] = []
        for q in (2 * h, 2 * h + 1):
            beacons = ROTARY.rotate(view.row_state["beacons"][0, q], torch.tensor(98))
            rows += attention(view, 0, h, beacons, [98] * 4) + attention(view, 0, h, *ring(view, 0, q))
        assert_close(found[0, h], torch.tensor(rows).amax(0), rtol=1e-4, atol=1e-7)


def test_random_attention_holds_the_prompt_up_to_one_slot() -> None:
    method = RandomAttention(recent=8)
    view = field_view(method, 90, (90,), (40,), H=3)
    kept = method.plan(view, 60).kept_BHK
    assert torch.equal(kept[..., :40], torch.arange(40).expand(1, 3, 40)) and len({*map(tuple, kept[0].tolist())}) == 3
    # 8 newest, 21 of the prompt, 1 at random
    assert torch.equal(method.plan(view, 30).kept_BHK[..., :21], torch.arange(21).expand(1, 3, 21))
    capped = RandomAttention(recent=8, prompt="cap", cap=10, pinned=5).plan(view, 60).kept_BHK
    assert all({*range(10), *range(10, 40, 2), *range(40, 45)} <= set(head) for head in capped[0].tolist())
    shared = RandomAttention(recent=8, shared=True, block=5).plan(view, 60).kept_BHK
    assert torch.equal(shared, shared[:, :1].expand_as(shared))
