"""CASK's paper profile against the reference's recorded events and replays."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from cask_views import DATA, Recorded
from torch.testing import assert_close
from transformers import PreTrainedModel, Qwen3ForCausalLM

from reasonkv import Budget
from reasonkv.calibration import import_pt
from reasonkv.compaction import compact_pair
from reasonkv.methods.cask import CASK
from reasonkv.methods.cask_stages import plan_row
from reasonkv.runtimes.transformers import CompressedCache

REFERENCE = Recorded()
CASES = [pytest.param(case, id=case["name"]) for case in REFERENCE.json["cask"]]
REPLAYS = [
    pytest.param(case, id=f"{case['cfg']['kv_budget']}-{len(case['cfg'])}")
    for case in REFERENCE.json["replay"]
    if case["kind"] == "cask"
]


def method_of(cfg: dict[str, Any]) -> CASK:
    return CASK(
        profile="paper",
        prompt_stage="evict" if cfg.get("count_prompt_tokens") else "pin",
        window=cfg["recent_window_size"],
        coverage=cfg.get("prefix_coverage_ratio", 0.0625),
        scores="z" if cfg.get("normalize_scores") else "raw",
        representative=cfg.get("representative_mode", "score_max_source"),
        fold="neighbours" if cfg.get("decode_merge_enabled", True) else "none",
        promotion=cfg.get("promotion_score_ratio", 0.0),
        mass_gate=cfg.get("merge_score_mass_ratio_threshold", 0.0),
    )


@pytest.mark.parametrize("case", CASES)
def test_the_paper_profile_equals_the_reference_over_two_events(case: dict[str, Any]) -> None:
    method, keep = method_of(case["cfg"]), case["cfg"]["budget"]
    generator = torch.Generator().manual_seed(0)  # the reference's tie-breaking noise, stage 1 alone draws it
    for event, name in enumerate(("", "_2")):
        views, after, wanted = REFERENCE.views(case, event), case[f"after{name}"], case[f"plan{name}"]
        [row] = method.row_slots(views, keep)
        prefix = row.prefix
        assert prefix == case[f"before{name}"]["prefix_length"]
        evicts = after["prefix_length"] < prefix
        noise = 1e-6 * torch.rand(len(row.scores_MN), prefix, generator=generator) if evicts else None
        decided = plan_row(replace(row, noise_MP=noise), keep, method.shares, method.rules)
        plans = method.plans_of(views, [decided])
        plans[0].check((1, 2, len(row.protected_N)), keep, views[0].is_protected_BHN)

        # core and relaxations, by slot after stage 1
        shift = prefix - after["prefix_length"]
        assert decided.consolidation is not None
        assert [slot - shift for slot in decided.core] == wanted["core_indices"]
        assert decided.consolidation.phases_relaxed == wanted["phase_boundary_relaxed"]
        assert decided.consolidation.mass_relaxed == wanted["score_mass_gate_relaxed"]
        promoted = [decided.candidates[i] - shift for i in decided.consolidation.promoted]
        assert promoted == sorted(wanted["promoted_core_indices"])
        # groups, in the order of their slots
        groups = sorted(wanted["candidate_descriptors"], key=lambda group: group["source_indices"][0])
        found = decided.consolidation.groups
        assert len(found) == len(groups)
        for group, descriptor in zip(found, groups, strict=True):
            sources = [slot - shift for slot in decided.candidates[group.first : group.last + 1]]
            assert sources == descriptor["source_indices"]
            assert group.count == descriptor["count"]
            assert group.support == pytest.approx(descriptor["support_weight"], rel=1e-5)
            assert group.score_mass == pytest.approx(descriptor["score_mass"], rel=1e-5, abs=1e-4)
        # positions, counts, spans and phases of all slots
        kept, into = torch.from_numpy(decided.kept_K), torch.from_numpy(decided.into_N)
        assert views[0].positions_BHN[0, 0][kept].tolist() == after["cache_positions"]
        assert decided.counts_K.tolist() == after["merge_counts"]
        spans = [
            [int(row.starts_N[decided.into_N == slot].min()), int(row.ends_N[decided.into_N == slot].max())]
            for slot in range(keep)
        ]
        assert spans == after["merge_spans"]
        first = [int(np.flatnonzero(decided.into_N == slot)[0]) for slot in range(keep)]
        assert row.phases_N[first].tolist() == after["phase_ids"]
        assert set(into.tolist()) <= {-1, *range(keep)}
        for view, plan, (keys, values) in zip(views, plans, case[f"pkv_after{name}"], strict=True):
            pair = compact_pair(view.keys_BHND, view.values_BHND, [0], plan, view.positions_BHN)
            if method.representative == "score_max_source":
                assert torch.equal(pair[0], REFERENCE.read(keys))
            else:
                assert_close(pair[0], REFERENCE.read(keys), atol=1e-5, rtol=0)
            assert_close(pair[1], REFERENCE.read(values), atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def reference_model() -> PreTrainedModel:
    return Qwen3ForCausalLM.from_pretrained(DATA / "tiny_qwen3").eval()


@pytest.mark.parametrize("case", REPLAYS)
def test_replays_equal_the_references(case: dict[str, Any], reference_model: PreTrainedModel) -> None:
    cfg, prompt, ids = case["cfg"], case["prompt"], REFERENCE.read(case["tokens"]).view(1, -1).long()
    entry, stage = ("command_line", "evict") if cfg.get("count_prompt_tokens") else ("library", "pin")
    budget = replace(CASK.paper_budget(cfg["kv_budget"], entry), interval=32)  # type: ignore[arg-type]
    method = CASK(profile="paper", prompt_stage=stage, window=cfg["recent_window_size"])  # type: ignore[arg-type]
    logits, held = [], []
    calibration = import_pt(DATA / "tiny_stats.pt")
    with (
        torch.no_grad(),
        CompressedCache(reference_model, method, budget, prompt_lengths=prompt, calibration=calibration) as cache,
    ):
        for start, end in [(0, prompt), *((t, t + 1) for t in range(prompt, ids.shape[1] - 1))]:
            logits.append(reference_model(ids[:, start:end], past_key_values=cache).logits[0, -1])
            held.append(cache.stats().rows[0].physical_terminal)
        assert cache.slot_positions(0)[0][0].tolist() == case["positions"]
        assert cache.stats().rows[0].fallbacks == case["summary"]["guard_reason_counts"]
        assert cache.stats().rows[0].events == case["summary"]["compression_events"]
    assert held == case["cache_len"]
    nll = torch.nn.functional.cross_entropy(torch.stack(logits), ids[0, prompt : prompt + len(logits)])
    assert float(nll) == pytest.approx(case["mean_nll"], abs=1e-4)
    assert_close(torch.stack(logits), REFERENCE.read(case["logits"]).view(len(logits), -1), atol=1e-4, rtol=0)


def test_the_papers_budgets_are_those_of_its_entry_points() -> None:
    assert CASK.paper_budget(384) == Budget(
        384, interval=128, sinks=0, recent=0, cut_prompt="first_event", prompt="count"
    )
    library = CASK.paper_budget(384, "library")
    assert (library.trigger, library.trigger_counts) == ("grid", "decode")
