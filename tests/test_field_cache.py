"""The methods of the field in a real cache: exact attention, rows as alone, pieces as single tokens. H2O's sums."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from models import batch, tiny_model
from oracle import differences, run_compressed
from same_choice import Choices, check_same_choices
from slot_views import make_view
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from reasonkv import Budget, CompressedCache
from reasonkv.methods.ams import AMS
from reasonkv.methods.base import Method, Observed
from reasonkv.methods.beaconkv import BeaconKV, farthest
from reasonkv.methods.chunkkv import ChunkKV
from reasonkv.methods.curdkv import CurDKV
from reasonkv.methods.defensivekv import DefensiveKV
from reasonkv.methods.gkv import GKV
from reasonkv.methods.h2o import H2O
from reasonkv.methods.keyformer import Keyformer
from reasonkv.methods.lagkv import LagKV
from reasonkv.methods.raas import RaaS
from reasonkv.methods.random import RandomAttention
from reasonkv.methods.tova import TOVA
from reasonkv.rotary import Rotary

METHODS: list[Method] = [
    TOVA(),
    LagKV(lag=4),
    CurDKV(rank=4),
    ChunkKV("snapkv:window=6;kernel=3", chunk=3),
    ChunkKV("expected", chunk=3, reuse=2),
    H2O(window=5),
    DefensiveKV(window=6),
    BeaconKV(beacons=4, window=4, recent=4),
    RandomAttention(recent=3),
    GKV(window=4),
    RaaS(page=4, window=5),
    Keyformer(window=5),
    AMS("expected", window=6, least=3, floor=1),
]
LENGTHS, PROMPTS = [60, 53], [24, 17]
BUDGET = Budget(16, interval=5, sinks=2, recent=3, prompt="count")
D = 16


def kept(method: Method, rows: list[int], pieces: list[int]) -> Choices:
    """What some rows of one left-padded batch of two keep at every compaction."""
    model, found = tiny_model("qwen3"), Choices(rows)
    ids, mask, positions = (tensor[rows, 60 - max(LENGTHS[row] for row in rows) :] for tensor in batch(LENGTHS))
    prompts = [PROMPTS[row] for row in rows]
    with CompressedCache(model, method, BUDGET, prompt_lengths=prompts, observer=found) as cache:
        run_compressed(model, cache, ids, mask, positions, pieces)
        assert cache.rows[0].events > 3
    return found


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.spec())
def test_attention_over_the_kept_slots_is_exact(method: Method) -> None:
    model, pieces = tiny_model("qwen3"), [24, 7, 1, 1, 7, 7, 7, 6]
    ids, mask, positions = batch(LENGTHS)
    with CompressedCache(model, method, BUDGET, prompt_lengths=PROMPTS) as cache, sdpa_kernel(SDPBackend.MATH):
        run = run_compressed(model, cache, ids, mask, positions, pieces)
    attention, logits = differences(model, run, ids, mask, positions, pieces)
    assert attention <= 1e-12
    assert logits <= 1e-6


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.spec())
def test_a_padded_batch_and_pieces_that_end_at_events_keep_what_single_tokens_alone_do(method: Method) -> None:
    together = kept(method, [0, 1], [24] + [1] * 36)
    for row, prompt in enumerate(PROMPTS):
        alone = kept(method, [row], [prompt] + [1] * 36)
        for other in (together, kept(method, [row], [prompt, 5, 5, 5, 5, 5, 5, 5, 1])):
            assert check_same_choices(method, alone, other) > len(alone.made[row]) // 2


# ---------------------------------------------------------------------------------------------------------------- h2o


def observe(method: Method, state: dict[str, Tensor], queries: Tensor, start: int) -> None:
    positions = torch.arange(start, start + queries.shape[2])[None]
    method.observe(state, Observed(queries, positions, positions >= 0, 0, Rotary(torch.ones(D // 2))))


@pytest.mark.parametrize("prompt", [14, 30])
def test_h2o_sums_the_attention_of_every_query_since_a_slot_was_written(prompt: int) -> None:
    """Token by token: a prompt cut at its end or not, an event every 8 tokens, one KV head, two query heads."""
    tokens, keep, interval = 62, 22, 8
    method = H2O(window=keep + interval if prompt <= keep else interval)
    draw = torch.Generator().manual_seed(prompt)
    keys, queries = torch.randn(1, 1, tokens, D, generator=draw), torch.randn(1, 2, tokens, D, generator=draw)
    held, mass, stored = [], [0.0] * tokens, torch.empty(0)  # slots, their true sums, and what the method keeps
    state = method.new_row_state(1, 2, D, keys.device)
    last, event = 0, 0
    for t in range(tokens):
        held.append(t)
        for q in range(2):
            weights = (keys[0, 0, held].double() @ queries[0, q, t].double() * D**-0.5).softmax(0)
            for slot, weight in zip(held, weights.tolist(), strict=True):
                mass[slot] += weight / 2
        if t + 1 == prompt or t >= prompt:
            observe(method, state, queries[:, :, last : t + 1], last)
            last = t + 1
        if t + 1 < prompt or len(held) <= keep or (len(held) < keep + interval and t + 1 != prompt):
            continue
        T = min(method.window, t + 1)
        view = make_view(
            keys[:, :, held],
            queries[:, :, t + 1 - T : t + 1],
            positions=torch.tensor(held),
            sinks=2,
            recent=2,
            event=event,
        )
        state_BHN = torch.cat([stored, torch.full((len(held) - len(stored),), -1.0)])[None, None]
        view = replace(view, state={"attention": state_BHN}, row_state=state)
        plan = method.plan(view, keep)
        newest, heavy = held[-(keep - 2) // 2 :], [0, 1]  # half of what the two sinks leave
        heavy += sorted(held[2 : -(keep - 2) // 2], key=lambda slot: -mass[slot])[: (keep - 2) // 2]
        assert plan.kept_BHK[0, 0].tolist() == [held.index(slot) for slot in sorted(heavy + newest)]
        held = [held[slot] for slot in plan.kept_BHK[0, 0].tolist()]
        stored, event = plan.state["attention"][0, 0], event + 1
        assert stored.tolist() == pytest.approx([mass[slot] for slot in held], rel=1e-5)
    assert event == 5 if prompt > keep else 4


# ---------------------------------------------------------------------------------------------------------- beaconkv


def test_farthest_points_are_those_of_a_search_by_hand() -> None:
    points = torch.randn(3, 20, 4, generator=torch.Generator().manual_seed(0))
    for found, cloud in zip(farthest(points, 7), points, strict=True):
        unit = cloud / cloud.norm(dim=-1, keepdim=True)
        chosen = [int((unit @ unit.T).mean(1).argmin())]
        while len(chosen) < 7:
            rest = [i for i in range(20) if i not in chosen]
            chosen.append(min(rest, key=lambda i: max(float(unit[i] @ unit[c]) for c in chosen)))
        assert torch.equal(found, cloud[chosen])
    points[0, 5] = float("nan")
    assert bool(farthest(points, 7).isfinite().all())
