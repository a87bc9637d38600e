"""A compressed run's attention equals full attention over the kept slots: every method, family, piece, batch, kernel."""

from __future__ import annotations

import contextlib
from itertools import product
from typing import NamedTuple

import pytest
import torch
from allpairspy import AllPairs
from models import batch, calibration, tiny_model
from oracle import PlanLog, differences, run_compressed
from torch.nn.attention import SDPBackend, sdpa_kernel

from reasonkv import Budget, CompressedCache, get_method, method_names
from reasonkv.evaluate.chunks import TraceRow
from reasonkv.evaluate.reference import FullAttention
from reasonkv.methods.sparse_read import SelectionMethod

LENGTH, PROMPT = 60, 24
PIECES = {
    "decode": [PROMPT] + [1] * (LENGTH - PROMPT),
    "forward7": [PROMPT, 7, 7, 7, 7, 7, 1],
    "chunked": [8, 8, 8, 12, 12, 12],
}
BATCHES = {"single": [LENGTH], "padded": [LENGTH, LENGTH - 13, LENGTH - 29]}
# windows that fit the tiny budget, and folds at every event; everything else at its default
SPECS = {
    "snapkv": "snapkv:window=6,kernel=3",
    "rkv": "rkv:window=6,kernel=3",
    "cask": "cask:fold=neighbours",
    "vase-attnv": "vase-attnv:window=6",
    "vase-dkv": "vase-dkv:window=6",
    "chunkkv": "chunkkv:base=snapkv:window=6;kernel=3,chunk=4",
    "defensivekv": "defensivekv:window=6",
    "pyramidkv": "pyramidkv:window=6,kernel=3",
    "adakv": "adakv:base=snapkv:window=6;kernel=3",
    "beaconkv": "beaconkv:beacons=4,window=4,recent=6",
    "random-attention": "random-attention:recent=6",
    "gkv": "gkv:window=4",
    "ams": "ams:base=snapkv:window=6;kernel=3,window=6,least=4",
    "lazyeviction": "lazyeviction:alpha=0.02",
    "raas": "raas:page=4",
    "cake": "cake:window=6",
    "rpc": "rpc:window=6",
}


class Case(NamedTuple):
    """One cell of the matrix."""

    method: str
    family: str
    pieces: str
    batch: str
    kernel: str
    prompt: str

    def __str__(self) -> str:
        return "-".join(self)


AXES = [
    # selection methods drop nothing and have no events; tests/test_selecting.py holds them to the same tolerance
    [name for name in method_names() if not isinstance(get_method(name), SelectionMethod)],
    ["llama", "qwen3", "gemma3"],
    list(PIECES),
    list(BATCHES),
    ["sdpa", "reference", "eager"],
    ["count", "keep", "on_top"],
]


def _valid(values: list[str]) -> bool:
    # stock eager turns its own mask into -inf in float64 and returns NaN at padded rows of sliding layers
    return not (len(values) >= 5 and values[1] == "gemma3" and values[3] == "padded" and values[4] == "eager")


PAIRWISE = [Case(*pair) for pair in AllPairs(AXES, filter_func=_valid)]
WHOLE = [Case(*values) for values in product(*AXES) if _valid(list(values))]
REST = [case for case in WHOLE if case not in set(PAIRWISE)]


def check(case: Case, family: str | None = None, limits: Budget | None = None) -> None:
    """Run one cell and compare every layer's attention and the logits."""
    model = tiny_model(family or case.family, kernel="eager" if case.kernel == "eager" else None)
    lengths = BATCHES[case.batch]
    pieces = PIECES[case.pieces]
    ids, mask, positions = batch(lengths)
    prompts = [max(1, PROMPT - (LENGTH - length)) for length in lengths]
    method = get_method(SPECS.get(case.method, case.method))
    tokens = 40 if case.prompt == "keep" else 16
    budget = limits or Budget(tokens, interval=5, sinks=2, recent=3, prompt=case.prompt) if method.bounded else None
    kernel = "reference" if case.kernel == "reference" else None
    future = None
    if method.needs.future:  # as in replay: the tokens that will be fed are known
        tokens_of = [row_ids[row_mask.bool()] for row_ids, row_mask in zip(ids, mask, strict=True)]
        unused = torch.zeros(1, dtype=torch.long)  # a trace's last token is predicted, not fed
        known = [TraceRow(row[:p], torch.cat([row[p:], unused])) for row, p in zip(tokens_of, prompts, strict=True)]
        future = FullAttention.collect(model, known)
    math = sdpa_kernel(SDPBackend.MATH) if case.kernel == "sdpa" else contextlib.nullcontext()
    log = PlanLog() if method.needs.merges or method.needs.log_mass else None
    statistics = calibration(model) if method.needs.calibration else None
    options = {"prompt_lengths": prompts, "kernel": kernel, "reference": future, "calibration": statistics}
    with CompressedCache(model, method, budget, observer=log, **options) as cache, math:
        if log is not None:
            log.cache = cache
        compressed = run_compressed(model, cache, ids, mask, positions, pieces)
    attention, logits = differences(model, compressed, ids, mask, positions, pieces, log)
    assert attention <= (1e-6 if case.kernel == "eager" else 1e-12)
    assert logits <= 1e-6
    assert cache.rows[0].state.logical == LENGTH
    if method.bounded:
        assert cache.rows[0].events > 0


