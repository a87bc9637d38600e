"""The floor of a decode step, a compaction and a block of tokens: bytes and operations over a device's rates.

Counted are weights, keys and values. Not counted are activations, norms, softmax, sampling and what a method computes,
so a measured time is never below the floor by more than the error of the rates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from reasonkv.errors import ReasonKVError
from reasonkv.footprint import LayerKind, footprint
from reasonkv.layers import is_latent, text_config
from reasonkv.rates import GPUS, Gpu, Rates, measure_rates

__all__ = [
    "GPUS", "FloorError", "Gpu", "Rates", "Shape", "Work", "attention_work", "compaction", "decode_step",
    "measure_rates", "prompt_tokens", "shape_of", "weights_work",
]  # fmt: skip

_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "moe_topk", "top_k_experts", "num_experts_per_token")


class FloorError(ReasonKVError, ValueError):
    """A model, an amount or a device that has no floor; the message is one sentence."""


class Work(NamedTuple):
    """What must be moved (bytes read and written) and computed (operations, a multiply-add is two)."""

    bytes: float
    operations: float = 0.0

    def seconds(self, rates: Rates) -> float:
        """Return the time the slower of the two takes, as if the other hid behind it."""
        return max(self.bytes / rates.bytes_per_second, self.operations / rates.operations_per_second)

    def plus(self, other: Work) -> Work:
        """Return both together."""
        return Work(self.bytes + other.bytes, self.operations + other.operations)


@dataclass(frozen=True)
class Shape:
    """A model's numbers of parameters, and its cache by kind of layer."""

    parameters: int  # all that must be stored; weights that are tied count once
    dense: int  # of the decoder, read by every forward; without embeddings (a row is looked up), experts and `head`
    head: int  # of the output projection
    experts: int  # of all experts together; 0 without a mixture of experts
    active: float  # share of its layer's experts that a token is routed to
    kinds: tuple[LayerKind, ...]  # what the layers keep
    element_size: int  # bytes of an element in `kinds`
    operations_per_slot: tuple[float, ...]  # of one query token's attention to one slot, in all layers of each kind

    def weights_read(self, tokens: float) -> float:
        """Return the parameters that a forward of so many tokens reads, if the router picks experts evenly."""
        touched: float = 1 - (1 - self.active) ** tokens
        return self.dense + self.head + self.experts * touched

    @property
    def active_parameters(self) -> float:
        """Parameters that one token is multiplied with."""
        return self.dense + self.head + self.experts * self.active


def shape_of(config: PreTrainedConfig) -> Shape:
    """Count a model's parameters and its cache on the meta device, without weights.

    Raises:
        FloorError: transformers builds no language model from this configuration.
        FootprintError: its cache cannot be measured without weights.
    """
    decoder, model = text_config(config), _without_weights(config)
    dense = experts = 0
    active = 1.0
    chosen = next((value for name in _EXPERTS_PER_TOKEN if (value := getattr(decoder, name, None))), None)
    for module in model.get_decoder().modules():
        own = list(module.parameters(recurse=False))
        if isinstance(module, nn.Embedding):
            continue
        if "Experts" in type(module).__name__ and own:
            experts += sum(one.numel() for one in own)
            active = min(active, chosen / own[0].shape[0]) if chosen else active
        else:
            dense += sum(one.numel() for one in own)
    head = model.get_output_embeddings()
    of_head = 0 if head is None else sum(one.numel() for one in head.parameters())
    kinds, size = tuple(footprint(config)), (decoder.dtype or torch.bfloat16).itemsize
    heads = decoder.num_attention_heads
    groups = heads if is_latent(decoder) else heads / (getattr(decoder, "num_key_value_heads", None) or heads)
    each = tuple(2 * groups * one.bytes_per_token / size for one in kinds)
    if is_latent(decoder):  # logits from all of the latent, values from all but its rotated part
        rotated = decoder.qk_rope_head_dim / (decoder.kv_lora_rank + decoder.qk_rope_head_dim)
        each = tuple(one * (2 - rotated) for one in each)
    stored = sum(one.numel() for one in model.parameters())
    return Shape(stored, dense, of_head, experts, active, kinds, size, each)


