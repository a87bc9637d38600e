"""The yardstick: full attention over everything ever fed, with an explicit mask over the slots a cache kept.

A compressed run records, before every forward, which tokens each layer, row and head holds. The same pieces are then
fed to the same model with an ordinary cache and those masks; every layer's attention output must agree.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from reasonkv import CompressedCache
from reasonkv.runtimes.transformers.attention import reference_attention
from reasonkv.runtimes.transformers.cache import CompressedLayer

MASKS: dict[int, Tensor] = {}  # this test process's masks for the forward under way, by layer


def _oracle_attention(module, query, key, value, attention_mask, **kwargs):
    mask = MASKS.get(module.layer_idx, attention_mask)
    return reference_attention(module, query, key, value, mask, **kwargs)


AttentionInterface.register("oracle", _oracle_attention)
AttentionMaskInterface.register("oracle", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


@dataclass
class Run:
    """Outputs of a run: logits [B, n, V], and per forward and layer the attention output [B, q, Hq * D]."""

    logits: Tensor
    attention: list[dict[int, Tensor]] = field(default_factory=list)
    kept: list[dict[int, list[Tensor]]] = field(default_factory=list)
    largest: list[int] = field(default_factory=list)


def _hooks(model: PreTrainedModel, seen: dict[int, Tensor]):
    handles = []
    for name, module in model.named_modules():
        if name.endswith("self_attn.o_proj"):
            index = int(name.split(".")[-3])
            handles.append(
                module.register_forward_pre_hook(lambda _, args, index=index: seen.__setitem__(index, args[0].clone()))
            )
    return handles


def _forward(model, ids, mask, positions, start, end, cache) -> tuple[Tensor, dict[int, Tensor]]:
    seen: dict[int, Tensor] = {}
    handles = _hooks(model, seen)
    try:
        with torch.no_grad():
            logits = model(
                ids[:, start:end],
                attention_mask=mask[:, :end],
                position_ids=positions[:, start:end],
                past_key_values=cache,
                use_cache=True,
            ).logits
    finally:
        for handle in handles:
            handle.remove()
    return logits, seen


def run_compressed(model, cache: CompressedCache, ids, mask, positions, pieces: list[int]) -> Run:
    """Feed the columns in pieces; record what every layer held before each forward."""
    run, logits, start = Run(torch.empty(0)), [], 0
    for size in pieces:
        held = {
            index: cache.slot_positions(index) if layer.storage is not None else []
            for index, layer in enumerate(cache.layers)
            if isinstance(layer, CompressedLayer)
        }
        out, seen = _forward(model, ids, mask, positions, start, start + size, cache)
        logits.append(out)
        run.attention.append(seen)
        run.kept.append(held)
        run.largest.append(max(row.state.held for row in cache.rows))
        start += size
    run.logits = torch.cat(logits, 1)
    return run


def run_masked(model: PreTrainedModel, kept, ids, mask, positions, pieces: list[int]) -> Run:
    """The same pieces with a full cache and explicit masks over the kept slots."""
    before = model.config._attn_implementation
    model.set_attn_implementation("oracle")
    cache, run, logits, start = DynamicCache(config=model.config), Run(torch.empty(0)), [], 0
    B = ids.shape[0]
    heads, kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads
    token_of = mask.cumsum(-1) - 1  # token index of every column
    try:
        for size, held in zip(pieces, kept, strict=True):
            end = start + size
            MASKS.clear()
            for layer, rows in held.items():
                allowed = torch.zeros(B, kv_heads, size, end, dtype=torch.bool)
                for row in range(B):
                    for head in range(kv_heads):
                        if rows:
                            old = torch.isin(token_of[row, :start], rows[row][head]) & mask[row, :start].bool()
                            allowed[row, head, :, :start] = old
                new = torch.ones(size, size, dtype=torch.bool).tril() & mask[:, None, start:end].bool()
                allowed[..., start:] = new[:, None]
                nothing = ~allowed.any(-1, keepdim=True)  # padding queries: any finite output will do
                MASKS[layer] = (allowed | nothing).repeat_interleave(heads // kv_heads, 1)
            out, seen = _forward(model, ids, mask, positions, start, end, cache)
            logits.append(out)
            run.attention.append(seen)
            start = end
    finally:
        MASKS.clear()
        model.set_attn_implementation(before)
    run.logits = torch.cat(logits, 1)
    return run


def largest_difference(a: Run, b: Run, mask: Tensor, pieces: list[int]) -> tuple[float, float]:
    """Largest difference of any layer's attention output, and of the logits, over real tokens."""
    attention, start = 0.0, 0
    for size, left, right in zip(pieces, a.attention, b.attention, strict=True):
        real = mask[:, start : start + size].bool()
        assert left.keys() == right.keys() and left
        for layer in left:
            attention = max(attention, (left[layer] - right[layer])[real].abs().max().item() if real.any() else 0.0)
        start += size
    logits = (a.logits - b.logits)[mask[:, :start].bool()].abs().max().item()
    return attention, logits
