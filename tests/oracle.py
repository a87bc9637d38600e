"""The yardstick: full attention over everything ever fed, with an explicit mask over the slots a cache kept.

A compressed run records, before every forward, which tokens each layer, row and head holds. The same pieces are then
fed to the same model with an ordinary cache and those masks; every layer's attention output must agree.

Two such runs are made. In the first, every layer is given the input it had in the compressed run, so that only
attention is compared: models round to float32 inside (norms, routers), and a difference of 1e-16 may flip such a
rounding. The second runs freely and must end in the same logits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from reasonkv import CompressedCache, Plan, SlotView
from reasonkv.runtimes.transformers.attention import naive_attention
from reasonkv.runtimes.transformers.layer import CompressedLayer
from reasonkv.runtimes.transformers.rotated import codebook, rotation

MASKS: dict[int, Tensor] = {}  # this test process's masks for the forward under way, by layer
FOLDED: dict[int, FoldedSlots] = {}  # and its explicit slots, where a method folds


def _oracle_attention(module, query, key, value, attention_mask, **kwargs):
    if module.layer_idx in FOLDED:
        return FOLDED[module.layer_idx].attend(query, key, value, kwargs.get("scaling")), None
    mask = MASKS.get(module.layer_idx, attention_mask)
    return naive_attention(module, query, key, value, mask, **kwargs)


AttentionInterface.register("oracle", _oracle_attention)
AttentionMaskInterface.register("oracle", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


class PlanLog:
    """A cache's observer: what its plans did, by layer and by the column its forward began at."""

    def __init__(self, dtype: str | None = None) -> None:
        self.cache: CompressedCache | None = None
        self.dtype = dtype  # of kept slots, unless it is the model's
        self.plans: dict[tuple[int, int], list[tuple[list[int], Plan, Tensor]]] = {}

    def __call__(self, layer: int, rows: list[int], view: SlotView, plan: Plan) -> None:
        done = self.plans.setdefault((layer, self.cache.columns_seen), [])
        done.append((rows, plan, view.positions_BHN.clone()))


