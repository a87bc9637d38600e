"""The yardstick: full attention over everything ever fed, with an explicit mask over the slots a cache kept.

A compressed run records, before every forward, which tokens each layer, row and head holds. The same pieces are then
fed to the same model with an ordinary cache and those masks; every layer's attention output must agree.

Two such runs are made. In the first, every layer is given the input it had in the compressed run, so that only
attention is compared: models round to float32 inside (norms, routers), and a difference of 1e-16 may flip such a
rounding. The second runs freely and must end in the same logits.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from reasonkv import CompressedCache
from reasonkv.runtimes.transformers.attention import reference_attention
from reasonkv.runtimes.transformers.layer import CompressedLayer

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
    inputs: list[dict[int, Tensor]] = field(default_factory=list)


def _hooks(model: PreTrainedModel, seen: dict[int, Tensor], inputs: dict[int, Tensor], forced: bool):
    def layer_input(index, args):
        if forced:
            return (inputs[index], *args[1:])
        inputs[index] = args[0].clone()
        return None

    handles = []
    for name, module in model.named_modules():
        if name.split(".")[-2:-1] == ["layers"]:
            index = int(name.split(".")[-1])
            handles.append(module.register_forward_pre_hook(lambda _, args, index=index: layer_input(index, args)))
        if name.endswith("self_attn.o_proj"):
            index = int(name.split(".")[-3])
            handles.append(
                module.register_forward_pre_hook(lambda _, args, index=index: seen.__setitem__(index, args[0].clone()))
            )
    return handles


def _forward(model, ids, mask, positions, start, end, cache, inputs=None):
    seen: dict[int, Tensor] = {}
    forced, inputs = inputs is not None, {} if inputs is None else inputs
    handles = _hooks(model, seen, inputs, forced)
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
    return logits, seen, inputs


def run_compressed(model, cache: CompressedCache, ids, mask, positions, pieces: list[int]) -> Run:
    """Feed the columns in pieces; record what every layer held before each forward."""
    run, logits, start = Run(torch.empty(0)), [], 0
    for size in pieces:
        held = {
            index: cache.slot_positions(index) if layer.storage is not None else []
            for index, layer in enumerate(cache.layers)
            if isinstance(layer, CompressedLayer)
        }
        out, seen, inputs = _forward(model, ids, mask, positions, start, start + size, cache)
        logits.append(out)
        run.attention.append(seen)
        run.inputs.append(inputs)
        run.kept.append(held)
        start += size
    run.logits = torch.cat(logits, 1)
    return run


def run_masked(model: PreTrainedModel, compressed: Run, ids, mask, positions, pieces: list[int], forced: bool) -> Run:
    """The same pieces with a full cache and explicit masks over the kept slots.

    Args:
        forced: give every layer the input it had in the compressed run.
    """
    before = model.config._attn_implementation
    model.set_attn_implementation("oracle")
    cache, run, logits, start = DynamicCache(config=model.config), Run(torch.empty(0)), [], 0
    B = ids.shape[0]
    heads, kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads
    token_of = mask.cumsum(-1) - 1  # token index of every column
    try:
        for number, (size, held) in enumerate(zip(pieces, compressed.kept, strict=True)):
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
            inputs = compressed.inputs[number] if forced else None
            out, seen, _ = _forward(model, ids, mask, positions, start, end, cache, inputs)
            logits.append(out)
            run.attention.append(seen)
            start = end
    finally:
        MASKS.clear()
        model.set_attn_implementation(before)
    run.logits = torch.cat(logits, 1)
    return run


def differences(model, compressed: Run, ids, mask, positions, pieces: list[int]) -> tuple[float, float]:
    """Largest difference to full attention over the kept slots, over real tokens.

    Returns:
        Of any layer's attention output, given equal layer inputs; and of the logits of a free run.
    """
    forced = run_masked(model, compressed, ids, mask, positions, pieces, forced=True)
    attention, start = 0.0, 0
    for size, left, right in zip(pieces, compressed.attention, forced.attention, strict=True):
        real = mask[:, start : start + size].bool()
        assert left.keys() == right.keys()
        assert left
        for layer in left:
            gaps = (left[layer] - right[layer])[real].abs()
            assert gaps.isfinite().all()
            attention = max(attention, gaps.max().item() if real.any() else 0.0)
        start += size
    free = run_masked(model, compressed, ids, mask, positions, pieces, forced=False)
    return attention, (compressed.logits - free.logits)[mask[:, :start].bool()].abs().max().item()
