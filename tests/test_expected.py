"""Expected attention: the authors' code, the formula by sampling, and independence of pieces and of other rows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from same_choice import check_same_choice
from slot_views import make_view
from torch import Tensor
from torch.testing import assert_close

from reasonkv.methods import get_method
from reasonkv.methods.base import Observed
from reasonkv.methods.expected import ExpectedAttention
from reasonkv.methods.moments import Moments, expected_logits, mean_rotation, rotated
from reasonkv.plan import Plan
from reasonkv.rotary import Rotary
from reasonkv.view import SlotView

DATA = Path(__file__).parent / "data"
TENSORS = load_file(DATA / "field_expected.safetensors")
JSON = json.loads((DATA / "field_expected.json").read_text())
ROTARY = Rotary(10000.0 ** (-torch.arange(8) / 8))


def read(leaf: dict[str, str]) -> Tensor:
    tensor = TENSORS[leaf["tensor"]]
    return tensor.long() if tensor.dtype == torch.int16 else tensor


def observed(method: ExpectedAttention, plain_BqnD: Tensor, rotary: Rotary, pieces: list[int]) -> dict[str, Tensor]:
    """The row state after feeding queries (given before RoPE) in these pieces."""
    B, Hq, n, D = plain_BqnD.shape
    state, start = method.new_row_state(B, Hq, D, plain_BqnD.device), 0
    for size in pieces:
        positions = torch.arange(start, start + size).expand(B, size)
        queries = rotary.rotate(plain_BqnD[:, :, start : start + size], positions[:, None])
        method.observe(state, Observed(queries, positions, torch.ones(B, size, dtype=torch.bool), 0, rotary))
        start += size
    assert start == n
    return state


def view_with(method: ExpectedAttention, B: int = 2, N: int = 60, pieces: list[int] | None = None) -> SlotView:
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, B, 2, N, 20, generator=generator)
    queries = torch.randn(B, 4, N, 20, generator=generator) + torch.randn(B, 4, 1, 20, generator=generator)
    state = {} if method.variant == "cask" else observed(method, queries, ROTARY, pieces or [N])
    window = queries[:, :, -method.window :] if method.variant == "cask" else None
    view = make_view(keys, window, sinks=2, recent=3)
    return replace(view, values_BHND=values, rotary=ROTARY, row_state=state, query_heads=4)


@pytest.mark.parametrize("case", JSON["cases"]["expected_attention"], ids=lambda c: f"{c['index']}-{c['input']}")
def test_kvpress_form_equals_the_authors_code(case: dict[str, Any]) -> None:
    options, inputs = case["options"], {name: read(leaf) for name, leaf in JSON["inputs"][case["input"]].items()}
    method = ExpectedAttention(
        variant="kvpress",
        covariance="full" if options["use_covariance"] else "none",
        future=options["n_future_positions"],
        value_norm=options["use_vnorm"],
        epsilon=options["epsilon"],
        sinks=options["n_sink"],
    )
    rotary = Rotary(inputs["inv_freq"])
    state = observed(method, inputs["queries_pre"], rotary, [inputs["keys"].shape[2]])
    view = replace(make_view(inputs["keys"]), values_BHND=inputs["values"], rotary=rotary, row_state=state)
    # The sinks: the public code fills in the maximum of the whole tensor plus 1, we each head's own.
    assert_close(method.score(view)[..., 4:], read(case["score"])[..., 4:], rtol=1e-5, atol=1e-7)
    assert torch.equal(method.plan(view, case["n_kept"]).kept_BHK, read(case["kept_sorted"]))


@pytest.mark.parametrize("covariance", ["bands", "full", "none"])
def test_statistics_do_not_depend_on_the_pieces_tokens_come_in(covariance: str) -> None:
    method = ExpectedAttention(covariance=covariance)
    whole = view_with(method)
    for pieces in ([1] * 60, [7, 30, 23]):
        assert_close(method.score(view_with(method, pieces=pieces)), method.score(whole), rtol=1e-6, atol=1e-9)


def test_padding_does_not_count() -> None:
    method = ExpectedAttention()
    queries, positions = torch.randn(1, 4, 9, 20), torch.arange(9)[None]
    state, other = (method.new_row_state(1, 4, 20, queries.device) for _ in range(2))
    method.observe(state, Observed(queries, positions, positions < 7, 0, ROTARY))
    method.observe(other, Observed(queries[:, :, :7], positions[:, :7], positions[:, :7] >= 0, 0, ROTARY))
    for name, tensor in state.items():
        assert_close(tensor, other[name])
    assert state["seen"].tolist() == [3.0]  # the first four are not counted


def test_mean_rotation_equals_the_mean_over_positions() -> None:
    rotary = Rotary(torch.cat([10000.0 ** (-torch.arange(8) / 8), torch.zeros(1)]), 1.3)
    phases = torch.arange(777, 777 + 512).double()[:, None] * rotary.inv_freq.double()
    found = mean_rotation(rotary, torch.tensor([777]), 512)[0]
    assert_close(found, 1.3 * torch.polar(torch.ones_like(phases), phases).mean(0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", ["bands", "full"])
def test_logits_are_the_log_of_the_mean_exponential_of_normal_queries(form: str) -> None:
    """Bands equal the whole covariance where pairs do not correlate; both equal mean and variance by hand."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.zeros(1, 4, 20, 20, dtype=torch.float64)
    variance = torch.rand(1, 4, 20, generator=generator).double() + 0.5
    cross = 0.4 * (torch.rand(1, 4, 8, generator=generator).double() - 0.5)
    index = torch.arange(20)
    blocks[..., index, index] = variance
    blocks[..., index[:8], index[8:16]] = blocks[..., index[8:16], index[:8]] = cross
    mean = torch.randn(1, 4, 20, generator=generator).double()
    keys = torch.randn(1, 2, 30, 20, generator=generator).double()
    moments = Moments(mean, None, variance, cross) if form == "bands" else Moments(mean, blocks)
    turn = mean_rotation(ROTARY, torch.tensor([100]), 16)
    found = expected_logits(keys, rotated(moments, turn), 0.25)
    matrix = torch.eye(20, dtype=torch.float64)
    matrix[index[:8], index[:8]] = matrix[index[8:16], index[8:16]] = turn[0].real
    matrix[index[:8], index[8:16]], matrix[index[8:16], index[:8]] = -turn[0].imag, turn[0].imag
    wide = keys.repeat_interleave(2, 1)
    expected = 0.25 * torch.einsum("ij,bqj,bqni->bqn", matrix, mean, wide)
    spread = torch.einsum("bqni,ij,bqjk,lk,bqnl->bqn", wide, matrix, blocks, matrix, wide)
    assert_close(found, expected + 0.5 * 0.25**2 * spread, rtol=0, atol=1e-12)


