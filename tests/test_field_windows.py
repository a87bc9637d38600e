"""Methods that ask the newest queries: each formula against a slow explicit implementation, and a small case."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from field_views import attended, attention, field_view, ring
from torch import Tensor
from torch.testing import assert_close

from reasonkv.methods.base import Method
from reasonkv.methods.cake import CAKE
from reasonkv.methods.nacl import NACL
from reasonkv.methods.rpc import RPC
from reasonkv.methods.scissorhands import Scissorhands
from reasonkv.view import SlotView


def of_group(view: SlotView, h: int) -> Tensor:
    """Attention [g, T, N] of the query heads of one KV head of row 0, one query and one slot at a time."""
    return torch.tensor([attention(view, 0, h, *ring(view, 0, q)) for q in (2 * h, 2 * h + 1)])


# --------------------------------------------------------------------------------------------------------------- cake


@pytest.mark.parametrize("gamma", [0.0, 200.0])
def test_cake_is_mean_and_variance_over_the_window(gamma: float) -> None:
    method = CAKE(window=8, gamma=gamma)
    view = field_view(method, 60, (99,))
    found = method.score(view)
    for h in range(2):
        old = of_group(view, h)[..., :52].double()
        mean = old.sum(1) / 8
        variance = (old - mean[:, None]).square().sum(1) / 7
        raw = [0.0, 0.0, *(mean + gamma * variance).mean(0).tolist(), 0.0, 0.0]
        assert found[0, h, :52].tolist() == pytest.approx([sum(raw[j : j + 5]) / 5 for j in range(52)], rel=1e-4)


def test_cake_prefers_the_slot_whose_attention_changes() -> None:
    # attention to slots 0 and 1 is the same on average: .5 and .5, or 1 and 0
    logits = torch.full((2, 4), -40.0)
    logits[:, 0], logits[0, 1], logits[1, 2] = 0.0, 0.0, 0.0
    view = attended(logits)
    assert CAKE(window=2, kernel=1, gamma=0.0).score(view)[0, 0, :2].tolist() == pytest.approx([0.5, 0.25])
    # variance of slot 0: none; of slot 1: (.25^2 + .25^2) / 1
    found = CAKE(window=2, kernel=1, gamma=200.0).score(view)[0, 0, :2]
    assert found.tolist() == pytest.approx([0.5, 0.25 + 200 * 0.125])
    assert bool(CAKE(window=1).score(field_view(CAKE(window=1), 60, (99,))).isfinite().all())


# --------------------------------------------------------------------------------------------------------------- nacl


def test_nacl_takes_the_best_by_proxies_and_draws_the_rest_in_proportion() -> None:
    method, keep = NACL(window=8, random_share=0.5), 40
    view = field_view(method, 90, (130,))
    protected = view.is_protected_BHN[0]
    by_chance = (keep - int(protected[0].sum())) // 2
    kept = method.plan(view, keep).kept_BHK[0].tolist()
    drawn = [set(row) for row in method.plan(replace(view, seed=1), keep).kept_BHK[0].tolist()]
    for h in range(2):
        votes = of_group(view, h).sum(1).mean(0).masked_fill(protected[h], float("inf"))
        best = set(votes.argsort(descending=True)[: keep - by_chance].tolist())
        assert best <= set(kept[h]) and best <= drawn[h]
        assert drawn[h] != set(kept[h])
    none = NACL(window=8, random_share=0.0).plan(view, keep).kept_BHK
    assert torch.equal(none, NACL(window=8, random_share=0.0).plan(replace(view, seed=1), keep).kept_BHK)


def test_nacls_chance_follows_the_softmax_of_scores() -> None:
    """Slot 0 is the best; of slots 1 to 4 one is drawn: with scores 2, 0, 0, 0 the first has e^2 / (e^2 + 3)."""
    logits = torch.full((4, 8), -40.0)
    logits[:2, 0], logits[2:, 1] = 5.0, 0.0
    logits[2:, 0] = -40.0
    view = attended(logits, recent=3)
    view = replace(view, is_protected_BHN=view.is_protected_BHN.clone())
    method, hits = NACL(window=4, random_share=0.5), 0
    for seed in range(400):
        kept = method.plan(replace(view, seed=seed), 5).kept_BHK[0, 0].tolist()
        assert len(set(kept) & {0, 1}) >= 1 and set(kept) >= {5, 6, 7}
        hits += {0, 1} <= set(kept)
    assert hits / 400 == pytest.approx(2.718281828**2 / (2.718281828**2 + 3), abs=0.07)


# ------------------------------------------------------------------------------------------------------- scissorhands


def test_scissorhands_counts_the_queries_that_passed_a_slot_over() -> None:
    method = Scissorhands(window=24)
    view = field_view(method, 60, (99,), keep_prompt=True)
    found = method.score(view)
    positions, protected = view.positions_BHN[0], view.is_protected_BHN[0]
    for h in range(2):
        lead = int(protected[h].long().argmin())  # the prompt's slots and sinks do not count in the average
        counts = [0] * 60
        for q in (2 * h, 2 * h + 1):
            queries, at = ring(view, 0, q)
            for row, position in zip(attention(view, 0, h, queries, at), at, strict=True):
                seen = [slot for slot in range(60) if int(positions[h, slot]) <= position]
                average = sum(row[slot] for slot in seen if slot >= lead) / sum(slot >= lead for slot in seen)
                for slot in seen:
                    counts[slot] += row[slot] < average
        assert (-found[0, h]).tolist() == counts


def test_scissorhands_by_hand() -> None:
    # two queries see 4 and 5 slots; above average are slots 0 and 1 for the first, 0 alone for the second
    logits = torch.tensor([[2.0, 1.5, 0.0, 0.0, 0.0], [3.0, 0.0, 0.0, 0.0, 0.0]])
    assert Scissorhands(window=2).score(attended(logits))[0, 0].tolist() == [0, -1, -2, -2, -1]


# ---------------------------------------------------------------------------------------------------------------- rpc


@pytest.mark.parametrize("method", [RPC(window=8), RPC(window=8, heads="group", pooling="max")], ids=["all", "group"])
def test_rpc_attends_among_the_slots_that_may_be_evicted(method: RPC) -> None:
    view = field_view(method, 60, (99,), keep_prompt=True)
    found, is_open = method.score(view), ~view.is_protected_BHN[0, :, :52]
    votes = torch.zeros(2, 52, dtype=torch.float64)
    for q in range(4):
        queries, _ = ring(view, 0, q)
        for query in queries.double():
            weights = (view.keys_BHND[0, q // 2, :52].double() @ query * view.scaling).exp() * is_open[q // 2]
            votes[q // 2] += weights / weights.sum() / 2
    if method.heads == "all":
        votes = votes.mean(0).expand(2, -1)
    for h in range(2):
        raw = [0.0] * 3 + votes[h].tolist() + [0.0] * 3
        pooled = [max(raw[j : j + 7]) if method.pooling == "max" else sum(raw[j : j + 7]) / 7 for j in range(52)]
        assert_close(found[0, h, :52].double(), torch.tensor(pooled, dtype=torch.float64), rtol=1e-4, atol=1e-6)


def test_a_sink_that_draws_all_attention_changes_nothing_for_rpc() -> None:
    method: Method = RPC(window=8)
    view = field_view(method, 60, (99,))
    louder = view.keys_BHND.clone()
    louder[:, :, 0] *= 30  # a sink, which is protected
    assert torch.equal(method.plan(view, 30).kept_BHK, method.plan(replace(view, keys_BHND=louder), 30).kept_BHK)
