"""D2O: what H2O evicts is merged into the most similar kept slot, above a threshold that moves."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from field_views import attended, field_view
from torch import Tensor

from reasonkv.methods.d2o import D2O
from reasonkv.methods.h2o import H2O
from reasonkv.view import SlotView


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a.double() @ b.double() / (a.double().norm() * b.double().norm()))


def slow_groups(method: D2O, view: SlotView, kept: list[int], h: int) -> tuple[float, dict[int, dict[int, float]]]:
    """The threshold of one head of row 0, and the weights of every kept slot's group."""
    keys = view.keys_BHND[0, h]
    nearest = {}
    for slot in sorted(set(range(len(keys))) - set(kept)):
        nearest[slot] = max((cosine(keys[slot], keys[other]), -other) for other in kept)
    mean = sum(u for u, _ in nearest.values()) / len(nearest)
    before = float(view.state["threshold"][0, h].max())
    threshold = mean if before == -2 else method.beta * before + (1 - method.beta) * mean
    groups = {slot: {slot: 1.0} for slot in kept}
    for slot, (u, other) in nearest.items():
        if u >= threshold:
            groups[-other][slot] = u
    for slot, group in groups.items():
        raw = {s: math.exp(u) for s, u in group.items()} if method.weights == "exp" else group
        total = sum(raw.values()) if method.weights == "exp" else len(raw)
        groups[slot] = {s: value / total for s, value in raw.items()}
    return threshold, groups


@pytest.mark.parametrize("weights", ["exp", "cosine"])
@pytest.mark.parametrize("is_first", [True, False])
def test_similar_slots_are_merged_and_the_others_dropped(weights: Any, is_first: bool) -> None:
    method = D2O(window=16, weights=weights, beta=0.7)
    view = field_view(method, 60, (99,))
    view.state["threshold"].fill_(-2.0 if is_first else 0.65)
    plan = method.plan(view, 30)
    assert torch.equal(plan.kept_BHK, H2O(window=16).plan(view, 30).kept_BHK)
    assert plan.merge is not None
    into, found = plan.merge.into_BHN[0], plan.merge.key_weights_BHN[0]
    assert torch.equal(plan.merge.value_weights_BHN[0], found)
    for h in range(2):
        kept = plan.kept_BHK[0, h].tolist()
        threshold, groups = slow_groups(method, view, kept, h)
        assert plan.state["threshold"][0, h].tolist() == pytest.approx([threshold] * 30, rel=1e-5)
        members = {s: other for other, group in groups.items() for s in group}
        assert 30 < len(members) < 60  # some are merged, some dropped
        for slot in range(60):
            target = int(into[h, slot])
            assert (kept[target] if target >= 0 else None) == members.get(slot)
            weight = groups[members[slot]][slot] if slot in members else 0.0
            assert float(found[h, slot]) == pytest.approx(weight, rel=1e-5)


def test_d2o_by_hand() -> None:
    """Slot 0 is the heavy hitter, 3 the newest; of slots 1 and 2 the first is like slot 0."""
    view = attended(torch.tensor([[3.0, 0.0, 0.0, 0.0]]))
    keys = torch.zeros_like(view.keys_BHND)
    keys[0, 0, :, :2] = torch.tensor([[1.0, 0.0], [0.6, 0.8], [-1.0, 0.0], [0.0, -1.0]])
    state = {"attention": torch.tensor([2.0, 1.0, 1.0, -1.0]), "threshold": torch.full((4,), -2.0)}
    view = replace(
        view, keys_BHND=keys, state={name: x[None, None] for name, x in state.items()},
        row_state=H2O().new_row_state(1, 1, 16, keys.device),
    )  # fmt: skip
    plan = D2O(window=1).plan(view, 2)
    assert plan.kept_BHK[0, 0].tolist() == [0, 3]
    # u is .6 for slot 1 (with slot 0) and 0 for slot 2 (with slot 3): the mean is .3
    assert plan.state["threshold"][0, 0].tolist() == pytest.approx([0.3, 0.3])
    assert plan.merge is not None and plan.merge.into_BHN[0, 0].tolist() == [0, 0, -1, 1]
    share = math.exp(0.6) / (math.exp(0.6) + math.e)
    assert plan.merge.key_weights_BHN[0, 0].tolist() == pytest.approx([1 - share, share, 0.0, 1.0])
