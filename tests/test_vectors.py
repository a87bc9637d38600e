"""Scores and kept sets equal those of the public code, from its own recorded inputs and outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from slot_views import make_view
from torch import Tensor
from torch.testing import assert_close

from reasonkv.methods import ScorerMethod
from reasonkv.methods.keydiff import KeyDiff
from reasonkv.methods.knorm import Knorm
from reasonkv.methods.ops import fill_window, top_k_slots, window_attention
from reasonkv.methods.rkv import RKV, spared_columns
from reasonkv.methods.snapkv import SnapKV
from reasonkv.methods.streaming import StreamingLLM
from reasonkv.view import SlotView

DATA = Path(__file__).parent / "data"
CLOSE = {"rtol": 1e-5, "atol": 1e-7}
LEAST_MARGIN = 2e-7  # below it, float32 rounding decides the order of the last kept and the first dropped slot


class Vectors:
    """One file of vectors; a leaf {"tensor": NAME} reads as the tensor."""

    def __init__(self, name: str) -> None:
        self.tensors = load_file(DATA / f"{name}.safetensors")
        self.json = json.loads((DATA / f"{name}.json").read_text())

    def read(self, leaf: dict[str, str]) -> Tensor:
        tensor = self.tensors[leaf["tensor"]]
        return tensor.long() if tensor.dtype == torch.int16 else tensor

    def input(self, case: dict[str, Any], name: str) -> Tensor:
        return self.read(self.json["inputs"][case["input"]][name])


FILES = {name: Vectors(name) for name in ("field_rkv", "field_kvpress", "field_vase")}


def cases(file: str, group: str) -> list[Any]:
    return [pytest.param(c, id=f"{c['index']}-{c['input']}") for c in FILES[file].json["cases"][group]]


def kept_set(method: ScorerMethod, view: SlotView, keep: int) -> Tensor:
    plan = method.plan(view, keep)
    plan.check((*view.positions_BHN.shape[:2], view.positions_BHN.shape[2]), keep, view.is_protected_BHN)
    return plan.kept_BHK


# ---------------------------------------------------------------------------------------------------- R-KV, official


def official(case: dict[str, Any]) -> tuple[RKV, SlotView]:
    options, file = case["options"], FILES["field_rkv"]
    method = RKV(
        window=options["window_size"],
        kernel=options["kernel_size"],
        weight=options["mix_lambda"],
        threshold=options["threshold"],
        # In the public code last_percent always equals last, and first and first_percent clear column 0 alike.
        retain=options["retain_direction"].removesuffix("_percent"),
    )
    view = make_view(file.input(case, "keys"), file.input(case, "queries_rot"), recent=method.window)
    return method, view


@pytest.mark.parametrize("case", cases("field_rkv", "r1kv"))
def test_rkv_official_equals_the_authors_code(case: dict[str, Any]) -> None:
    file, (method, view) = FILES["field_rkv"], official(case)
    before_pool = window_attention(view, over="old", merge_logits=True).mean(2)
    assert_close(before_pool, file.read(case["importance_before_pool"]), **CLOSE)
    assert_close(method.importance(view), file.read(case["importance"]), **CLOSE)
    unit = torch.nn.functional.normalize(view.keys_BHND[0], dim=-1)
    columns = spared_columns(unit, method.threshold if method.retain == "last" else None)[0]
    assert torch.equal(columns, file.read(case["retained_column"]))
    redundancy = method.redundancy(view)
    assert_close(redundancy[0], file.read(case["redundancy_all"]), **CLOSE)
    n = view.positions_BHN.shape[2] - method.window
    assert_close(redundancy[0, :, :n], file.read(case["redundancy"]), **CLOSE)
    assert_close(method.score(view)[:1, :, :n], file.read(case["final_score"])[:1], **CLOSE)
    assert case["topk_margin"] > LEAST_MARGIN
    kept = kept_set(method, view, case["options"]["budget"])
    assert torch.equal(kept[:1], file.read(case["kept_sorted"])[:1])


@pytest.mark.parametrize("case", [c for c in cases("field_rkv", "r1kv") if "B2" in str(c.id)])
def test_rkv_gives_every_row_its_own_redundancy_where_the_authors_code_takes_row_0s(case: dict[str, Any]) -> None:
    file, (method, view) = FILES["field_rkv"], official(case)
    own, importance = method.redundancy(view), method.importance(view)
    n = importance.shape[2]
    public = method.weight * importance - (1 - method.weight) * own[:1, :, :n]
    assert_close(public, file.read(case["final_score"]), **CLOSE)
    kept = top_k_slots(fill_window(public, n + method.window), case["options"]["budget"], view.is_protected_BHN)
    assert torch.equal(kept, file.read(case["kept_sorted"]))
    alone = make_view(view.keys_BHND[1:], view.queries_BHgTD()[1:].flatten(1, 2), recent=method.window)
    assert torch.equal(own[1:], method.redundancy(alone))
    assert float((own[1] - own[0]).abs().max()) > 1e-3


# ------------------------------------------------------------------------------- R-KV port and SnapKV of VaSE's harness


def harness_view(case: dict[str, Any], event: int) -> tuple[SlotView, dict[str, Any]]:
    """The slots of one event in the order the harness holds them, which after its first event is not by position."""
    file, record = FILES["field_vase"], case["events"][event]
    window = case["options"]["residual_length"]
    positions = file.read(record["slot_positions_before"])
    keys = file.input(case, "keys")
    keys = keys.gather(2, positions.unsqueeze(-1).expand(-1, -1, -1, keys.shape[-1]))
    queries = file.input(case, "queries_rot")[:, :, event * window : (event + 1) * window]
    return make_view(keys, queries, positions=positions, recent=window), record


def check_harness_kept(method: ScorerMethod, view: SlotView, record: dict[str, Any], window: int) -> None:
    assert record["topk_margin"] > LEAST_MARGIN
    kept = kept_set(method, view, record["K"] + window)[..., : record["K"]]
    assert torch.equal(kept, FILES["field_vase"].read(record["kept_slots_sorted"]))


@pytest.mark.parametrize("event", [0, 1])
@pytest.mark.parametrize("case", cases("field_vase", "attn_rkv"))
def test_rkv_port_equals_the_published_port(case: dict[str, Any], event: int) -> None:
    file, options = FILES["field_vase"], case["options"]
    window, kernel = options["residual_length"], options["kernel_size"] if options["smooth"] else 1
    method = RKV(variant="vase", window=window, kernel=kernel, weight=options["rkv_lambda"])
    view, record = harness_view(case, event)
    assert_close(method.importance(view), file.read(record["attention_a"]), **CLOSE)
    assert_close(method.redundancy(view), file.read(record["redundancy"]), **CLOSE)
    assert_close(method.score(view)[..., : record["n_candidates"]], file.read(record["final_score"]), **CLOSE)
    check_harness_kept(method, view, record, window)


@pytest.mark.parametrize("event", [0, 1])
@pytest.mark.parametrize("case", cases("field_vase", "attn"))
def test_snapkv_over_old_slots_equals_the_decode_harness(case: dict[str, Any], event: int) -> None:
    options = case["options"]
    window, kernel = options["residual_length"], options["kernel_size"] if options["smooth"] else 1
    method = SnapKV(window=window, kernel=kernel, denominator="old")
    view, record = harness_view(case, event)
    attention = method.score(view)[..., : record["n_candidates"]]
    assert_close(attention, FILES["field_vase"].read(record["attention_a"]), **CLOSE)
    check_harness_kept(method, view, record, window)


# ------------------------------------------------------------------------------------------------------------ kvpress


@pytest.mark.parametrize("case", cases("field_kvpress", "snapkv"))
def test_snapkv_equals_kvpress(case: dict[str, Any]) -> None:
    file, options = FILES["field_kvpress"], case["options"]
    window = options["window_size"]
    method = SnapKV(window=window, kernel=options["kernel_size"])
    keys, queries = file.input(case, "keys"), file.input(case, "queries_rot")[:, :, -window:]
    view = make_view(keys, queries, recent=window)
    n = keys.shape[2] - window
    per_query_head = window_attention(view)[..., :n].flatten(1, 2)
    assert_close(per_query_head, file.read(case["mean_over_window"]), **CLOSE)
    score, public = method.score(view), file.read(case["score"])
    assert_close(score[..., :n], file.read(case["group_mean"]), **CLOSE)
    assert_close(score[..., :n], public[..., :n], **CLOSE)
    # The window: kvpress gives it the maximum of the whole tensor plus 1, we protect it and fill in the head's own.
    assert_close(public[..., n:], (public[..., :n].max() + 1).expand_as(public[..., n:]))
    assert torch.equal(score[..., n:], score[..., :n].amax(-1, keepdim=True).expand_as(score[..., n:]))
    if case["n_kept"] < window:
        assert case["topk_margin"] == 0.0  # the public code cuts inside the window, where all values are equal
    else:
        assert case["topk_margin"] > LEAST_MARGIN
        assert torch.equal(kept_set(method, view, case["n_kept"]), file.read(case["kept_sorted"]))


@pytest.mark.parametrize("case", cases("field_kvpress", "keydiff"))
def test_keydiff_equals_kvpress(case: dict[str, Any]) -> None:
    file, view = FILES["field_kvpress"], make_view(FILES["field_kvpress"].input(case, "keys"))
    assert_close(KeyDiff().score(view), file.read(case["score"]), rtol=1e-5, atol=5e-7)
    assert case["topk_margin"] > 1e-6
    assert torch.equal(kept_set(KeyDiff(), view, case["n_kept"]), file.read(case["kept_sorted"]))


@pytest.mark.parametrize("case", cases("field_kvpress", "knorm"))
def test_knorm_equals_kvpress(case: dict[str, Any]) -> None:
    file, view = FILES["field_kvpress"], make_view(FILES["field_kvpress"].input(case, "keys"))
    assert_close(Knorm().score(view), file.read(case["score"]), **CLOSE)
    assert case["topk_margin"] > 1e-6
    assert torch.equal(kept_set(Knorm(), view, case["n_kept"]), file.read(case["kept_sorted"]))


@pytest.mark.parametrize("case", cases("field_kvpress", "streaming_llm"))
def test_streaming_equals_kvpress(case: dict[str, Any]) -> None:
    file = FILES["field_kvpress"]
    view = make_view(file.input(case, "keys"), sinks=case["options"]["n_sink"])
    assert torch.equal(kept_set(StreamingLLM(), view, case["n_kept"]), file.read(case["kept_sorted"]))