@pytest.mark.parametrize("spec", ["expected", "expected:variant=kvpress", "expected:variant=cask"])
def test_rows_of_a_batch_score_as_they_would_alone(spec: str) -> None:
    method = get_method(spec)
    assert isinstance(method, ExpectedAttention)
    assert method.spec() == spec
    view = view_with(method)
    plan = method.plan(view, 20)
    plan.check((2, 2, 60), 20, view.is_protected_BHN)
    names = [name for name, value in vars(view).items() if name.endswith(("_B", "_BHN", "_BHND")) and value is not None]
    alone = {name: getattr(view, name)[1:] for name in names}
    row = replace(
        view,
        **alone,
        queries_BHqTD=None if view.queries_BHqTD is None else view.queries_BHqTD[1:],
        query_positions_BT=None if view.query_positions_BT is None else view.query_positions_BT[1:],
        row_state={name: tensor[1:] for name, tensor in view.row_state.items()},
    )
    check_same_choice(method, [row], [Plan(plan.kept_BHK[1:])], [method.plan(row, 20)])


def test_a_slot_that_stands_for_two_tokens_counts_as_two_equal_slots() -> None:
    method = ExpectedAttention()
    once, twice = view_with(method), torch.tensor([*range(60), 10])
    names = ("keys_BHND", "values_BHND", "positions_BHN", "is_protected_BHN")
    doubled = replace(once, **{name: getattr(once, name)[:, :, twice] for name in names})
    mass_BHN = torch.zeros(once.positions_BHN.shape)
    mass_BHN[..., 10] = torch.tensor(2.0).log()
    found, each = method.score(replace(once, state={"log_mass": mass_BHN})), method.score(doubled)[..., :60]
    assert_close(found[..., 10], 2 * each[..., 10])
    assert_close(found[..., 11:], each[..., 11:])
