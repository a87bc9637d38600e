"""CASK's diagnostics on a real trace: what they must be equal to, and between which bounds they lie."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cask_views import DATA, Recorded
from transformers import Qwen3ForCausalLM

from reasonkv import Budget
from reasonkv.calibration import import_pt
from reasonkv.evaluate.chunks import TraceRow, feed
from reasonkv.evaluate.diagnostics import MEASURES, CaskDiagnostics, CaskEvent, trace_means
from reasonkv.evaluate.reference import FullAttention
from reasonkv.methods.cask import CaskPlan
from reasonkv.plan import Plan
from reasonkv.runtimes.transformers import CompressedCache
from reasonkv.view import SlotView

IDS = next(case for case in Recorded().json["replay"] if case["kind"] == "cask")["tokens"]


@pytest.fixture(
    scope="module",
    params=["cask:similarity=0.5", "cask:fold=neighbours,per_layer=true", "cask:variant=paper", "cask:fold=none"],
)
def measured(request: pytest.FixtureRequest) -> tuple[str, list[CaskEvent]]:
    model = Qwen3ForCausalLM.from_pretrained(DATA / "tiny_qwen3").eval()
    ids = Recorded().read(IDS).view(-1).long()
    rows = [TraceRow(ids[:40], ids[40:260]), TraceRow(ids[5:30], ids[30:200])]
    seen = CaskDiagnostics(FullAttention.collect(model, rows))
    with (
        torch.no_grad(),
        CompressedCache(
            model,
            request.param,
            Budget(64, interval=32, recent=8, prompt="count"),
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
    for found in (event.measures for event in events):
        evicted, lost, absolute = (found[name] for name in ("evicted_mass", "lost_mass", "lost_mass_absolute"))
        assert evicted is None or -1e-5 <= evicted <= 1
        if lost is not None:
            assert absolute is not None
            assert abs(lost) <= absolute + 1e-6
        for ratio in (found["rho_core"], found["rho_rep"]):
            assert ratio is None or 0 <= ratio <= 1 + 1e-6
        if spec == "cask:fold=none":
            assert lost is None or lost == pytest.approx(0, abs=1e-6)
            assert found["kappa_dispersion"] is None
    assert events[0].event == 0
    assert set(trace_means(events)) == set(MEASURES)
    assert trace_means(events)["rho_rep"] is not None


class ByHand:
    """The same measures from lists of tokens per slot, one event of one row and layer at a time."""

    def __init__(self, reference: FullAttention) -> None:
        self.reference = reference
        self.held: dict[tuple[int, int], list[list[int]]] = {}
        self.found: dict[tuple[int, int], list[dict[str, Any]]] = {}

    def __call__(self, layer: int, rows: list[int], view: SlotView, plan: Plan) -> None:
        assert isinstance(plan, CaskPlan)
        for place, row in enumerate(rows):
            decided, length = plan.rows[place], int(view.length_B[place])
            before = self.held.get((layer, row), [])
            seen = max((max(tokens) for tokens in before), default=-1) + 1
            before = before + [[token] for token in range(seen, length)]
            kept_slots, target = plan.kept_BHK[place, 0].tolist(), decided.target_N.tolist()
            after: list[list[int]] = [[] for _ in kept_slots]
            for tokens, slot in zip(before, target, strict=True):
                if slot >= 0:
                    after[kept_slots.index(slot)] += tokens
            self.held[layer, row] = after
            keys = view.rotary.unrotate(view.keys_BHND[place].double(), view.positions_BHN[place])  # type: ignore[union-attr]
            w = view.rotary.inv_freq.double()  # type: ignore[union-attr]
            kappa = torch.exp(1j * w[:, None] * 2.0 ** torch.arange(17).double()).mean(1).abs()
            parts = []  # (source tokens, distance, norm) of every group
            for slot, kept in enumerate(kept_slots):
                members = [m for m, other in enumerate(target) if other == kept]
                if len(members) == 1:
                    continue
                weights = torch.tensor([float(plan.merge.value_weights_BHN[place, 0, m]) for m in members]).double()  # type: ignore[union-attr]
                weights /= weights.sum()

                def norm(x: torch.Tensor, kappa: torch.Tensor = kappa) -> torch.Tensor:
                    return (kappa * torch.hypot(x[..., : len(kappa)], x[..., len(kappa) :])).sum(-1)

                distance = sum(
                    a * norm(keys[:, m] - keys[:, kept]).mean() for a, m in zip(weights, members, strict=True)
                )
                size = sum(a * norm(keys[:, m]).mean() for a, m in zip(weights, members, strict=True))
                parts.append((len(after[slot]), float(distance), float(size)))
            self.found.setdefault((row, int(view.event_B[place])), []).append(
                {
                    "layer": layer, "length": length, "before": before, "after": after, "parts": parts,
                    "reps": [int(view.positions_BHN[place, 0, kept]) for kept in kept_slots],
                    "candidates": np.flatnonzero(decided.candidates_N).tolist(), "core": np.flatnonzero(decided.core_N),
                    "kept": set(kept_slots),
                    "logs": plan.log_mass_BHK is not None or "log_mass" in view.state,
                }
            )  # fmt: skip

    def event(self, row: int, event: int, until: int) -> dict[str, float | None]:
        lost, absolute, evicted = [], [], []
        slots = torch.zeros(0)
        layers = self.found[row, event]
        for one in layers:
            mass = self.reference.received(one["layer"], row, one["length"], until)[:, : one["length"]].double()
            total = mass.sum(1)
            gaps = torch.stack(
                [
                    mass[:, tokens].sum(1) - (len(tokens) if one["logs"] else 1) * mass[:, rep]
                    for tokens, rep in zip(one["after"], one["reps"], strict=True)
                ]
            )
            lost.append(float((gaps.sum(0) / total).mean()))
            absolute.append(float((gaps.abs().sum(0) / total).mean()))
            alive = sum(mass[:, tokens].sum(1) for tokens in one["after"])
            evicted.append(float((1 - alive / total).mean()))
            per_slot = torch.stack([mass[:, tokens].sum(1).mean() for tokens in one["before"]])
            slots = per_slot if len(slots) == 0 else slots + per_slot
        first = layers[0]

        def ratio(chosen: list[int]) -> float | None:
            best = sorted((float(slots[slot]) for slot in first["candidates"]), reverse=True)[: len(chosen)]
            return sum(float(slots[slot]) for slot in chosen) / sum(best) if chosen else None

        def dispersion(part: int) -> float:
            means = [sum(p[0] * p[part] for p in one["parts"]) / sum(p[0] for p in one["parts"]) for one in layers]
            return sum(means) / len(means)

        return {
            "lost_mass": sum(lost) / len(lost),
            "lost_mass_absolute": sum(absolute) / len(absolute),
            "evicted_mass": sum(evicted) / len(evicted),
            "rho_core": ratio(list(first["core"])),
            "rho_rep": ratio([slot for slot in first["candidates"] if slot in first["kept"]]),
            "kappa_dispersion": dispersion(1) if first["parts"] else None,
            "kappa_dispersion_relative": dispersion(1) / dispersion(2) if first["parts"] else None,
        }


@pytest.mark.parametrize("spec", ["cask:similarity=0.5", "cask:fold=neighbours", "cask:variant=paper"])
def test_every_measure_equals_its_definition_written_out(spec: str) -> None:
    model = Qwen3ForCausalLM.from_pretrained(DATA / "tiny_qwen3").eval()
    ids = Recorded().read(IDS).view(-1).long()
    rows = [TraceRow(ids[:40], ids[40:200]), TraceRow(ids[5:30], ids[30:180])]
    reference = FullAttention.collect(model, rows)
    ours, by_hand = CaskDiagnostics(reference), ByHand(reference)

    def both(layer: int, at: list[int], view: SlotView, plan: Plan) -> None:
        ours(layer, at, view, plan)
        by_hand(layer, at, view, plan)

    options: dict[str, Any] = {"calibration": import_pt(DATA / "tiny_stats.pt"), "prompt_lengths": [40, 25]}
    with (
        torch.no_grad(),
        CompressedCache(
            model, spec, Budget(64, interval=32, recent=8, prompt="count"), observer=both, **options
        ) as cache,
    ):
        for _ in feed(model, cache, rows, distances=cache.tokens_to_next_event, score=False):
            pass
    compared = 0
    for event in ours.events():
        wanted = by_hand.event(event.row, event.event, event.until)
        for name, value in wanted.items():
            found = event.measures[name]
            assert (found is None) == (value is None), name
            if value is not None:
                assert found == pytest.approx(value, abs=1e-5), name
                compared += 1
    assert compared > 20
