"""With a protected prompt of any length a method divides the other slots as it would without that prompt.

The prompt here is one that no query attends to and no key resembles, so that it cannot matter but by its number.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slot_views import make_view, random_network
from torch import Tensor

from reasonkv import get_method, method_names
from reasonkv.methods.base import Method, Observed
from reasonkv.methods.h2o import H2O
from reasonkv.methods.sparse_read import SelectionMethod
from reasonkv.rotary import Rotary
from reasonkv.view import LayerStatistics, SlotView

D, H, NEW, SLOTS = 16, 2, 24, 90
ROTARY = Rotary(10000.0 ** (-torch.arange(8) / 8))
AXIS = 7  # the pair that RoPE turns least: all queries point there, prompt keys away from it, and no other key has it
# Without first slots of their own, and in windows of tokens rather than of slots: here the first slots are the prompt's.
SPECS = {
    "curdkv": ["curdkv:window=0,sinks=0"],
    "expected": ["expected:sinks=0"],
    "forecast": ["forecast:window=8"],
    "lagkv": ["lagkv:lag=16,sinks=0", "lagkv:sinks=0"],
    "rkv": ["rkv:weight=1", "rkv:variant=vase,weight=0,window=8"],  # each term alone; both are shares over all slots
    "snapkv": ["snapkv:window=8"],
    "pyramidkv": ["pyramidkv:window=8"],
    "vase-attnv": ["vase-attnv:window=8,n_sink=0", "vase-attnv:window=8,n_sink=0,variant=paper"],
    "vase-dkv": ["vase-dkv:window=8,n_sink=0"],
    "adakv": ["adakv:base=snapkv:window=8", "adakv:base=knorm,stretch=2"],
    "chunkkv": ["chunkkv:base=snapkv:window=8,chunk=7"],
    "defensivekv": ["defensivekv:window=8"],
    "h2o": ["h2o:window=16", "h2o:window=16,recent_share=0.25"],
    "random-attention": ["random-attention:recent=8"],
    "beaconkv": ["beaconkv:beacons=4,window=3,recent=6"],
    "cask": ["cask", "cask:variant=paper", "cask:fold=none"],
    "kara": ["kara:queries=24"],
    "gkv": ["gkv"],
    "d2o": ["d2o:window=16"],
    "ams": ["ams:base=snapkv:window=8,window=8,least=8", "ams:base=knorm,window=8,least=8,floor=2,mass=0.1"],
    "lazyeviction": ["lazyeviction:alpha=0.01"],
    "raas": ["raas:page=5", "raas:page=5,rule=alpha,alpha=0.05"],
    "cake": ["cake:window=8"],
    "keyformer": ["keyformer:window=16"],
    "nacl": ["nacl:window=8"],
    "scissorhands": ["scissorhands:window=16"],
    "rpc": ["rpc:window=8"],
}
METHODS = [
    get_method(spec)
    for name in method_names()
    for spec in SPECS.get(name, [name])
    if get_method(name).bounded and not isinstance(get_method(name), SelectionMethod) and name != "oracle"
]


def both_views(method: Method, prompt: int, seed: int) -> tuple[SlotView, SlotView]:
    """The slots after a prompt, and the same behind the slots of that prompt, which are protected."""
    needs, draw = method.needs, torch.Generator().manual_seed(seed)
    length = prompt + 200
    old = prompt + torch.randperm(200 - NEW, generator=draw)[: SLOTS - NEW].sort().values
    positions = torch.cat([torch.arange(prompt), old, torch.arange(length - NEW, length)])
    keys, values = torch.randn(2, 1, H, prompt + SLOTS, D, generator=draw)
    keys[..., [AXIS, AXIS + D // 2]] = 0.0
    keys[:, :, :prompt] = 0.0
    keys[:, :, :prompt, AXIS] = -20.0
    queries = torch.randn(1, H, length, D, generator=draw)
    queries[..., AXIS] = 30.0
    T = min(needs.queries, length)
    view = make_view(
        keys, queries[:, :, length - T :] if T else None, positions=positions, recent=max(4, needs.recent),
        prompt=prompt, keep_prompt=True, event=3,
    )  # fmt: skip
    state: dict[str, Tensor] = {}
    for name, declared in needs.stored_state.items():
        fresh = view.positions_BHN if declared.initial == "position" else torch.tensor(float(declared.initial))
        state[name] = fresh.expand(view.positions_BHN.shape).to(declared.dtype).clone()
    if "attention" in state:
        known = torch.rand(1, H, SLOTS - NEW, generator=draw)
        state["attention"] = torch.cat([torch.zeros(1, H, prompt), known, torch.full((1, H, NEW), -1.0)], -1)
    row_state: dict[str, Tensor] = {}
    if needs.observes:
        row_state = method.new_row_state(1, H, D, keys.device)
        for start, end in ((0, 1), (1, length - 8), (length - 8, length)):
            at = torch.arange(start, end)[None]
            method.observe(row_state, Observed(queries[:, :, start:end], at, at >= 0, 0, ROTARY))
    mean = torch.randn(H, D // 2, dtype=torch.complex64, generator=draw)
    whole = replace(
        view, values_BHND=values, state=state, row_state=row_state, rotary=ROTARY, query_heads=H,
        prompt_length_B=torch.tensor([prompt]),
        calibration=LayerStatistics(mean, mean.abs() + 0.3, forecast=random_network(H, D, seed)),
        output_projection_HqDM=torch.randn(H, D, 24, generator=draw),
    )  # fmt: skip
    slots = {
        name: getattr(whole, name)[:, :, prompt:]
        for name in ("keys_BHND", "values_BHND", "positions_BHN", "counts_BHN", "is_prompt_BHN", "is_protected_BHN")
    }
    alone = replace(whole, **slots, state={name: tensor[:, :, prompt:] for name, tensor in state.items()})
    return alone, whole


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.spec())
@settings(max_examples=12, deadline=None, derandomize=True)
@given(prompt=st.integers(4, 400), keep=st.integers(30, SLOTS - 1), seed=st.integers(0, 99))
def test_a_protected_prompt_changes_nothing_among_the_other_slots(
    method: Method, prompt: int, keep: int, seed: int
) -> None:
    keep = max(keep, method.needs.recent + 2)
    if keep >= SLOTS:
        return
    alone, whole = both_views(method, prompt, seed)
    expected, found = method.plan_layers([alone], keep)[0], method.plan_layers([whole], keep + prompt)[0]
    assert torch.equal(found.kept_BHK[..., :prompt], torch.arange(prompt).expand(1, H, prompt))
    assert torch.equal(found.kept_BHK[..., prompt:] - prompt, expected.kept_BHK)
    if expected.log_mass_BHK is not None and found.log_mass_BHK is not None:
        torch.testing.assert_close(found.log_mass_BHK[..., prompt:], expected.log_mass_BHK)
    if expected.merge is not None:
        assert found.merge is not None
        torch.testing.assert_close(found.merge.value_weights_BHN[..., prompt:], expected.merge.value_weights_BHN)


def test_h2o_keeps_heavy_hitters_beside_a_protected_prompt() -> None:
    method = H2O(window=16)
    _, whole = both_views(method, 300, 0)
    kept = method.plan(whole, 340).kept_BHK
    assert int((kept >= 300 + SLOTS - 20).sum(-1).max()) < 40  # the newest half of the 40 free slots, and few others
    assert int((kept[..., 300:] < 300 + SLOTS - NEW).sum(-1).min()) >= 15