class FoldedSlots:
    """One layer's slots as plain lists: keys, values and log mass of every row and head, folded one plan at a time."""

    def __init__(self, rows: int, heads: int, log: PlanLog, layer: int) -> None:
        self.plans = {start: done for (index, start), done in log.plans.items() if index == layer}
        self.dtype, self.packed = log.dtype, [0] * rows
        self.channels: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # mean and size of keys, by row and head
        self.rotated: dict[int, Tensor] = {}  # vectors that stand for codes, by identity
        self.slots: list[list[list[tuple[Tensor, Tensor, float]]]] = [[[] for _ in range(heads)] for _ in range(rows)]
        self.start, self.valid = 0, torch.empty(0)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """Append the newest tokens, attend to the slots one by one, then carry out this forward's plans."""
        B, Hq, q, D = query.shape
        group, out = Hq // key.shape[1], torch.zeros(B, q, Hq, value.shape[3], dtype=query.dtype)
        for row, heads in enumerate(self.slots):
            for column in range(q):
                if not self.valid[row, column]:
                    continue
                for head, slots in enumerate(heads):
                    slots.append((key[row, head, column - q], value[row, head, column - q], 0.0))
                    keys, values, mass = zip(*slots, strict=True)
                    members = slice(head * group, (head + 1) * group)
                    logits = query[row, members, column] @ torch.stack(keys).T
                    logits = logits * (D**-0.5 if scaling is None else scaling) + query.new_tensor(mass)
                    out[row, column, members] = logits.softmax(-1) @ torch.stack(values)
        for rows, plan, positions in self.plans.get(self.start, []):
            for place, row in enumerate(rows):
                for head in range(len(self.slots[row])):
                    self.slots[row][head] = self._carried_out(self.slots[row][head], plan, positions, place, head)
                self.packed[row] = 0  # groups are formed anew
        if self.dtype:
            for row in range(B):
                (self._rotate if self.dtype.startswith("turbo") else self._pack)(row)
        return out

    def _rotate(self, row: int) -> None:
        """Round the rotated slots that leave the residual to the codebook, unless they are such slots already."""
        end = max(0, len(self.slots[row][0]) - 32) // 32 * 32
        for head, slots in enumerate(self.slots[row]):
            if end and (row, head) not in self.channels:
                first = torch.stack([key for key, _, _ in slots[:end]])
                self.channels[row, head] = (first.mean(0), first.std(0, correction=0).sqrt())
            for place, (key, value, mass) in enumerate(slots[:end]):
                mean, size = self.channels[row, head]
                if id(key) not in self.rotated:
                    key = mean + size * in_codebook((key - mean) / size, int(self.dtype[-1]))
                if id(value) not in self.rotated:
                    value = in_codebook(value, int(self.dtype[-1]))
                self.rotated |= {id(key): key, id(value): value}
                slots[place] = (key, value, mass)

    def _pack(self, row: int) -> None:
        """Quantise the slots that leave the residual: 32 keys at a time per channel, and values by 32 channels."""
        held, bits = len(self.slots[row][0]), int(self.dtype[3:])
        end = max(0, held - 32) // 32 * 32
        for head in self.slots[row]:
            for start in range(self.packed[row], end, 32):
                keys, values, mass = zip(*head[start : start + 32], strict=True)
                columns = [nested(column, bits) for column in torch.stack(keys).unbind(1)]
                keys = torch.stack(columns, 1).unbind(0)
                size = 32 if len(values[0]) % 32 == 0 else len(values[0])
                values = [torch.cat([nested(part, bits) for part in value.split(size)]) for value in values]
                head[start : start + 32] = list(zip(keys, values, mass, strict=True))
        self.packed[row] = end

    def _carried_out(self, slots, plan: Plan, positions: Tensor, place: int, head: int):
        head %= plan.kept_BHK.shape[1]  # latent attention: all heads follow one plan
        kept = plan.kept_BHK[place, head].tolist()
        new = [slots[slot] for slot in kept]
        if plan.merge is not None:
            into, fold = plan.merge.into_BHN[place, head].tolist(), plan.merge
            for output, home in enumerate(kept):
                members = [slot for slot, target in enumerate(into) if target == output]
                keys = [slots[slot][0] for slot in members]
                if fold.rotary is not None:
                    at = positions[place, head]
                    keys = [fold.rotary.rerotate(k, at[slot], at[home]) for k, slot in zip(keys, members, strict=True)]
                key_weights = fold.key_weights_BHN[place, head, members].double()
                value_weights = fold.value_weights_BHN[place, head, members].double()
                key = (key_weights[:, None] * torch.stack(keys)).sum(0)
                value = (value_weights[:, None] * torch.stack([slots[slot][1] for slot in members])).sum(0)
                both = [old if old.equal(one) else one for one, old in zip((key, value), slots[home], strict=False)]
                new[output] = (*both, slots[home][2])
        if plan.log_mass_BHK is not None:
            mass = plan.log_mass_BHK[place, head].tolist()
            new = [(key, value, own) for (key, value, _), own in zip(new, mass, strict=True)]
        return new


def in_codebook(x: Tensor, bits: int) -> Tensor:
    """A vector that has, once rotated, the nearest points times the best scale."""
    turned = rotation(len(x)) @ x
    size = float(turned.norm()) / len(x) ** 0.5
    points = codebook(bits)[(codebook(bits) * size - turned[:, None]).abs().argmin(1)]
    scale = (turned @ points / (points @ points)).bfloat16().double()
    return rotation(len(x)).T @ (scale * points)


def nested(numbers: Tensor, bits: int) -> Tensor:
    """Numbers on the coarsest grid they need: multiples of the least power of two of which 2 ** bits reach from the
    smallest to the largest."""
    low, high = float(numbers.min()), float(numbers.max())
    step = 2.0 ** (math.frexp(max(-low, high))[1] - 14)
    while (high - low) / step > 2**bits - 1 or round(high / step) - round(low / step) > 2**bits - 1:
        step *= 2
    return (numbers / step).round() * step


