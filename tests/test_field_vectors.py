"""TOVA, LagKV, CurDKV, ChunkKV and Kara's attention equal what was recorded from public code (kvpress)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from slot_views import make_view
from torch import Tensor
from torch.testing import assert_close

from reasonkv.methods.chunkkv import ChunkKV, chunk_means, chunk_order
from reasonkv.methods.curdkv import CurDKV
from reasonkv.methods.kara import Kara
from reasonkv.methods.lagkv import LagKV, lag_relative
from reasonkv.methods.ops import top_k_slots, window_attention
from reasonkv.methods.tova import TOVA
from reasonkv.view import SlotView

DATA = Path(__file__).parent / "data"
TENSORS = load_file(DATA / "field_kvpress.safetensors")
JSON = json.loads((DATA / "field_kvpress.json").read_text())
CLOSE = {"rtol": 1e-5, "atol": 1e-7}
LEAST_MARGIN = 2e-7  # below it, float32 rounding decides the order of the last kept and the first dropped slot


def read(leaf: dict[str, str]) -> Tensor:
    tensor = TENSORS[leaf["tensor"]]
    return tensor.long() if tensor.dtype == torch.int16 else tensor


def cases(group: str) -> list[Any]:
    return [pytest.param(c, id=f"{c['index']}-{c['input']}") for c in JSON["cases"][group]]


def view_of(case: dict[str, Any], queries: int = 0) -> SlotView:
    inputs = {name: read(leaf) for name, leaf in JSON["inputs"][case["input"]].items()}
    view = make_view(inputs["keys"], inputs["queries_rot"][:, :, -queries:] if queries else None, recent=queries)
    return replace(view, values_BHND=inputs["values"])


# --------------------------------------------------------------------------------------------------------------- tova


@pytest.mark.parametrize("case", cases("tova"))
def test_tova_equals_kvpress(case: dict[str, Any]) -> None:
    view, public = view_of(case, queries=1), read(case["score"])
    attention = window_attention(view).flatten(1, 2)
    assert_close(attention[..., :-1], read(case["attention_last_query"])[:, :, 0], **CLOSE)
    # The newest token: the public code fills in the maximum of the whole batch plus 1; we protect it.
    assert_close(TOVA().score(view)[..., :-1], public[..., :-1], **CLOSE)
    assert case["topk_margin"] > LEAST_MARGIN
    assert torch.equal(TOVA().plan(view, case["n_kept"]).kept_BHK, read(case["kept_sorted"]))


# -------------------------------------------------------------------------------------------------------------- lagkv


def public_lagkv(case: dict[str, Any]) -> LagKV:
    options = case["options"]
    return LagKV(lag=options["lag_size"], sinks=options["n_sink"], cross=options["cross_scoring"], fit=False)


@pytest.mark.parametrize("case", cases("lagkv"))
def test_lagkv_equals_kvpress(case: dict[str, Any]) -> None:
    view, method = view_of(case), public_lagkv(case)
    assert_close(method.score(view), read(case["score"]), **CLOSE)
    if case["topk_margin"] > LEAST_MARGIN:  # else equal ranks are cut in an arbitrary order
        assert torch.equal(method.plan(view, case["n_kept"]).kept_BHK, read(case["kept_sorted"]))


@pytest.mark.parametrize("case", [c for c in cases("lagkv") if str(c.id) == "12-B1_n300_d64"])
def test_where_the_tail_fills_the_budget_a_shorter_lag_chooses_again(case: dict[str, Any]) -> None:
    """The last whole chunk of 32 and the 8 slots after it fill a budget of 40 slots: the newest 40 stay."""
    view, public, keep = view_of(case), public_lagkv(case), 40
    assert public.plan(view, keep).kept_BHK.unique().tolist() == list(range(300 - keep, 300))  # all of equal rank
    fitted = replace(public, fit=True)  # the lag becomes 8
    kept = fitted.plan(view, keep).kept_BHK
    assert int((kept < 300 - 8).sum()) == 2 * (keep - 8)


def test_lagkv_prefers_the_newest_where_there_is_nothing_to_compare_with() -> None:
    for N, expected in ((3, [1.0] * 3), (8, [1.0] * 4 + [0.0, 0.25, 0.5, 0.75])):
        assert LagKV().score(make_view(torch.zeros(1, 1, N, 2))).tolist() == [[expected]]


def test_a_channel_without_range_in_the_next_chunk_counts_as_zero_where_public_code_divides_by_it() -> None:
    keys = torch.randn(1, 1, 20, 6, generator=torch.Generator().manual_seed(0))
    keys[..., 2] = 3.0
    keys[0, 0, 3, 2] = 5.0  # (5 - 3) / 0 is infinite in the public code, and its standard deviation NaN
    scores = lag_relative(keys, 0, 10)
    rest = keys[:, :, :10].clone()
    least, most = keys[:, :, 10:].amin(2, keepdim=True), keys[:, :, 10:].amax(2, keepdim=True)
    rest = (rest - least) / (most - least)
    assert bool((~rest.std(-1).isfinite()).any())
    rest[..., 2] = 0.0
    assert_close(scores[:, :, 0], rest.std(-1).softmax(-1))


# ------------------------------------------------------------------------------------------------------------- curdkv


@pytest.mark.parametrize("case", cases("cur"))
def test_curdkv_equals_kvpress(case: dict[str, Any]) -> None:
    view, options = view_of(case), case["options"]
    window = options["local_window_size"] if options["use_local_approximation"] else 0
    method = CurDKV(options["leverage_type"], window, tail="padded", sinks=options["num_sinks"])
    if options["leverage_type"].startswith("kv"):  # else the code goes on to rewrite them in place
        for name in ("k2", "v2"):
            assert_close(method.shares(read(case[f"{name}_raw"])), read(case[name]), **CLOSE)
    assert_close(method.score(view), read(case["score"]), **CLOSE)
    assert case["topk_margin"] > LEAST_MARGIN
    assert torch.equal(method.plan(view, case["n_kept"]).kept_BHK, read(case["kept_sorted"]))


def test_a_short_last_window_raises_its_tokens_only_in_the_public_form() -> None:
    """Equal norms deserve equal scores; the public code gives the last 3 of 35 slots (16 / 3) squared as much."""
    view = make_view(torch.ones(1, 1, 35, 8))
    ours, public = (CurDKV(tail=tail, sinks=0).score(view)[0, 0] for tail in ("scaled", "padded"))  # type: ignore[arg-type]
    assert_close(ours, torch.full((35,), 1 / 35))
    assert_close(public[-1] / public[0], torch.tensor((16 / 3) ** 2))


# ------------------------------------------------------------------------------------------------------------ chunkkv


@pytest.mark.parametrize("case", cases("chunkkv"))
def test_chunkkv_equals_kvpress(case: dict[str, Any]) -> None:
    base_BN, chunk = read(case["base_score"]).sum(1), case["options"]["chunk_length"]
    B, N = base_BN.shape
    positions = torch.arange(N).expand(B, N)
    unprotected = torch.zeros(B, N, dtype=torch.bool)
    means = chunk_means(base_BN, positions // chunk, ~unprotected)
    chunks = -(-N // chunk)
    assert_close(means[:, :chunks], read(case["chunk_scores"]), **CLOSE)
    assert bool((means[:, chunks:] == float("-inf")).all())
    shared = read(case["kept_sorted_shared"])
    order = chunk_order(base_BN, positions, chunk, unprotected)
    kept = top_k_slots(order[:, None], len(shared))
    assert torch.equal(kept[0, 0], shared)  # of row 0, whose chunks the public code uses for every row


@pytest.mark.parametrize("case", [c for c in cases("chunkkv") if str(c.id).startswith(("4-", "6-"))])
def test_every_row_has_its_own_chunks_where_public_code_takes_row_0s(case: dict[str, Any]) -> None:
    view, shared = view_of(case), read(case["kept_sorted_shared"])
    both = ChunkKV("keydiff", chunk=20).plan(view, len(shared)).kept_BHK
    alone = make_view(view.keys_BHND[1:])
    assert torch.equal(both[1:], ChunkKV("keydiff", chunk=20).plan(alone, len(shared)).kept_BHK)
    assert not torch.equal(both[1], both[0])
    if case["options"]["base"] == "keydiff":
        assert torch.equal(both[0, 0], shared)
        assert torch.equal(both[0, 0], both[0, 1])


# --------------------------------------------------------------------------------------------------------------- kara


@pytest.mark.parametrize("case", cases("noncausal"))
def test_karas_attention_in_both_directions_equals_kvpress_in_whole_chunks(case: dict[str, Any]) -> None:
    """NonCausalAttn there: the sum over a chunk's queries, without the model's scaling. The newest 64 queries are kept."""
    public, size, at_hand = read(case["column_sums_group_mean"]), case["options"]["chunk_size"], 64
    view, N = replace(view_of(case, queries=at_hand), scaling=1.0), public.shape[-1]
    starts = [start for start in range(0, N - size + 1, size) if start >= N - at_hand]
    assert starts
    for start in starts:
        chunk = torch.arange(start, start + size).expand(*public.shape[:2], -1)
        ours = size * Kara().score(view, chunk, torch.zeros_like(chunk, dtype=torch.bool))
        assert_close(ours, public[..., start : start + size], rtol=1e-5, atol=2e-4)
