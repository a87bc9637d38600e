"""Kept slots in few bits: exact attention over what is stored, slots that do not drift, honest bytes."""

from __future__ import annotations

import copy
import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import batch, calibration, tiny_model
from oracle import PlanLog, differences, run_compressed
from tiny import TASK, tiny_loaded

from reasonkv import Budget, BudgetError, CompressedCache, SnapKV, generate_with, get_method
from reasonkv.evaluate.job import BudgetOptions, ReplayJob, TraceSettings
from reasonkv.evaluate.run import run
from reasonkv.runtimes.transformers.grids import GROUP, decode, encode, power
from reasonkv.runtimes.transformers.packed import PackedStorage, packed_slots
from reasonkv.runtimes.transformers.rotated import RotatedCodes, codebook, rotation

LENGTH, PROMPT = 132, 50
PIECES = {"decode": [PROMPT] + [1] * (LENGTH - PROMPT), "chunked": [26, 24] + [20, 1, 1] * 3 + [16]}
CASES = [
    ("snapkv:window=6", "int4", "decode", [LENGTH]),
    ("snapkv:window=6", "int8", "chunked", [LENGTH, LENGTH - 29]),
    ("cask:fold=neighbours", "int4", "decode", [LENGTH, LENGTH - 13]),  # merges, log mass, all layers at once
    ("h2o:window=90", "int4", "chunked", [LENGTH, LENGTH - 13, LENGTH - 29]),
    ("pyramidkv:window=6,beta=2", "int8", "decode", [LENGTH]),  # layers with budgets of their own
    ("vase-attnv:window=6,variant=paper", "int4", "decode", [LENGTH]),
    ("full", "int4", "decode", [LENGTH, LENGTH - 13]),
    ("rkv:window=6", "int2", "decode", [LENGTH, LENGTH - 13]),
    ("snapkv:window=6", "turbo4", "chunked", [LENGTH, LENGTH - 29]),
    ("cask:fold=neighbours", "turbo4", "decode", [LENGTH, LENGTH - 13]),
    ("h2o:window=90", "turbo2", "chunked", [LENGTH, LENGTH - 13, LENGTH - 29]),
    ("pyramidkv:window=6,beta=2", "turbo4", "decode", [LENGTH]),
    ("vase-attnv:window=6,variant=paper", "turbo4", "decode", [LENGTH]),
    ("full", "turbo4", "decode", [LENGTH, LENGTH - 13]),
    ("rkv:window=6", "turbo2", "decode", [LENGTH, LENGTH - 13]),
]