def decode_step(config: PreTrainedConfig | Shape, batch: int, slots: float, dtype: torch.dtype) -> Work:
    """Return what one token of every sequence in a batch must move and compute.

    Weights are read once (of experts, those that a token of the batch is routed to), keys and values of all slots are
    read, those of the token written. A recurrent layer's state is read and written.

    Args:
        config: the model's, or its `shape_of`, which is counted once for many calls.
        batch: sequences.
        slots: mean number of slots the tokens attend to per KV head, themselves among them.
        dtype: of weights, keys and values.

    Raises:
        FloorError: an amount that cannot be, or a model whose parameters cannot be counted.
        FootprintError: a model whose cache cannot be measured without weights.
    """
    _check(slots=slots)
    return prompt_tokens(config, batch, 1, slots - 1, dtype)


def prompt_tokens(config: PreTrainedConfig | Shape, batch: int, tokens: int, slots: float, dtype: torch.dtype) -> Work:
    """Return what a block of tokens at once must move and compute, with logits of each of them, as replay wants them.

    Args:
        config: the model's, or its `shape_of`.
        batch: sequences.
        tokens: of the block, of each sequence.
        slots: mean number of slots held before.
        dtype: of weights, keys and values.
    """
    shape = config if isinstance(config, Shape) else shape_of(config)
    _check(batch=batch, tokens=tokens)
    _check(0, slots=slots)
    return weights_work(shape, batch * tokens, dtype).plus(attention_work(shape, batch, tokens, slots, dtype))


def weights_work(shape: Shape, tokens: int, dtype: torch.dtype) -> Work:
    """Return what all products with weights move and compute in a forward of so many tokens."""
    return Work(dtype.itemsize * shape.weights_read(tokens), 2 * tokens * shape.active_parameters)


def attention_work(
    shape: Shape, batch: int, tokens: int, slots: float, dtype: torch.dtype, seen: float | None = None
) -> Work:
    """Return what attention, its cache and recurrent states move and compute; arguments as of `prompt_tokens`.

    Layers that no compressed cache bounds hold what they would of `seen` tokens; without it, of as many as `slots`.
    """
    moved = operations = 0.0
    for kind, per_slot in zip(shape.kinds, shape.operations_per_slot, strict=True):
        held = slots if kind.bounded or seen is None else seen
        limit = float("inf") if kind.window is None else kind.window
        read = min(held + tokens, limit + tokens - 1)  # the first token's window begins before the last one's
        moved += 2 * kind.bytes_fixed + kind.bytes_per_token * (read + tokens)
        growing = tokens if limit == float("inf") else min(max(int(limit - held), 0), tokens)
        operations += per_slot * (growing * held + growing * (growing + 1) / 2)
        operations += per_slot * (tokens - growing) * limit if growing < tokens else 0.0
    return Work(batch * moved * dtype.itemsize / shape.element_size, batch * operations)


def compaction(config: PreTrainedConfig | Shape, batch: int, held: int, kept: int, dtype: torch.dtype) -> Work:
    """Return what a compaction must move: keys and values of what stays, of all bounded layers, read and written once.

    What a method reads and computes to choose is not in it. Nothing moves where nothing is dropped.

    Args:
        config: the model's, or its `shape_of`.
        batch: sequences.
        held: slots before it, per KV head and layer.
        kept: slots after it.
        dtype: of keys and values.
    """
    shape = config if isinstance(config, Shape) else shape_of(config)
    _check(batch=batch, held=held, kept=kept)
    if kept > held:
        raise FloorError(f"A compaction cannot keep {kept:,} of {held:,} slots; kept must be at most held.")
    each = sum(one.bytes_per_token for one in shape.kinds if one.bounded) * dtype.itemsize / shape.element_size
    return Work(2 * batch * kept * each if kept < held else 0.0)


def _without_weights(config: PreTrainedConfig) -> PreTrainedModel:
    error: Exception | None = None
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        try:
            with torch.device("meta"):
                made: PreTrainedModel = auto.from_config(config, dtype=torch.bfloat16)
            return made
        except Exception as found:  # an architecture may look at numbers, which are not there
            error = error or found
    raise FloorError(f"The parameters of {config.model_type} cannot be counted without weights.") from error


def _check(least: int = 1, **amounts: float) -> None:
    for name, value in amounts.items():
        if value < least:
            raise FloorError(f"{name} must be at least {least}, not {value}.")
