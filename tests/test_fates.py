"""The fates of tokens are those of the plans that were carried out, followed slot by slot in plain Python."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from models import batch, tiny_model
from safetensors import safe_open

from reasonkv import Budget, CompressedCache, Merge, Method, Plan, Requirements, SlotView, get_method
from reasonkv.evaluate.fates import NEVER, EventPlan, PlanRecorder, fates, save_plans
from reasonkv.evaluate.manifest import ResultsError

PROMPTS, LENGTHS = [24, 17, 9], [66, 59, 46]


@dataclass(frozen=True)
class FoldNeighbours(Method):
    """Keep protected slots and every other one; fold the rest into the kept slot before them, or drop every third."""

    name: ClassVar[str] = "fold-neighbours"
    title: ClassVar[str] = "test"
    paper: ClassVar[str] = "-"

    @property
    def needs(self) -> Requirements:
        return Requirements(merges=True)

    def plan(self, view: SlotView, keep: int) -> Plan:
        B, H, N = view.positions_BHN.shape
        scores = view.uniform_BHN() + 2.0 * view.is_protected_BHN
        kept_BHK = scores.topk(keep, dim=-1).indices.sort(-1).values
        is_kept = torch.zeros(B, H, N, dtype=torch.long).scatter_(2, kept_BHK, 1)
        into = (is_kept.cumsum(-1) - 1).clamp(min=0)
        into[(is_kept == 0) & (view.positions_BHN % 3 == 0)] = -1
        members = torch.zeros(B, H, keep).scatter_add_(2, into.clamp(min=0), (into >= 0).float())
        weights = (into >= 0).float() / members.gather(2, into.clamp(min=0))
        return Plan(kept_BHK, Merge(into, weights, weights))


def run(method: str | Method, **fields: object) -> tuple[list[EventPlan], CompressedCache]:
    """Feed a padded batch of three rows, prompts first and then token by token."""
    model = tiny_model("qwen3")
    recorder = PlanRecorder()
    tokens = 34 if fields.get("prompt") == "keep" else 16
    budget = Budget(tokens, interval=5, sinks=2, recent=3, **fields)  # type: ignore[arg-type]
    cache = CompressedCache(model, get_method(method), budget, prompt_lengths=PROMPTS, observer=recorder)
    ids, _, _ = batch([max(LENGTHS)] * 3)
    at = [0, 0, 0]
    mask_BL = torch.zeros(3, 0, dtype=torch.long)
    width = max(PROMPTS)
    with torch.no_grad(), cache:
        for columns in [width] + [1] * (max(LENGTHS) - min(PROMPTS)):
            fed = [(prompt if columns > 1 else 1) if at[i] < LENGTHS[i] else 0 for i, prompt in enumerate(PROMPTS)]
            new = torch.tensor([[0] * (columns - n) + [1] * n for n in fed])
            mask_BL = torch.cat([mask_BL, new], 1)
            positions = (torch.tensor(at)[:, None] + new.cumsum(1) - 1).clamp(min=0)
            model(ids.gather(1, positions), attention_mask=mask_BL, position_ids=positions, past_key_values=cache)
            at = [a + n for a, n in zip(at, fed, strict=True)]
    assert at == LENGTHS
    return recorder.plans, cache


def read_back(path: Path) -> list[EventPlan]:
    """The plans of a file, by its documented names alone."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        index = json.loads(file.metadata()["plans"])
    return [
        EventPlan(*facts, tensors[f"{i}.positions"], tensors[f"{i}.kept"], tensors.get(f"{i}.into"))
        for i, facts in enumerate(index)
    ]


def follow(plans: list[EventPlan], layer: int, row: int, head: int, tokens: int) -> dict[str, list[int]]:
    """The same fates, one slot at a time: what every slot holds is a set of tokens."""
    dropped, folded, into = ([NEVER] * tokens for _ in range(3))
    slots: list[tuple[int, set[int]]] = []  # (the slot's token, every token that lives in it)
    seen = 0
    for plan in [p for p in plans if p.layer == layer and p.row == row]:
        slots += [(token, {token}) for token in range(seen, plan.length)]
        seen = plan.length
        assert [token for token, _ in slots] == plan.positions_HN[head].tolist()
        kept = plan.kept_HK[head].tolist()
        after = [(slots[index][0], set(slots[index][1])) for index in kept]
        for index, (token, members) in enumerate(slots):
            if index in kept:
                continue
            goal = -1 if plan.into_HN is None else int(plan.into_HN[head, index])
            if goal < 0:
                for member in members:
                    dropped[member] = plan.event
            else:
                folded[token], into[token] = plan.event, after[goal][0]
                after[goal][1].update(members)
        slots = after
    slots += [(token, {token}) for token in range(seen, tokens)]
    return {"dropped": dropped, "folded": folded, "into": into, "alive": [token for token, _ in slots]}


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("random", {"prompt": "count"}),
        ("keydiff", {"prompt": "on_top"}),
        ("snapkv:window=6,kernel=3", {"prompt": "keep"}),
        ("rkv:window=6,kernel=3", {"prompt": "count", "trigger": "grid"}),
        ("streaming", {"prompt": "count", "cut_prompt": "first_event"}),
        (FoldNeighbours(), {"prompt": "count"}),
        (FoldNeighbours(), {"prompt": "on_top"}),
    ],
    ids=str,
)
def test_fates_equal_a_slot_by_slot_replay_of_the_saved_plans(
    tmp_path: Path, method: str | Method, fields: dict[str, str]
) -> None:
    plans, cache = run(method, **fields)
    save_plans(tmp_path / "plans.safetensors", plans)
    saved = read_back(tmp_path / "plans.safetensors")
    for row, tokens in enumerate(LENGTHS):
        found = fates(plans, tokens, row=row)
        assert found.layers == (0, 1, 2)
        assert len(found.lengths_E) == cache.rows[row].events > 0
        for layer in found.layers:
            held = cache.slot_positions(layer)[row]
            for head in range(held.shape[0]):
                expected = follow(saved, layer, row, head, tokens)
                assert found.dropped_GHN[layer, head].tolist() == expected["dropped"]
                assert found.folded_GHN[layer, head].tolist() == expected["folded"]
                assert found.into_GHN[layer, head].tolist() == expected["into"]
                assert held[head].tolist() == expected["alive"]
                alive = (found.dropped_GHN == NEVER) & (found.folded_GHN == NEVER)
                assert alive[layer, head].nonzero()[:, 0].tolist() == expected["alive"]
    if isinstance(method, FoldNeighbours):
        assert (fates(plans, LENGTHS[0]).folded_GHN >= 0).any()


def test_lengths_and_slots_of_events_are_the_schedules() -> None:
    plans, cache = run("random", prompt="count")
    found = fates(plans, LENGTHS[0])
    assert found.lengths_E[0] == PROMPTS[0]  # the prompt is cut when it is whole
    assert set(found.after_E) == {16}
    assert set(found.before_E[1:]) == {21}
    assert found.before_E[0] == PROMPTS[0]
    assert (found.dropped_GHN >= 0).sum(-1).unique().tolist() == [cache.rows[0].dropped]


def test_a_row_without_events_keeps_every_token() -> None:
    found = fates([], 7, layers=[0, 1])
    assert found.lengths_E == ()
    assert bool((found.dropped_GHN == NEVER).all() and (found.folded_GHN == NEVER).all())


def test_plans_that_do_not_follow_each_other_are_refused() -> None:
    plans, _ = run("random")
    with pytest.raises(ResultsError, match="do not count from 0"):
        fates([replace(plan, event=plan.event + 1) for plan in plans], LENGTHS[0])