@pytest.mark.parametrize(("spec", "dtype", "pieces", "lengths"), CASES, ids=lambda value: str(value))
def test_attention_equals_full_attention_over_the_dequantised_slots(
    spec: str, dtype: str, pieces: str, lengths: list[int]
) -> None:
    model, method = tiny_model("llama"), get_method(spec)
    ids, mask, positions = batch(lengths)
    prompts = [PROMPT - (LENGTH - length) for length in lengths]
    budget = Budget(80, interval=11, sinks=2, recent=3, prompt="count") if method.bounded else None
    log, statistics = PlanLog(dtype), calibration(model) if method.needs.calibration else None
    with CompressedCache(
        model, method, budget, prompt_lengths=prompts, observer=log, calibration=statistics, dtype=dtype
    ) as cache:
        log.cache = cache
        compressed = run_compressed(model, cache, ids, mask, positions, PIECES[pieces])
    attention, logits = differences(model, compressed, ids, mask, positions, PIECES[pieces], log)
    assert attention <= 1e-12
    assert logits <= 1e-6
    assert not method.bounded or cache.rows[0].events > 0
    layer = cache.compressed_layers[0]
    assert isinstance(layer.storage, PackedStorage) and packed_slots(layer.storage.held[0]) >= GROUP


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    bits=st.sampled_from([2, 4, 8]), seed=st.integers(0, 999), shift=st.sampled_from([0.0, 5.0, 300.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)  # fmt: skip
def test_however_often_slots_are_moved_values_stay_and_keys_are_off_by_one_step_at_most(
    bits: int, seed: int, shift: float, dtype: torch.dtype
) -> None:
    draw = torch.Generator().manual_seed(seed)
    x = (torch.randn(8, 32, generator=draw) * torch.rand(8, 1, generator=draw) * 10 + shift).to(dtype)
    once = decode(encode(x, bits, 1), dtype)
    assert torch.equal(decode(encode(once, bits, 1), dtype), once)
    constant = torch.full((1, 32), shift, dtype=dtype)
    assert torch.equal(decode(encode(constant, bits, 1), dtype), constant)

    step = torch.zeros(())
    order = torch.arange(256)
    now = x.flatten()
    for _ in range(30):
        turn = torch.randperm(256, generator=draw)
        order, codes = order[turn], encode(now[turn].view(8, 32), bits, 1)
        now, step = decode(codes, dtype).flatten(), torch.maximum(step, power(codes.exponent, torch.float32).max())
    rounding = float(x.abs().max()) * torch.finfo(dtype).eps  # of the dtype that slots are unpacked to
    assert float((now.double() - x.flatten()[order].double()).abs().max()) <= float(step) + rounding


@pytest.mark.parametrize("bits", [2, 4])
def test_the_codebook_has_the_least_squared_error_for_normal_numbers(bits: int) -> None:
    points, x = codebook(bits), torch.linspace(-9, 9, 2_000_001, dtype=torch.float64)
    density = torch.exp(-x.square() / 2)
    cell = torch.bucketize(x, (points[1:] + points[:-1]) / 2)
    mass, moment = (torch.zeros(len(points)).double().index_add_(0, cell, one) for one in (density, density * x))
    torch.testing.assert_close(moment / mass, points, rtol=0, atol=1e-5)  # every point is its cell's mean
    lost = (density * (x - points[cell]).square()).sum() / density.sum()
    assert float(lost) == pytest.approx({2: 0.1175, 4: 0.0095}[bits], abs=1e-4)


def test_rotations_are_orthogonal_and_the_same_everywhere() -> None:
    for width in (1, 17, 64):
        matrix = rotation(width)
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(width).double(), rtol=0, atol=1e-12)
    assert rotation(64)[0, :3].tolist() == pytest.approx([0.2018925263, 0.2301892316, -0.0497794069], abs=1e-9)


@pytest.mark.parametrize("width", [1, 17, 64, 96])
@pytest.mark.parametrize(("bits", "most"), [(2, 0.15), (4, 0.013)])
def test_rotated_vectors_of_any_width_come_back_whatever_their_size_and_their_bias(
    width: int, bits: int, most: float
) -> None:
    draw = torch.Generator().manual_seed(width)
    x = torch.randn(2, 3, 64, width, generator=draw) * torch.logspace(-3, 3, 64)[:, None]
    offset = 1e6 * torch.randn(2, 3, 1, width, generator=draw)
    for shift, by_channel, dtype in ((0.0 * offset, False, torch.float32), (offset, True, torch.float64)):
        codes = RotatedCodes(torch.zeros(2, 3, 0, width, dtype=dtype), bits, by_channel)
        codes.resize(96)
        codes.write(slice(None), 0, shift.to(dtype).expand(2, 3, 32, width))  # the mean of keys is theirs
        codes.write(slice(None), 32, x.to(dtype) + shift)
        lost = (codes.read(slice(None), 96)[:, :, 32:] - shift - x).square().sum(3) / x.square().sum(3)
        assert float(lost.mean()) < most
        assert torch.equal(codes.read(slice(None), 32), shift.to(dtype).expand(2, 3, 32, width))


