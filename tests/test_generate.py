"""Plain `generate` with a compressed cache: every decoding mode, batches, turns, dtypes, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from models import batch, calibration, tiny_model
from transformers import DynamicCache, PreTrainedTokenizerFast, TextIteratorStreamer, pipeline

import reasonkv
from reasonkv import Budget, BudgetError, CompressedCache, UnsupportedModelError, get_method, method_names

FAMILIES = ["llama", "qwen2", "qwen3", "qwen3_moe", "mistral", "phi3", "gemma3", "gpt_oss"]
BUDGET = Budget(24, interval=8, sinks=2, recent=6, prompt="count")
# a method that looks into the future is for replay: what is generated cannot be known beforehand
BOUNDED = [
    name
    for name in method_names()
    if get_method(name).bounded and not get_method(name).needs.future and name != "seer"  # tiny models have no gate
]
SPECS = {
    "snapkv": "snapkv:window=6",
    "rkv": "rkv:window=6",
    "vase-attnv": "vase-attnv:window=6",
    "vase-dkv": "vase-dkv:window=6",
    "chunkkv": "chunkkv:base=snapkv:window=6;kernel=3,chunk=3",
    "defensivekv": "defensivekv:window=6",
    "pyramidkv": "pyramidkv:window=6",
    "adakv": "adakv:base=snapkv:window=6",
    "beaconkv": "beaconkv:beacons=4,window=4,recent=6",
    "random-attention": "random-attention:recent=6",
    "gkv": "gkv:window=4",
    "ams": "ams:base=snapkv:window=6;kernel=3,window=6,least=4",
    "lazyeviction": "lazyeviction:alpha=0.02",
    "raas": "raas:page=4",
    "cake": "cake:window=6",
    "rpc": "rpc:window=6",
}


def generate(model, ids, mask=None, cache=None, new=40, **options):
    mask = torch.ones_like(ids) if mask is None else mask
    with torch.no_grad():
        return model.generate(
            ids,
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=new,
            min_new_tokens=new,
            pad_token_id=0,
            **{"do_sample": False, **options},
        )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lengths", [[20], [20, 13, 7]], ids=["single", "padded"])
def test_a_budget_no_trace_reaches_changes_no_token(family: str, lengths: list[int]) -> None:
    kernel = "eager" if family == "gpt_oss" else None
    model = tiny_model(family, torch.float32, kernel)
    ids, mask, _ = batch(lengths)
    plain = generate(model, ids, mask)
    with CompressedCache(model, "snapkv", Budget(256, prompt="count")) as cache:
        assert torch.equal(generate(model, ids, mask, cache), plain)
    with CompressedCache(model, "full") as cache:
        assert torch.equal(generate(model, ids, mask, cache), plain)
    assert torch.equal(generate(model, ids, mask), plain), "the model must be as it was after close()"


@pytest.mark.parametrize("method", BOUNDED)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_batch_row_equals_the_row_alone(method: str, family: str) -> None:
    model = tiny_model(family)
    lengths, new = [20, 13, 31], 28  # in the end some rows' queries wait to be observed, and others' do not
    ids, mask, _ = batch(lengths)
    spec, statistics = SPECS.get(method, method), calibration(model)
    with CompressedCache(model, spec, BUDGET, calibration=statistics) as cache:
        together = generate(model, ids, mask, cache, new=new)
        held = [cache.slot_positions(len(cache.layers) - 1)[row] for row in range(3)]
        stats = cache.stats().rows
    for row, length in enumerate(lengths):
        with CompressedCache(model, spec, BUDGET, calibration=statistics) as cache:
            alone = generate(model, ids[row : row + 1, -length:], None, cache, new=new)
            assert torch.equal(alone[0, length:], together[row, max(lengths) :])
            assert torch.equal(cache.slot_positions(len(cache.layers) - 1)[0], held[row])
            assert cache.stats().rows[0] == stats[row]


def test_row_seeds_and_seeds_change_what_random_keeps() -> None:
    model = tiny_model("llama")
    ids, _, _ = batch([20, 20])
    ids[1] = ids[0]

    def kept(**options):
        with CompressedCache(model, "random", BUDGET, **options) as cache:
            with torch.no_grad():
                model(torch.cat([ids] * 3, 1), past_key_values=cache)
            return cache.slot_positions(0)

    same, again = kept(prompt_lengths=60), kept(prompt_lengths=60)
    assert torch.equal(same[0], same[1])
    assert torch.equal(same[0], again[0])
    assert not torch.equal(kept(prompt_lengths=60, seed=1)[0], same[0])
    other = kept(prompt_lengths=60, row_seeds=[0, 7])
    assert torch.equal(other[0], same[0])
    assert not torch.equal(other[1], same[1])


def test_greedy_decoding_stays_within_the_bound_and_reports_it() -> None:
    model = tiny_model("qwen3", torch.float32)
    ids, mask, _ = batch([50, 20])
    with CompressedCache(model, "rkv:window=6", BUDGET) as cache:
        generate(model, ids, mask, cache, new=60)
    stats = cache.stats()
    assert [row.length for row in stats.rows] == [109, 79]
    assert all(row.physical_terminal < 32 and row.physical_mean < 32 for row in stats.rows)
    assert [row.physical_peak for row in stats.rows] == [50, 32]
    assert stats.rows[0].events == 1 + (109 - 50) // 8
    assert stats.rows[0].bytes_full == 109 * 3 * 2 * (16 + 16) * 4
    held = 32 * 3 * 2 * ((16 + 16) * 4 + 4) + 3 * 4 * 6 * 16 * 4
    assert stats.rows[0].bytes_held == held
    assert str(stats).startswith("tokens seen 109 and 79, tokens kept 27 and 31, compactions 8 and 6, in use ")


def test_a_finished_generation_continues_like_one_long_one() -> None:
    for family in ("qwen3", "gemma3"):
        model = tiny_model(family)
        ids, mask, _ = batch([20, 15])
        with CompressedCache(model, "snapkv:window=6", BUDGET) as cache:
            whole = generate(model, ids, mask, cache, new=50)
        with CompressedCache(model, "snapkv:window=6", BUDGET) as cache:
            first = generate(model, ids, mask, cache, new=22)
            fed: list[int] = []
            handle = model.register_forward_pre_hook(
                lambda _, args, kwargs, fed=fed: fed.append(kwargs["input_ids"].shape[1]), with_kwargs=True
            )
            longer = torch.cat([mask, torch.ones(2, 22, dtype=torch.long)], 1)
            second = generate(model, first, longer, cache, new=28)
            handle.remove()
        assert torch.equal(second, whole)
        assert max(fed) == 1, "only the tokens the cache has not seen are fed"


def test_a_second_turn_of_several_tokens_continues() -> None:
    model = tiny_model("qwen3", torch.float32)
    ids, _, _ = batch([20])
    turn, _, _ = batch([9], seed=5)
    with CompressedCache(model, "keydiff", BUDGET) as cache:
        first = generate(model, ids, None, cache, new=30)
        generate(model, torch.cat([first, turn], 1), None, cache, new=30)
        assert cache.rows[0].state.prompt == 20
        assert cache.rows[0].state.logical == 20 + 30 + 9 + 29
    budget = Budget(24, interval=8, sinks=2, recent=6, prompt="on_top")
    with CompressedCache(model, "keydiff", budget, reopen_prompt=True) as cache:
        first = generate(model, ids, None, cache, new=30)
        generate(model, torch.cat([first, turn], 1), None, cache, new=30)
        kept = set(cache.slot_positions(0)[0][0].tolist())
        # the first generation's last token had not been fed yet, so it arrives with the second turn
        assert set(range(20)) | set(range(49, 59)) <= kept
        assert cache.rows[0].state.prompt == 30
    with CompressedCache(model, "keydiff", Budget(32, sinks=2, recent=6, prompt="keep"), reopen_prompt=True) as cache:
        first = generate(model, ids, None, cache, new=30)
        with pytest.raises(BudgetError, match="30 tokens"):
            generate(model, torch.cat([first, turn], 1), None, cache, new=5)


def test_sampling_beams_and_several_sequences() -> None:
    model = tiny_model("qwen3", torch.float32)
    ids, mask, _ = batch([20, 13])
    for options in (
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"num_beams": 2, "do_sample": True},
    ):
        torch.manual_seed(0)
        plain = generate(model, ids, mask, **options)
        torch.manual_seed(0)
        with CompressedCache(model, "snapkv:window=6", Budget(256, prompt="count")) as cache:
            assert torch.equal(generate(model, ids, mask, cache, **options), plain)
        with CompressedCache(model, "snapkv:window=6", BUDGET, prompt_lengths=[20, 13]) as cache:
            out = generate(model, ids, mask, cache, **options)
            assert out.shape == plain.shape
            assert all(row.events > 0 and row.physical_terminal <= 31 for row in cache.stats().rows)


def test_beams_carry_their_slots_with_them() -> None:
    """After a reorder every row holds what its source row held: storage, positions, queries and bookkeeping."""
    model = tiny_model("llama")
    ids, mask, _ = batch([40, 33, 27])
    with CompressedCache(model, "snapkv:window=6", BUDGET) as cache:
        generate(model, ids, mask, cache, new=20)
        before = [row.clone() for row in cache.slot_positions(1)]
        rows = [row.copy() for row in cache.rows]
        twin = copy.deepcopy(cache)
        cache.reorder_cache(torch.tensor([2, 0, 0]))
        for new, old in enumerate([2, 0, 0]):
            assert torch.equal(cache.slot_positions(1)[new], before[old])
            assert cache.rows[new] == rows[old]
            for name in ("keys", "values", "ring"):
                assert torch.equal(
                    getattr(cache.compressed_layers[1].storage, name)[new],
                    getattr(twin.compressed_layers[1].storage, name)[old],
                )
        assert [torch.equal(a, b) for a, b in zip(twin.slot_positions(1), before, strict=True)] == [True] * 3
        cache.batch_select_indices(torch.tensor([True, False, True]))
        cache.batch_repeat_interleave(2)
        assert len(cache.rows) == 4
        assert cache.compressed_layers[0].storage.keys.shape[0] == 4


def test_chunked_prefill_needs_prompt_lengths_and_then_works() -> None:
    model = tiny_model("qwen3", torch.float32)
    ids, mask, _ = batch([50, 41])
    with CompressedCache(model, "keydiff", Budget(256, prompt="count"), prompt_lengths=[50, 41]) as cache:
        chunked = generate(model, ids, mask, cache, prefill_chunk_size=16)
    assert torch.equal(chunked, generate(model, ids, mask))
    with (
        CompressedCache(model, "keydiff", Budget(256, prompt="count")) as cache,
        pytest.raises(BudgetError, match="prompt_lengths"),
    ):
        generate(model, ids, mask, cache, prefill_chunk_size=16)


def test_streamers_and_custom_generate() -> None:
    model = tiny_model("qwen3", torch.float32)
    ids, mask, _ = batch([20])
    streamed: list[int] = []

    class Collect:
        def put(self, value):
            streamed.extend(value.flatten().tolist())

        def end(self):
            streamed.append(-1)

    with CompressedCache(model, "keydiff", BUDGET) as cache:
        out = generate(model, ids, mask, cache, streamer=Collect())
    assert streamed == [*out[0].tolist(), -1]
    decode = reasonkv.generate_with("keydiff", BUDGET)
    assert torch.equal(generate(model, ids, mask, custom_generate=decode), out)
    assert decode.stats is not None
    assert decode.stats.rows[0].events > 0
    assert model.config._attn_implementation == "sdpa"
    assert TextIteratorStreamer is not None


def test_the_pipeline_takes_a_compressed_cache(word_tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model("qwen3", torch.float32)
    make = pipeline("text-generation", model=model, tokenizer=word_tokenizer)
    prompt = " ".join(f"w{i}" for i in range(5, 25))
    options = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False}
    plain = make(prompt, **options)
    with CompressedCache(model, "rkv:window=6", Budget(256, prompt="count")) as cache:
        assert make(prompt, past_key_values=cache, **options) == plain
    with CompressedCache(model, "rkv:window=6", BUDGET) as cache:
        make(prompt, past_key_values=cache, **options)
        assert cache.stats().rows[0].events > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_every_dtype_runs_and_stays_close_to_plain_generate(dtype: torch.dtype, kernel: str) -> None:
    model = tiny_model("qwen3", dtype, kernel)
    ids, mask, _ = batch([30, 22])
    if kernel == "eager" and dtype == torch.float64:
        mask[:], ids = 1, ids.clamp(min=5)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        with CompressedCache(model, "snapkv:window=6", Budget(256, prompt="count")) as cache:
            got = [model(ids[:, :20], attention_mask=mask[:, :20], past_key_values=cache).logits]
            for i in range(20, 30):
                got.append(model(ids[:, i : i + 1], attention_mask=mask[:, : i + 1], past_key_values=cache).logits)
        tolerance = {torch.bfloat16: 4e-2, torch.float16: 4e-3, torch.float32: 1e-5, torch.float64: 1e-6}[dtype]
        real = mask.bool()
        assert (torch.cat(got, 1) - expected)[real].abs().max() < tolerance
        with CompressedCache(model, "snapkv:window=6", BUDGET) as cache:
            out = generate(model, ids, mask, cache)
            assert out.shape == (2, 70)
            assert cache.compressed_layers[0].storage.keys.dtype == dtype


def test_gemma3_left_padded_beyond_its_window_keeps_its_sliding_layers_stock() -> None:
    model = tiny_model("gemma3", torch.float32)
    ids, mask, _ = batch([40, 25])
    plain = generate(model, ids, mask, new=60)
    with CompressedCache(model, "keydiff", Budget(512, prompt="count")) as cache:
        assert torch.equal(generate(model, ids, mask, cache, new=60), plain)
        # a stock cache while ours is open: bit-equal logits, before and after
        with torch.no_grad():
            ours = model(ids, attention_mask=mask, past_key_values=DynamicCache(config=model.config)).logits
    with torch.no_grad():
        stock = model(ids, attention_mask=mask, past_key_values=DynamicCache(config=model.config)).logits
    assert torch.equal(ours, stock)


def test_two_caches_on_one_model_do_not_disturb_each_other() -> None:
    model = tiny_model("qwen3", torch.float32)
    ids, mask, _ = batch([20])
    with CompressedCache(model, "keydiff", BUDGET) as alone:
        expected = generate(model, ids, mask, alone)
    first = CompressedCache(model, "keydiff", BUDGET)
    second = CompressedCache(model, "knorm", BUDGET)
    out = generate(model, ids, mask, first, new=20)
    generate(model, ids, mask, second, new=20)
    second.detach()
    longer = torch.ones_like(out)
    assert torch.equal(generate(model, out, longer, first, new=20), expected)
    first.detach()
    first.detach()
    assert model.config._attn_implementation == "sdpa"


def test_reset_makes_a_cache_new() -> None:
    model = tiny_model("qwen3", torch.float32)
    ids, mask, _ = batch([20])
    with CompressedCache(model, "random", BUDGET) as cache:
        first = generate(model, ids, mask, cache)
        cache.reset()
        assert torch.equal(generate(model, ids, mask, cache), first)
        with pytest.raises(UnsupportedModelError, match="1 rows but the forward has 2"):
            model(ids.repeat(2, 1), past_key_values=cache)
