"""Methods that carry a number beside every slot, on cases small enough to work out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from field_views import D, attended
from slot_views import make_view

from reasonkv.methods.gkv import GKV
from reasonkv.methods.inertiakv import InertiaKV
from reasonkv.methods.lazyeviction import LazyEviction
from reasonkv.methods.raas import RaaS


def test_gkv_by_hand() -> None:
    """Scores .5 and 1 of the newest queries' attention, the latter the largest; what was 1 before counts 0.8."""
    logits = torch.full((1, 4), -40.0)
    logits[0, 0], logits[0, 1] = 0.0, math.log(2.0)
    view = replace(attended(logits), state={"score": torch.tensor([-1.0, 0.2, 1.0, -1.0])[None, None]})
    plan = GKV(window=1).plan(view, 3)
    assert plan.kept_BHK[0, 0].tolist() == [1, 2, 3]
    assert plan.state["score"][0, 0].tolist() == pytest.approx([1.0, 0.8, -1.0])


def test_lazyeviction_by_hand() -> None:
    """Tokens 8 and 9 are new and attend to slot 0, last activated at 4; slot 1 was activated at 3 after a pause of 5."""
    keys = torch.zeros(1, 1, 10, D)
    keys[0, 0, 0, 0] = 50.0
    queries = torch.zeros(1, 1, 2, D)
    queries[..., 0] = 50.0
    view = make_view(keys, queries, recent=1)
    state = {"activated": torch.full((1, 1, 10), 3.0), "interval": torch.zeros(1, 1, 10)}
    state["activated"][..., 0], state["interval"][..., 0] = 4.0, 2.0
    state["interval"][..., 1] = 5.0
    for tensor in state.values():
        tensor[..., 8:] = -1.0  # tokens 8 and 9 are new
    method = LazyEviction(alpha=0.1, window=2)
    activated, interval = method.recurrence(replace(view, state=state)).unbind(2)
    assert activated[0, 0].tolist() == [9, 3, 3, 3, 3, 3, 3, 3, 8, 9]  # a new slot starts at its own token
    assert interval[0, 0].tolist() == [4, 5, 0, 0, 0, 0, 0, 0, 0, 0]  # slot 0: from 4 to 8, then 1
    plan = method.plan(replace(view, state=state), 3)
    assert plan.kept_BHK[0, 0].tolist() == [0, 1, 9]


def test_raas_by_hand() -> None:
    """Four pages of two tokens; tokens 6 and 7 are new. Each query uses one page: 0, 0, 1 and 3."""
    logits = torch.full((4, 8), -40.0)
    logits[:2, 0] = logits[2, 2] = logits[3, 7] = 0.0
    stored = torch.tensor([3.0, 3, 5, 5, 4, 4, -1, -1])[None, None]
    view = replace(attended(logits), state={"stamp": stored})
    stamps = RaaS(page=2, share=0.25, window=4).stamps(view)
    assert stamps[0, 0].tolist() == [3, 3, 6, 6, 4, 4, 7, 7]  # queries 4 and 5 were counted before
    assert RaaS(page=2, share=0.25, window=4).plan(view, 5).kept_BHK[0, 0].tolist() == [2, 3, 5, 6, 7]


def test_inertiakv_by_hand() -> None:
    """Token 3 is new and attends to slot 0 alone: .8 x .5 + .2 x 1, and .8 of the others."""
    logits = torch.full((1, 4), -40.0)
    logits[0, 0] = 0.0
    view = replace(attended(logits), state={"average": torch.tensor([0.5, 0.7, 0.1, -1.0])[None, None]})
    plan = InertiaKV(window=1).plan(view, 3)
    assert plan.kept_BHK[0, 0].tolist() == [0, 1, 3]
    assert plan.state["average"][0, 0].tolist() == pytest.approx([0.6, 0.56, 0.0])