@dataclass
class Run:
    """Outputs of a run: logits [B, n, V], and per forward and attention module its output [B, q, Hq * D]."""

    logits: Tensor
    attention: list[dict[str, Tensor]] = field(default_factory=list)
    kept: list[dict[int, list[Tensor]]] = field(default_factory=list)
    inputs: list[dict[int, Tensor]] = field(default_factory=list)


def _hooks(model: PreTrainedModel, seen: dict[str, Tensor], inputs: dict[int, Tensor], forced: bool):
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
        if name.endswith("o_proj"):
            handles.append(
                module.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0].clone()))
            )
    return handles


def _forward(model, ids, mask, positions, start, end, cache, inputs=None):
    seen: dict[str, Tensor] = {}
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


def run_compressed(model, cache: CompressedCache, ids, mask, positions, pieces: list[int], kept=None) -> Run:
    """Feed the columns in pieces; record what every layer held before each forward, unless another run's is given."""
    run, logits, start = Run(torch.empty(0)), [], 0
    for number, size in enumerate(pieces):
        held = kept[number] if kept else held_by(cache)
        out, seen, inputs = _forward(model, ids, mask, positions, start, start + size, cache)
        logits.append(out)
        run.attention.append(seen)
        run.inputs.append(inputs)
        run.kept.append(held)
        start += size
    run.logits = torch.cat(logits, 1)
    return run


def held_by(cache: CompressedCache) -> dict[int, list[Tensor]]:
    """Token indices of every bounded layer's slots, [H, P] per row."""
    return {
        index: cache.slot_positions(index) if layer.storage is not None else []
        for index, layer in enumerate(cache.layers)
        if isinstance(layer, CompressedLayer)
    }


def run_masked(
    model: PreTrainedModel, compressed: Run, ids, mask, positions, pieces: list[int], forced: bool, folds=None
) -> Run:
    """The same pieces with a full cache and explicit masks over the kept slots.

    Args:
        forced: give every layer the input it had in the compressed run.
        folds: a `PlanLog` of the run, for methods that fold: slots are then kept and folded one by one.
    """
    before = model.config._attn_implementation
    model.set_attn_implementation("oracle")
    cache, run, logits, start = DynamicCache(config=model.config), Run(torch.empty(0)), [], 0
    B = ids.shape[0]
    heads = model.config.num_attention_heads
    token_of = mask.cumsum(-1) - 1  # token index of every column
    if folds is not None:
        for layer in compressed.kept[0]:
            FOLDED[layer] = FoldedSlots(B, model.config.num_key_value_heads, folds, layer)
    try:
        for number, (size, held) in enumerate(zip(pieces, compressed.kept, strict=True)):
            end = start + size
            MASKS.clear()
            for slots in FOLDED.values():
                slots.start, slots.valid = start, mask[:, start:end].bool()
            for layer, rows in held.items():
                kv_heads = len(rows[0]) if rows else 1  # latent attention has one, whatever its configuration says
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
            for layer in range(len(cache.layers), model.config.num_hidden_layers):  # read the last layer of their type
                if model.config.layer_types[layer] == "full_attention":
                    MASKS[layer] = MASKS[max(held)]
            inputs = compressed.inputs[number] if forced else None
            out, seen, _ = _forward(model, ids, mask, positions, start, end, cache, inputs)
            logits.append(out)
            run.attention.append(seen)
            start = end
    finally:
        MASKS.clear()
        FOLDED.clear()
        model.set_attn_implementation(before)
    run.logits = torch.cat(logits, 1)
    return run


def differences(model, compressed: Run, ids, mask, positions, pieces: list[int], folds=None) -> tuple[float, float]:
    """Largest difference to full attention over the kept slots, over real tokens.

    Returns:
        Of any layer's attention output, given equal layer inputs; and of the logits of a free run.
    """
    forced = run_masked(model, compressed, ids, mask, positions, pieces, forced=True, folds=folds)
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
    free = run_masked(model, compressed, ids, mask, positions, pieces, forced=False, folds=folds)
    return attention, (compressed.logits - free.logits)[mask[:, :start].bool()].abs().max().item()
