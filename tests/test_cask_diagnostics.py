"""CASK's diagnostics on a real trace: what they must be equal to, and between which bounds they lie."""

from __future__ import annotations

import json

import pytest
import torch
from cask_views import DATA, Recorded
from transformers import Qwen3ForCausalLM

from reasonkv import Budget
from reasonkv.calibration import import_pt
from reasonkv.evaluate.cask_diagnostics import MEASURES, CaskDiagnostics, CaskEvent, trace_means
from reasonkv.evaluate.pieces import Row, feed
from reasonkv.evaluate.reference import ReferenceAttention
from reasonkv.runtimes.transformers import CompressedCache

IDS = next(case for case in Recorded().json["replay"] if case["kind"] == "cask")["tokens"]


@pytest.fixture(
    scope="module",
    params=["cask:similarity=0.5", "cask:fold=neighbours,per_layer=true", "cask:profile=paper", "cask:fold=none"],
)
def measured(request: pytest.FixtureRequest) -> tuple[str, list[CaskEvent]]:
    model = Qwen3ForCausalLM.from_pretrained(DATA / "tiny_qwen3").eval()
    ids = Recorded().read(IDS).view(-1).long()
    rows = [Row(ids[:40], ids[40:260]), Row(ids[5:30], ids[30:200])]
    seen = CaskDiagnostics(ReferenceAttention.collect(model, rows))
    with (
        torch.no_grad(),
        CompressedCache(
            model,
            request.param,
            Budget(64, interval=32, recent=8),
            observer=seen,
            calibration=import_pt(DATA / "tiny_stats.pt"),
            prompt_lengths=[len(row.prompt_P) for row in rows],
        ) as cache,
    ):
        for _ in feed(model, cache, rows, distances=cache.tokens_to_next_event, score=False):
            pass
        events = seen.events()
        assert len(events) == sum(row.events for row in cache.stats().rows)
    return request.param, events


def test_intervals_follow_each_other_to_the_end_of_the_trace(measured: tuple[str, list[CaskEvent]]) -> None:
    for row, end in ((0, 259), (1, 194)):
        own = [event for event in measured[1] if event.row == row]
        assert [event.event for event in own] == list(range(len(own)))
        assert [event.until for event in own[:-1]] == [event.length for event in own[1:]]
        assert own[-1].until == end


def test_masses_are_parts_and_ratios_at_most_one(measured: tuple[str, list[CaskEvent]]) -> None:
    spec, events = measured
    for event in events:
        assert event.evicted_mass is None or -1e-5 <= event.evicted_mass <= 1
        if event.lost_mass is not None:
            assert event.lost_mass_absolute is not None
            assert abs(event.lost_mass) <= event.lost_mass_absolute + 1e-6
        for ratio in (event.rho_core, event.rho_rep):
            assert ratio is None or 0 <= ratio <= 1 + 1e-6
        if spec == "cask:fold=none":
            assert event.lost_mass is None or event.lost_mass == pytest.approx(0, abs=1e-6)
            assert event.kappa_dispersion is None
    assert json.loads(json.dumps([event.to_json() for event in events]))[0]["event"] == 0
    assert set(trace_means(events)) == set(MEASURES)
    assert trace_means(events)["rho_rep"] is not None