@pytest.mark.parametrize(("bits", "most"), [(2, 0.15), (4, 0.013)])
def test_channels_a_hundred_times_the_others_do_not_spoil_them(bits: int, most: float) -> None:
    x = torch.randn(1, 2, 256, 64, generator=torch.Generator().manual_seed(0))
    x[..., :4] *= 100
    x += 300 * torch.randn(1, 2, 1, 64, generator=torch.Generator().manual_seed(1))
    lost = []
    for by_channel in (True, False):
        codes = RotatedCodes(x, bits, by_channel)
        codes.resize(256)
        codes.write(slice(None), 0, x)
        lost.append(float((codes.read(slice(None), 256) - x)[..., 4:].square().mean()))
    assert lost[0] < 10 * most < lost[1] / 50


def test_a_rotated_slot_keeps_its_codes_over_fifty_compactions() -> None:
    model, held, kept = tiny_model("qwen3", torch.bfloat16), {}, 0
    limits = {"tokens": 160, "interval": 8, "recent": 8, "prompt": "count", "dtype": "turbo4", "prompt_lengths": 8}
    ids = torch.randint(5, 200, (2, 8 * 75), generator=torch.Generator().manual_seed(3))
    with CompressedCache(model, "random", **limits) as cache, torch.no_grad():
        for start in range(0, ids.shape[1], 8):
            model(ids[:, start : start + 8], past_key_values=cache)
            before, held = held, {}
            for number, layer in enumerate(cache.compressed_layers):
                for row, positions in enumerate(cache.slot_positions(number)):
                    parts = [part[row] for codes in layer.storage.packed for part in codes.stored]
                    for head, slot in itertools.product(range(2), range(packed_slots(layer.storage.held[row]))):
                        own = [part[head, slot].tolist() for part in parts]
                        held[number, row, head, int(positions[head, slot])] = own
            assert all(before[key] == own for key, own in held.items() if key in before)
            kept += len(held.keys() & before.keys())
    assert cache.rows[0].events >= 50 and kept > 50_000


@pytest.mark.parametrize("dtype", ["int4", "turbo4"])
def test_stats_count_codes_and_newest_slots_and_nothing_is_allocated_after_the_first_compaction(dtype: str) -> None:
    model, seen = tiny_model("qwen3", torch.bfloat16), set()
    with CompressedCache(model, SnapKV(window=8), tokens=256, interval=32, prompt="count", dtype=dtype) as cache:
        ids = torch.randint(5, 200, (2, 320))
        with torch.no_grad():
            model(ids[:, :300], past_key_values=cache)
            for column in range(300, 420):
                model(ids[:, column % 300][:, None], past_key_values=cache)
                seen.add(cache.stats().bytes_allocated)
    stats = cache.stats()
    found = 0
    for layer in cache.compressed_layers:
        storage = layer.storage
        assert isinstance(storage, PackedStorage)
        tensors = [*storage.packed[0].stored, *storage.packed[1].stored, *storage.tails, storage.keys, storage.values]
        tensors += [storage.packed[0].channels_BH2D] if isinstance(storage.packed[0], RotatedCodes) else []
        found += sum(tensor.nbytes for tensor in tensors)
    assert stats.bytes_allocated == found and len(seen) == 1
    row = stats.rows[0]
    packed = packed_slots(int(row.physical_terminal))
    layers, heads, width = 3, 2, 16
    # 4 bits a number; 3 bytes a grid, of 32 keys per channel and of a value's 16 channels, or 2 bytes a scale
    scales = 3 * width / 32 + 3 if dtype == "int4" else 2 * 2
    codes = packed * layers * heads * (2 * width / 2 + scales)
    channels = 0 if dtype == "int4" else layers * heads * 2 * width * 2  # mean and size, of keys
    plain = (row.physical_terminal - packed) * layers * heads * 2 * width * 2
    state = row.physical_terminal * layers * heads * 4
    ring = layers * 8 * 4 * width * 2
    assert row.bytes_in_use == codes + channels + plain + state + ring
    assert row.bytes_full == row.length * layers * heads * 2 * width * 2


