"""SparseReader methods: all slots stay, and every decoded token reads exactly the pages its method chooses for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import batch, tiny_model
from oracle import run_compressed
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from reasonkv import Budget, CompressedCache
from reasonkv.identity import model_hash
from reasonkv.methods.quest import Quest
from reasonkv.methods.seer import SeerAttention
from reasonkv.methods.sparse_read import FullPages, PageView, SelectionMethod, best_pages
from reasonkv.plan import PlanError
from reasonkv.runtimes.transformers.attention import naive_attention
from reasonkv.runtimes.transformers.sparse_read import SparseReader
from reasonkv.seer.gate import FILE, random_gate, save_gate

LENGTHS, PROMPTS = [60, 47, 31], [24, 11, 1]
PIECES = {
    "decode": [24] + [1] * 36,
    "forward7": [24, 7, 7, 7, 7, 7, 1],
    "chunked": [8, 8, 8, 12, 12, 12],
}
C, PAGES = 4, 3
BUDGET = Budget(C * PAGES + 1, sinks=0, recent=0, prompt="count")


def tiny_gate(model: PreTrainedModel, folder: Path, page_size: int = C) -> SeerAttention:
    config = model.config
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    H = config.num_key_value_heads
    D = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = (H, config.num_attention_heads // H, D)
    path = folder / FILE
    shapes = [shape if kind == "full_attention" else None for kind in kinds]
    save_gate(path, random_gate(shapes, page_size, model_hash(model), seed=1))
    return SeerAttention(gate=str(path))


def run(model, method, budget, pieces, lengths=LENGTHS, prompts=PROMPTS, kernel=None):
    ids, mask, positions = batch(lengths)
    with CompressedCache(model, method, budget, prompt_lengths=prompts, kernel=kernel) as cache:
        out = run_compressed(model, cache, ids, mask, positions, pieces)
        return out, cache.stats(), cache, mask.bool()


# -- the yardstick: an ordinary cache under masks worked out query by query, from keys alone ---------------------------

METHODS: list[SelectionMethod] = []
ROWS: list[tuple[Tensor, list[int]]] = []


def _explicit(module, query, key, value, attention_mask, **kwargs):
    """Full attention over the slots that each query's own choice names; one query at a time, nothing shared."""
    (method,), ((mask, prompts),) = METHODS, ROWS
    prepared = method.prepare(module.reasonkv_model())
    parameters = None if prepared.layers is None else prepared.layers[module.layer_idx]
    (B, Hq, q, _), H, S, c = query.shape, key.shape[1], key.shape[2], prepared.page_size
    allowed = torch.zeros(B, Hq, q, S, dtype=torch.bool)
    for row in range(B):
        slots = mask[row, :S].nonzero()[:, 0]  # columns of the row's tokens
        for column in range(q):
            if not mask[row, S - q + column]:
                allowed[row, :, column, 0] = True
                continue
            token = int(mask[row, : S - q + column + 1].sum()) - 1
            own, first_n = token // c, torch.arange(token // c) * c
            everything = token < prompts[row] or own == 0 or module.layer_idx < method.dense
            chosen = torch.ones(Hq, own, dtype=torch.bool)
            if not everything:
                keys = key[row][:, slots[: own * c]].view(H, own, c, -1).transpose(0, 1)
                summaries = method.summarise(FullPages(keys, first_n, parameters, module.reasonkv_rotary))
                state = {name: summary.transpose(0, 1)[None] for name, summary in summaries.items()}
                at = torch.tensor([[token]])
                asked = query[row : row + 1, :, column : column + 1]
                view = PageView(state, asked, at, c, parameters, module.reasonkv_rotary)
                scores = method.score(view)[0, :, 0]
                chosen = torch.zeros(scores.shape, dtype=torch.bool)
                forced = [p for p in range(own) if p < method.first or p > own - method.last]
                for head, of_head in enumerate(scores):
                    best = sorted(range(own), key=lambda p: (p in forced, float(of_head[p]), p), reverse=True)
                    chosen[head, best[: PAGES - 1]] = True
                chosen = chosen.repeat_interleave(Hq // chosen.shape[0], 0)
            for page in range(own):
                allowed[row, :, column, slots[page * c : page * c + c]] = chosen[:, page, None]
            allowed[row, :, column, slots[own * c : token + 1]] = True
    return naive_attention(module, query, key, value, allowed, **kwargs)


AttentionInterface.register("explicit_selection", _explicit)
AttentionMaskInterface.register("explicit_selection", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def run_explicit(model, method, mask, prompts, ids, positions, pieces) -> Tensor:
    from reasonkv.rotary import Rotary

    before = model.config._attn_implementation
    rotary = Rotary.from_config(model.config, "full_attention")
    for module in model.modules():
        if hasattr(module, "layer_idx"):
            module.__dict__["reasonkv_rotary"] = rotary
            module.__dict__["reasonkv_model"] = lambda: model
    METHODS.append(method)
    ROWS.append((mask, prompts))
    model.set_attn_implementation("explicit_selection")
    cache, logits, start = DynamicCache(config=model.config), [], 0
    try:
        for size in pieces:
            end = start + size
            with torch.no_grad():
                logits.append(
                    model(
                        ids[:, start:end],
                        attention_mask=mask[:, :end].long(),
                        position_ids=positions[:, start:end],
                        past_key_values=cache,
                        use_cache=True,
                    ).logits
                )
            start = end
    finally:
        METHODS.clear()
        ROWS.clear()
        model.set_attn_implementation(before)
    return torch.cat(logits, 1)


# -- exactness ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", list(PIECES))
def test_quest_with_all_pages_selected_equals_full_attention(pieces: str) -> None:
    model = tiny_model("qwen3")
    full, _, _, real = run(model, "full", None, PIECES[pieces])
    all_pages, stats, _, _ = run(
        model, Quest(page_size=C), Budget(64, sinks=0, recent=0, prompt="count"), PIECES[pieces]
    )
    assert (all_pages.logits - full.logits)[real].abs().max() <= 1e-12
    assert stats.rows[0].slots_read_mean == stats.rows[0].physical_mean == sum(range(25, 61)) / 36


@pytest.mark.parametrize(
    "family,kernel,method",
    [
        ("qwen3", "sdpa", Quest(page_size=C)),
        ("llama", "reference", Quest(page_size=C, share="none")),
        ("qwen2", "eager", Quest(page_size=C, share="sum", first=1)),
        ("qwen3", "sdpa", Quest(page_size=C, last=2, dense=1)),
        ("qwen3", "sdpa", None),
    ],
)
def test_a_selected_run_equals_full_attention_under_an_explicit_mask(
    family: str, kernel: str, method: SelectionMethod | None, tmp_path: Path
) -> None:
    """Left-padded rows of unequal length, grouped heads, pieces of one and of many tokens."""
    model = tiny_model(family, kernel="eager" if kernel == "eager" else None)
    chosen = method or tiny_gate(model, tmp_path)
    ids, mask, positions = batch(LENGTHS)
    pieces = [24, 9, 1, 1, 1, 12, 12]
    wanted = run_explicit(model, chosen, mask.bool(), PROMPTS, ids, positions, pieces)
    found, _, _, real = run(model, chosen, BUDGET, pieces, kernel="reference" if kernel == "reference" else None)
    assert (found.logits - wanted)[real].abs().max() <= (1e-6 if kernel == "eager" else 1e-12)
    full, _, _, _ = run(model, "full", None, pieces)
    assert (found.logits - full.logits)[real].abs().max() > 1e-3  # the choice matters here


def test_gpt_oss_with_learned_sinks_and_sliding_layers_is_exact() -> None:
    model = tiny_model("gpt_oss")
    method = Quest(page_size=C)
    pieces = [20, 10, 1, 1, 8]
    budget = Budget(64, sinks=0, recent=0, prompt="count")
    full, _, _, real = run(model, "full", None, pieces, [40], [20], kernel="reference")
    found, _, _, _ = run(model, method, budget, pieces, [40], [20], kernel="reference")
    assert (found.logits - full.logits)[real].abs().max() <= 1e-12


@pytest.mark.parametrize("name", ["quest", "quest-none", "seer"])
def test_any_pieces_give_what_one_token_at_a_time_gives(name: str, tmp_path: Path) -> None:
    model = tiny_model("qwen3")
    method = (
        tiny_gate(model, tmp_path) if name == "seer" else Quest(page_size=C, share="none" if "-" in name else "max")
    )
    one, counted, _, real = run(model, method, BUDGET, PIECES["decode"])
    for pieces in ("forward7", "chunked"):
        many, stats, _, _ = run(model, method, BUDGET, PIECES[pieces])
        assert (many.logits - one.logits)[real].abs().max() <= 1e-12
        assert [row.slots_read_mean for row in stats.rows] == [row.slots_read_mean for row in counted.rows]
        assert [row.bytes_read_mean for row in stats.rows] == [row.bytes_read_mean for row in counted.rows]


def test_a_long_piece_is_masked_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("qwen3")
    whole, _, _, real = run(model, Quest(page_size=C), BUDGET, [24, 36])
    monkeypatch.setattr("reasonkv.runtimes.transformers.sparse_read.MASK_ELEMENTS", 5000)
    parts, _, _, _ = run(model, Quest(page_size=C), BUDGET, [24, 36])
    assert (whole.logits - parts.logits)[real].abs().max() <= 1e-12


def test_a_row_is_what_it_is_alone() -> None:
    model = tiny_model("qwen3")
    together, stats, _, _ = run(model, Quest(page_size=C), BUDGET, PIECES["decode"])
    alone, single, _, _ = run(model, Quest(page_size=C), BUDGET, [24] + [1] * 36, [60], [24])
    assert (together.logits[0] - alone.logits[0]).abs().max() <= 1e-9
    assert stats.rows[0] == single.rows[0]


# -- pages -------------------------------------------------------------------------------------------------------------


def test_with_the_prompt_on_top_a_row_reads_as_many_more_slots_as_its_prompt_has() -> None:
    """Rows of other prompts read other numbers of pages at once, each what it reads alone at tokens + prompt."""
    model, (ids, mask, positions), method = tiny_model("qwen3"), batch(LENGTHS), Quest(page_size=C)
    together, stats, _, _ = run(model, method, replace(BUDGET, prompt="on_top"), PIECES["decode"])
    for row, prompt in enumerate(PROMPTS):
        own, more = mask[row].bool(), replace(BUDGET, tokens=BUDGET.tokens + prompt)
        one = [tensor[row : row + 1, own] for tensor in (ids, mask, positions)]
        with CompressedCache(model, method, more, prompt_lengths=[prompt]) as cache:
            alone = run_compressed(model, cache, *one, [prompt] + [1] * (LENGTHS[row] - prompt))
            read = cache.stats().rows[0].slots_read_mean
        torch.testing.assert_close(together.logits[row, own], alone.logits[0], rtol=0, atol=1e-12)
        assert stats.rows[row].slots_read_mean == pytest.approx(read)
    assert stats.rows[0].slots_read_mean > stats.rows[2].slots_read_mean


@pytest.mark.parametrize("pieces", list(PIECES))
def test_minimum_and_maximum_of_pages_are_exact_however_they_fill(pieces: str) -> None:
    model = tiny_model("qwen3")
    _, _, cache, _ = run(model, Quest(page_size=C), BUDGET, PIECES[pieces])
    assert isinstance(cache.session.reader, SparseReader)
    for layer in cache.compressed_layers:
        assert layer.storage is not None and layer.storage.keys is not None
        state = cache.session.reader.tables[layer.index].state
        for row, length in enumerate(LENGTHS):
            for page in range(length // C):
                keys = layer.storage.keys[row, :, page * C : page * C + C]
                assert torch.equal(state["low"][row, :, page], keys.amin(1))
                assert torch.equal(state["high"][row, :, page], keys.amax(1))


def test_quest_bounds_every_product_from_above() -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(7, 2, 5, 8, generator=generator)
    queries = torch.randn(1, 4, 3, 8, generator=generator)
    method = Quest(page_size=5, share="none")
    state = {n: x.transpose(0, 1)[None] for n, x in method.summarise(FullPages(keys, torch.arange(7) * 5)).items()}
    view = PageView(state, queries, torch.full((1, 3), 35), 5)
    bound = method.score(view)
    products = torch.einsum("hgqd,nhcd->hgqnc", queries[0].view(2, 2, 3, 8), keys).amax(-1).flatten(0, 1)
    assert (bound[0] >= products - 1e-5).all()
    # one key alone in its page: the bound is the product
    state = {
        n: x.transpose(0, 1)[None] for n, x in method.summarise(FullPages(keys[:, :, :1], torch.arange(7))).items()
    }
    exact = Quest(page_size=1, share="none").score(PageView(state, queries, torch.full((1, 3), 7), 1))
    single = torch.einsum("hgqd,nhd->hgqn", queries[0].view(2, 2, 3, 8), keys[:, :, 0]).flatten(0, 1)
    torch.testing.assert_close(exact[0], single)


def test_best_pages_take_forced_ones_first_then_the_highest_and_of_equals_the_newer() -> None:
    scores = torch.tensor([[[[5.0, 1.0, 1.0, 1.0, float("inf"), 9.0]]]])
    allowed = torch.tensor([[[[True] * 5 + [False]]]])
    forced = torch.tensor([[[[False, True, False, False, False, False]]]])
    assert best_pages(scores, [4], allowed, forced).flatten().tolist() == [True, True, False, True, True, False]
    assert best_pages(scores, [1], allowed, forced).flatten().nonzero().flatten().tolist() == [1]
    assert not best_pages(scores, [0], allowed, forced).any()
    assert torch.equal(best_pages(scores, [6], allowed, forced), allowed)
    assert torch.equal(best_pages(scores, [5], allowed, forced), allowed)
    with pytest.raises(PlanError, match="NaN"):
        best_pages(scores.masked_fill(forced, float("nan")), [2], allowed, forced)
