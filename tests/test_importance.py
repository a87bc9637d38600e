"""Importance sampling: priorities written out, and sums over slots that are right on average."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from slot_views import random_view

from reasonkv import MethodError, SlotView, get_method

SPEC = "importance:base=snapkv:window=2;kernel=1,cap={}"
SLOTS, KEEP = 40, 14


def view_of(rows: int, log_mass: float = 0.0) -> SlotView:
    view = random_view(B=rows, H=2, N=SLOTS, D=16, group=2, queries=2, dtype=torch.float64)
    is_protected = torch.zeros_like(view.is_protected_BHN)
    is_protected[..., [0, 1, -2, -1]] = True
    mass = torch.full(view.positions_BHN.shape, log_mass, dtype=torch.float64)
    return replace(view, is_protected_BHN=is_protected, state={"log_mass": mass})


@pytest.mark.parametrize("cap", [50.0, 0.5])
def test_a_plan_is_the_rule_written_out(cap: float) -> None:
    view, method = view_of(rows=3, log_mass=0.25), get_method(SPEC.format(cap))
    plan, sizes, uniform = method.plan(view, KEEP), method.scorer.score(view), view.uniform_BHN()
    for b in range(3):
        for h in range(2):
            protected = view.is_protected_BHN[b, h].tolist()
            priority = [
                float("inf") if protected[n] else float(sizes[b, h, n] / uniform[b, h, n]) for n in range(SLOTS)
            ]
            order = sorted(range(SLOTS), key=lambda n: -priority[n])
            kept, first_gone = sorted(order[:KEEP]), priority[order[KEEP]]
            assert plan.kept_BHK[b, h].tolist() == kept
            for place, slot in enumerate(kept):
                factor = 1.0 if protected[slot] else max(1.0, first_gone / float(sizes[b, h, slot]))
                expected = min(0.25 + torch.tensor(factor).log().item(), cap)
                assert plan.log_mass_BHK[b, h, place].item() == pytest.approx(expected, rel=1e-5)


def test_the_sum_over_any_slots_is_right_on_average() -> None:
    rows = 4_000
    view = view_of(rows=1)
    wide = {name: getattr(view, name).expand(rows, -1, -1) for name in ("positions_BHN", "is_protected_BHN")}
    wide |= {
        name: getattr(view, name).expand(rows, -1, -1, -1) for name in ("keys_BHND", "values_BHND", "queries_BHqTD")
    }
    many = replace(
        view, **wide, rows=tuple(range(rows)), row_seed_B=torch.arange(rows), event_B=view.event_B.expand(rows),
        length_B=view.length_B.expand(rows), query_positions_BT=view.query_positions_BT.expand(rows, -1),
        state={"log_mass": torch.zeros(rows, 2, SLOTS, dtype=torch.float64)},
    )  # fmt: skip
    method = get_method(SPEC.format(50.0))
    plan, sizes = method.plan(many, KEEP), method.scorer.score(view)[0]
    kept = sizes.expand(rows, -1, -1).gather(2, plan.kept_BHK) * plan.log_mass_BHK.exp()
    found = torch.zeros(rows, 2, SLOTS, dtype=torch.float64).scatter_(2, plan.kept_BHK, kept.double())
    for some in (slice(2, 20), slice(20, 38), slice(2, 38, 5)):
        sums, truth = found[..., some].sum(-1), sizes[:, some].sum(-1)
        assert ((sums.mean(0) - truth).abs() < 4 * sums.std(0) / rows**0.5).all()
    unweighted = sizes.expand(rows, -1, -1).gather(2, plan.kept_BHK).sum(-1).mean(0)
    assert (unweighted < 0.95 * sizes.sum(-1)).all()  # the weights are what makes it right


def test_a_base_whose_scores_are_no_attention_is_refused() -> None:
    with pytest.raises(MethodError, match="base must be expected or snapkv, not keydiff"):
        get_method("importance:base=keydiff")