@pytest.mark.parametrize("dtype", ["int8", "turbo4"])
def test_beams_copies_and_selected_rows_move_their_codes(dtype: str) -> None:
    model = tiny_model("llama", torch.float32)
    options = {"tokens": 96, "interval": 16, "prompt": "count", "recent": 8, "dtype": dtype}
    ids = torch.randint(5, 200, (3, 140), generator=torch.Generator().manual_seed(1))
    step = torch.tensor([[7], [8], [9]])
    with CompressedCache(model, SnapKV(window=8), **options) as cache, torch.no_grad():
        model(ids, past_key_values=cache)
        twin = copy.deepcopy(cache)
        expected = model(step, past_key_values=twin).logits
        cache.reorder_cache(torch.tensor([2, 0, 1]))
        cache.batch_select_indices(torch.tensor([0, 2]))
        found = model(step[[2, 1]], past_key_values=cache).logits
        torch.testing.assert_close(found, expected[[2, 1]])
    with CompressedCache(model, SnapKV(window=8), **options) as cache:
        out = model.generate(ids[:1], past_key_values=cache, max_new_tokens=40, num_beams=3, do_sample=False)
    assert out.shape == (1, 180)


def test_a_wrong_dtype_is_one_sentence_and_the_one_line_form_takes_it() -> None:
    model = tiny_model("llama", torch.float32)
    allowed = "dtype must be int8, int4, int2, turbo4 or turbo2, or None for the model's own, not 'fp8'"
    with pytest.raises(BudgetError, match=allowed):
        CompressedCache(model, SnapKV(), tokens=64, dtype="fp8")  # type: ignore[arg-type]
    decode_with = generate_with(SnapKV(window=8), tokens=96, recent=8, dtype="int4")
    model.generate(torch.randint(5, 200, (1, 60)), max_new_tokens=90, custom_generate=decode_with)
    assert decode_with.stats is not None
    assert decode_with.stats.rows[0].bytes_in_use < 0.8 * decode_with.stats.rows[0].physical_terminal * 3 * 2 * 32 * 4


@pytest.mark.parametrize("dtype", ["int4", "turbo4"])
def test_chunks_that_cross_no_packing_give_what_single_tokens_give(dtype: str) -> None:
    model, ids = tiny_model("llama"), torch.randint(5, 200, (1, 170), generator=torch.Generator().manual_seed(2))
    logits = []
    for most in (1, 1000):
        with (
            CompressedCache(
                model,
                SnapKV(window=8),
                tokens=100,
                interval=50,
                recent=8,
                prompt="count",
                dtype=dtype,
                prompt_lengths=70,
            ) as cache,
            torch.no_grad(),
        ):
            parts, start = [model(ids[:, :70], past_key_values=cache).logits], 70
            while start < 170:
                (distance,) = cache.tokens_to_next_event()
                assert distance is not None
                end = min(170, start + min(most, distance))
                parts.append(model(ids[:, start:end], past_key_values=cache).logits)
                start = end
            logits.append(torch.cat(parts, 1))
    torch.testing.assert_close(*logits, rtol=1e-9, atol=1e-9)


def test_records_of_a_replay_with_quantised_slots_say_so_and_are_smaller(tmp_path: Path) -> None:
    budget = BudgetOptions(tokens=(96,), interval=16, prompt="count")
    job = ReplayJob(
        task=TASK, methods=("full", "snapkv:window=8"), budget=budget, limit=1, traces=TraceSettings(max_new_tokens=40)
    )
    loaded, found = tiny_loaded(), {}
    for dtype in (None, "int4", "turbo2"):
        folder = tmp_path / str(dtype)
        found[dtype] = {one.method: one for one in run(job, replace(loaded, kv_dtype=dtype), folder)}
        arguments = json.loads((folder / "manifest.json").read_text())["arguments"]
        assert arguments.get("kv_dtype") == dtype
    plain, *others = found.values()
    for packed in others:
        assert packed["full"].kl == plain["full"].kl
        assert packed["snapkv"].kl != plain["snapkv"].kl
        assert packed["snapkv"].bytes_held < 0.8 * plain["snapkv"].bytes_held
