"""AMS: segments and their slots against a slow walk through the slots, and what must hold of any segments."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from field_views import attended, attention, field_view, ring

from reasonkv.methods import MethodError
from reasonkv.methods.ams import AMS
from reasonkv.methods.keydiff import KeyDiff
from reasonkv.view import SlotView


def slow_shares(x: list[float], is_out: list[bool]) -> list[float]:
    kept = [0.0 if out else value + 1e-12 for value, out in zip(x, is_out, strict=True)]
    return [value / sum(kept) for value in kept]


def slow_masses(method: AMS, view: SlotView, h: int) -> tuple[list[float], list[float]]:
    """Mass and credit of one head of row 0."""
    N, W, half = view.positions_BHN.shape[-1], method.window, method.kernel // 2
    old = torch.tensor([attention(view, 0, h, *ring(view, 0, q)) for q in (2 * h, 2 * h + 1)]).mean((0, 1))[: N - W]
    padded = [0.0] * half + old.tolist() + [0.0] * half
    pooled = [sum(padded[j : j + method.kernel]) / method.kernel for j in range(N - W)]
    is_out = view.is_protected_BHN[0, h].tolist()
    now = slow_shares(pooled + [max(pooled)] * W, is_out)
    before = view.state["credit"][0, h].tolist()
    credit = [method.decay * old + (1 - method.decay) * new for old, new in zip(before, now, strict=True)]
    both = zip(now, slow_shares(credit, is_out), strict=True)
    return slow_shares([method.mix * new + (1 - method.mix) * old for new, old in both], is_out), credit


def slow_segments(method: AMS, mass: list[float], is_out: list[bool]) -> list[list[int]]:
    """Cut at every `mass`, cut what is too long, then join what is too short to what follows."""
    slots = [slot for slot in range(len(mass)) if not is_out[slot]]
    pieces: list[list[int]] = [[]]
    total, reached = 0.0, 0
    for slot in slots:
        total += mass[slot]
        if math.floor(total / method.mass) > reached and reached + 1 < math.ceil(1 / method.mass):
            reached = min(math.floor(total / method.mass), math.ceil(1 / method.mass) - 1)
            if pieces[-1]:
                pieces.append([])
        pieces[-1].append(slot)
    short = [piece[i : i + method.most] for piece in pieces for i in range(0, len(piece), method.most)]
    found: list[list[int]] = []
    for piece in short:
        if found and len(found[-1]) < method.least:
            found[-1].extend(piece)
        else:
            found.append(list(piece))
    return found


def slow_kept(method: AMS, view: SlotView, keep: int, h: int) -> list[int]:
    is_out = view.is_protected_BHN[0, h].tolist()
    mass, _ = slow_masses(method, view, h)
    segments = slow_segments(method, mass, is_out)
    score = method.scorer.score(view)[0, h].tolist()
    kept = [slot for slot in range(len(mass)) if is_out[slot]]
    free = keep - len(kept)
    floor = max(f for f in range(method.floor + 1) if sum(min(f, len(one)) for one in segments) <= free)
    given = [min(floor, len(one)) for one in segments]
    while sum(given) < free:  # Webster: the next slot goes where the quotient is largest
        open_to = [i for i, one in enumerate(segments) if given[i] < len(one)]
        given[max(open_to, key=lambda i: sum(mass[s] for s in segments[i]) / (given[i] - floor + 0.5))] += 1
    for count, one in zip(given, segments, strict=True):
        kept += sorted(one, key=lambda slot: (-score[slot], -slot))[:count]
    return sorted(kept)


@pytest.mark.parametrize(
    "method",
    [
        AMS("keydiff", window=8, least=5, floor=2),
        AMS("keydiff", window=8, least=2, floor=3, mass=0.1),
        AMS("keydiff", window=8, least=1, floor=1, most=4, mass=0.3),
        AMS("keydiff", window=8, least=4, floor=0, mass=0.05, mix=0.2),
        AMS("keydiff", window=8, least=3, floor=40, mass=0.05),
    ],
    ids=lambda method: method.spec(),
)
def test_ams_divides_slots_among_segments_by_their_attention(method: AMS) -> None:
    for seed in range(3):
        view = field_view(method, 90, (130,), keep_prompt=seed == 1, seed=seed)
        plan = method.plan(view, 50)
        for h in range(2):
            mass, credit = slow_masses(method, view, h)
            segments = method.segments(torch.tensor([[mass]]), view.is_protected_BHN[:, h : h + 1])[0, 0].tolist()
            for number, slots in enumerate(slow_segments(method, mass, view.is_protected_BHN[0, h].tolist())):
                assert {segments[slot] for slot in slots} == {number}
            assert plan.kept_BHK[0, h].tolist() == slow_kept(method, view, 50, h)
            kept = [credit[slot] for slot in plan.kept_BHK[0, h].tolist()]
            assert plan.state["credit"][0, h].tolist() == pytest.approx(kept, rel=1e-4, abs=1e-9)


def test_ams_by_hand() -> None:
    """Eight slots before the window have masses .4, .1, .1, .1, .1, .1, .05 and .05 of what may be evicted."""
    method = AMS("keydiff", window=1, kernel=1, mass=0.5, least=1, floor=1)
    mass = torch.tensor([0.4, 0.1, 0.1, 0.1, 0.1, 0.1, 0.05, 0.05, 0.0])[None, None]
    is_out = torch.arange(9)[None, None] == 8
    assert method.segments(mass, is_out)[0, 0].tolist() == [0, 1, 1, 1, 1, 1, 1, 1, 9]
    assert AMS("keydiff", mass=0.5, least=2).segments(mass, is_out)[0, 0].tolist() == [0] * 8 + [9]
    # floors of 1, then .4 and .6 for 3 slots: quotients .8 (none left) and 1.2, .4, .24
    score = torch.tensor([0.0, 7, 1, 2, 3, 4, 5, 6, 0])[None, None]
    largest = method.order(score, mass, is_out, 6)[0, 0, :8].topk(5).indices
    assert sorted(largest.tolist()) == [0, 1, 5, 6, 7]


def test_floors_that_just_fit_leave_nothing_to_attention() -> None:
    method = AMS("keydiff", mass=0.01, least=3, floor=2)
    mass = torch.tensor([0.3, 0.3, 0.28, 0.02, 0.02, 0.02, 0.02, 0.02, 0.02])[None, None]
    is_out = torch.zeros(1, 1, 9, dtype=torch.bool)
    assert method.segments(mass, is_out)[0, 0].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    score = torch.arange(9.0)[None, None]
    for keep, kept in ((6, [1, 2, 4, 5, 7, 8]), (5, [0, 1, 2, 5, 8])):
        assert sorted(method.order(score, mass, is_out, keep)[0, 0].topk(keep).indices.tolist()) == kept


def test_one_segment_is_the_base_method() -> None:
    method = AMS("keydiff", window=8)
    view = field_view(method, 60, (99,))
    assert torch.equal(method.plan(view, 30).kept_BHK, KeyDiff().plan(view, 30).kept_BHK)


def test_a_region_without_attention_keeps_its_floor() -> None:
    logits = torch.full((2, 40), -40.0)
    logits[:, :10] = 0.0
    view = attended(logits, recent=2)
    view = replace(view, state={"credit": torch.zeros(1, 1, 40)})
    method = AMS("snapkv:window=2;kernel=1", window=2, kernel=1, mass=0.2, least=10, floor=3)
    kept = method.plan(view, 20).kept_BHK[0, 0]
    assert int((kept < 10).sum()) == 10
    assert int(((kept >= 10) & (kept < 38)).sum()) == 8


def test_a_segment_has_no_more_slots_at_least_than_at_most() -> None:
    with pytest.raises(MethodError, match="ams: least must not be above most, unlike 64 and 8"):
        AMS(most=8)
