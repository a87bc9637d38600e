"""What a model's cache takes, by kind of layer: measured on a model without weights, from its configuration alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicSlidingWindowLayer, LinearAttentionCacheLayerMixin

from reasonkv.errors import ReasonKVError
from reasonkv.layers import BOUNDED, head_dim_of, is_latent, is_recurrent, text_config
from reasonkv.runtimes.transformers.lightning import stock_cache

_TOKENS = 2  # fed to the model without weights


class FootprintError(ReasonKVError, ValueError):
    """A model whose cache cannot be measured without weights."""


@dataclass(frozen=True)
class LayerKind:
    """The layers of one kind, together, for one sequence."""

    kind: str  # as the configuration calls it
    layers: int  # how many
    bounded: bool  # whether a compressed cache bounds them
    bytes_per_token: int  # of keys and values, as transformers caches them
    bytes_fixed: int  # of states that do not grow
    window: int | None = None  # most tokens they hold, or None

    def bytes_at(self, tokens: int, budget: int | None = None) -> int:
        """Return the bytes after so many tokens; with a budget, bounded layers keep no more than it."""
        limits = [tokens, self.window, budget if self.bounded else None]
        return self.bytes_fixed + self.bytes_per_token * min(limit for limit in limits if limit is not None)


@torch.no_grad()
def footprint(config: PreTrainedConfig) -> list[LayerKind]:
    """Return the kinds of layers of a model, and what they keep in the model's dtype (bfloat16 where it names none).

    Raises:
        FootprintError: the model cannot be run without weights.
    """
    dtype = text_config(config).dtype or torch.bfloat16
    cache = stock_cache(config)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
            model.set_experts_implementation("batched_mm")  # the others look at what the router chose
            model(torch.zeros(1, _TOKENS, dtype=torch.long), past_key_values=cache, use_cache=True)
    except Exception as error:  # an architecture may look at numbers, which are not there
        if is_recurrent(config) or is_latent(text_config(config)):
            raise FootprintError(f"The cache of {config.model_type} cannot be measured without weights.") from error
        _fill_plainly(cache, text_config(config), dtype)
    types = getattr(text_config(config), "layer_types", None) or []
    kinds: dict[tuple[str, bool, int | None], LayerKind] = {}
    for index, layer in enumerate(cache.layers):
        window = layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None
        kind = types[index] if index < len(types) else "full_attention" if window is None else "sliding_attention"
        key = (kind.replace("_", " "), type(layer) in BOUNDED, window)
        one = kinds.get(key) or LayerKind(key[0], 0, key[1], 0, 0, window)
        per_token = _nbytes([getattr(layer, name, None) for name in ("keys", "values", "indexer_keys")]) // _TOKENS
        is_state = isinstance(layer, LinearAttentionCacheLayerMixin)
        fixed = _nbytes([*layer.conv_states.values(), *layer.recurrent_states.values()]) if is_state else 0
        grown = (one.layers + 1, one.bounded, one.bytes_per_token + per_token, one.bytes_fixed + fixed)
        kinds[key] = LayerKind(one.kind, *grown, window)
    return list(kinds.values())


def total_bytes(kinds: Sequence[LayerKind], tokens: int, budget: int | None = None) -> int:
    """Return the bytes of one sequence's cache after so many tokens, with a budget in tokens or with full KV."""
    return sum(one.bytes_at(tokens, budget) for one in kinds)


def _fill_plainly(cache: DynamicCache, decoder: PreTrainedConfig, dtype: torch.dtype) -> None:
    """Give every layer the keys and values of plain attention, by its own numbers of heads and dimensions."""
    for layer, own in zip(cache.layers, decoder.per_layer_config, strict=False):
        heads = getattr(own, "num_key_value_heads", None) or own.num_attention_heads
        shape = (1, heads, _TOKENS, head_dim_of(own))
        layer.keys, layer.values = (torch.empty(shape, dtype=dtype, device="meta") for _ in range(2))


def _nbytes(tensors: Sequence[Tensor | None]) -> int:
    return sum(one.nbytes for one in tensors if one is not None)