@pytest.mark.parametrize("case", PAIRWISE, ids=str)
def test_compressed_attention_equals_full_attention_over_the_kept_slots(case: Case) -> None:
    check(case)


@pytest.mark.full
@pytest.mark.parametrize("case", REST, ids=str)
def test_compressed_attention_equals_full_attention_over_the_kept_slots_whole_matrix(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe", "mistral", "phi3", "gpt_oss"])
@pytest.mark.parametrize("batch_kind", list(BATCHES))
def test_every_supported_family_is_exact(family: str, batch_kind: str) -> None:
    kernel = "reference" if family == "gpt_oss" else "sdpa"
    check(Case("snapkv", family, "forward7", batch_kind, kernel, "on_top"))
    check(Case("random", family, "decode", batch_kind, kernel, "count"))


SHARES = [["snapkv", "cask", "h2o"], list(PIECES), list(BATCHES), ["count", "keep", "on_top"]]


def check_share(method: str, pieces: str, batch_kind: str, prompt: str) -> None:
    limits = Budget(keep=0.3, interval=5, sinks=1, recent=6, prompt=prompt)  # type: ignore[arg-type]
    check(Case(method, "qwen3", pieces, batch_kind, "sdpa", prompt), limits=limits)


@pytest.mark.parametrize("values", AllPairs(SHARES), ids="-".join)
def test_a_share_of_the_length_is_exact(values: list[str]) -> None:
    check_share(*values)


@pytest.mark.full
@pytest.mark.parametrize("values", product(*SHARES), ids="-".join)
def test_a_share_of_the_length_is_exact_in_every_combination(values: tuple[str, ...]) -> None:
    check_share(*values)


@pytest.mark.parametrize("batch_kind", list(BATCHES))
@pytest.mark.parametrize("method", ["random", "keydiff", "h2o"])
def test_shrunken_sinks_and_recent_tokens_are_exact(method: str, batch_kind: str) -> None:
    check(Case(method, "llama", "decode", batch_kind, "sdpa", "count"), limits=Budget(16, interval=5, prompt="count"))


def test_gpt_oss_is_exact_on_its_own_eager_attention_with_learned_sinks() -> None:
    check(Case("keydiff", "gpt_oss", "decode", "single", "eager", "count"))


def test_the_oracle_notices_one_wrong_slot() -> None:
    """The yardstick itself can fail: one kept token replaced by a dropped one is far outside the tolerance."""
    model = tiny_model("qwen3")
    ids, mask, positions = batch([LENGTH])
    budget = Budget(16, interval=5, sinks=2, recent=3, prompt="count")
    with CompressedCache(model, "random", budget) as cache:
        run = run_compressed(model, cache, ids, mask, positions, PIECES["decode"])
    held = run.kept[-1][1][0][0]
    dropped = next(token for token in range(LENGTH) if token not in held)
    held[5] = dropped
    attention, _ = differences(model, run, ids, mask, positions, PIECES["decode"])
    assert attention > 1e-6


def test_a_long_prompt_is_staged_cut_and_freed() -> None:
    """A prompt far beyond the budget attends whole, and afterwards only the budget's slots are allocated."""
    model = tiny_model("qwen3")
    ids, mask, positions = batch([300, 211])
    budget = Budget(32, interval=8, sinks=2, recent=4, prompt="count")
    pieces = [290, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]
    with CompressedCache(model, "keydiff", budget) as cache:
        run = run_compressed(model, cache, ids, mask, positions, pieces)
    assert differences(model, run, ids, mask, positions, pieces)[0] <= 1e-12
    storage = cache.compressed_layers[0].storage
    assert storage is not None
    assert storage.allocated == 40
    stats = cache.stats()
    assert stats.rows[0].physical_peak == 290
    slot = 2 * 2 * (16 + 16) * 8  # rows, KV heads, key and value, float64
    assert stats.bytes_allocated == 3 * 40 * slot
    assert stats.bytes_allocated_peak <= (2 * 40 + 290) * slot  # one layer's prompt at a time


def test_a_long_second_turn_is_staged_and_written_back() -> None:
    model = tiny_model("qwen3")
    ids, mask, positions = batch([200, 180])
    budget = Budget(32, interval=8, sinks=2, recent=4, prompt="on_top")
    pieces = [30] + [1] * 20 + [140] + [1] * 10
    with CompressedCache(model, "rkv:window=4", budget) as cache:
        run = run_compressed(model, cache, ids, mask, positions, pieces)
    assert differences(model, run, ids, mask, positions, pieces)[0] <= 1e-12
    storage = cache.compressed_layers[0].storage
    assert storage is not None
    assert storage.home is None
    assert storage.allocated == 30 + 32 + 8


def test_padding_inside_and_at_the_end_of_a_piece_is_never_stored() -> None:
    """Replay feeds rows that have ended as padding on the right; a second turn may be padded on the left."""
    model = tiny_model("llama")
    ids, mask, positions = batch([50, 50])
    mask[1, 25:30] = 0
    mask[0, 44:] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    pieces = [20, 12, 6, 6, 6]
    with CompressedCache(
        model, "random", Budget(16, interval=5, sinks=2, recent=3, prompt="count"), prompt_lengths=[20, 20]
    ) as cache:
        run = run_compressed(model, cache, ids, mask, positions, pieces)
    assert differences(model, run, ids, mask, positions, pieces)[0] <= 1e-12
    assert [row.state.logical for row in cache.rows] == [44, 45]
