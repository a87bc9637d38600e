"""What every layer of a model keeps, by the cache layer transformers gives it, and whether it rotates its keys."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import (
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from reasonkv.rotary import Rotary, RotaryError


class CrossAttentionLayer(DynamicLayer):
    """A layer that holds the keys and values of an image, and nothing of the text (Llama 3.2 Vision)."""


BOUNDED = (DynamicLayer, DynamicIndexedLayer, LinearAttentionAndFullAttentionLayer)
"""Cache layers that grow with every token; a compressed cache puts its own in their place."""
STOCK = (
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    CrossAttentionLayer,
)
"""Cache layers of a fixed size, which stay as transformers made them."""
_OF_DECODERS = {"decoder_layers": "num_hidden_layers", "decoder_attention_heads": "num_attention_heads"}
_UNROTATED_BESIDE_SLIDING = ("afmoe", "cohere2", "cohere2_moe", "exaone4", "exaone_moe")
"""Model types that rotate in their sliding layers only, which no field of their configuration says."""


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the decoder's own configuration (multi-modal models nest it).

    Where a decoder is used without its encoder (BART, Whisper), the plain names of a configuration are the encoder's.
    """
    found = config.get_text_config(decoder=True)
    own = {plain: getattr(found, name) for name, plain in _OF_DECODERS.items() if hasattr(found, name)}
    if all(getattr(found, plain) == value for plain, value in own.items()):
        return found
    found = copy.deepcopy(found)
    for name, value in own.items():
        setattr(found, name, value)
    return found


def cache_layers(config: PreTrainedConfig) -> list[Any]:
    """Return an empty stock cache layer for every layer of a model.

    Raises:
        KeyError: a layer type that transformers has no cache for.
    """
    decoder = text_config(config)
    layers = list(DynamicCache(config=decoder).layers)
    for index in getattr(decoder, "cross_attention_layers", None) or []:
        if index < len(layers):
            layers[index] = CrossAttentionLayer()
    return layers


def bounded_layers(config: PreTrainedConfig) -> list[int]:
    """Return the layers a compressed cache bounds; the others are of a fixed size already."""
    return [index for index, layer in enumerate(cache_layers(config)) if type(layer) in BOUNDED]


def hides_nothing(config: PreTrainedConfig) -> bool:
    """Return whether all layers slide over a window as long as the context (Phi-3.5, Phi-4-mini)."""
    decoder = text_config(config)
    window, context = getattr(decoder, "sliding_window", None), getattr(decoder, "max_position_embeddings", None)
    return bool(window and context and window >= context and getattr(decoder, "layer_types", None) is None)


def is_recurrent(config: PreTrainedConfig) -> bool:
    """Return whether some layer carries a state from token to token (linear attention, Mamba, convolution)."""
    return any(isinstance(layer, LinearAttentionLayer) for layer in cache_layers(config))


def layer_rotaries(config: PreTrainedConfig) -> list[Rotary]:
    """Return how each layer rotates its keys; layers without rotation (NoPE) and without attention turn by nothing.

    A rotation by nothing keeps every formula as it is: what a method un-rotates or predicts is then the plain vector.

    Raises:
        RotaryError: RoPE that cannot be undone.
    """
    decoder, layers = text_config(config), cache_layers(config)
    if decoder.model_type == "cohere_compass_text":
        raise RotaryError("cohere_compass_text orders its rotary frequencies by axes of an image, so none is undone.")
    layers += [None] * (decoder.num_hidden_layers - len(layers))  # layers that read another layer's keys
    types = getattr(decoder, "layer_types", None) or ["full_attention"] * len(layers)
    turns = [type(layer) is not LinearAttentionLayer and _rotates(decoder, i, layers) for i, layer in enumerate(layers)]
    turned = dict.fromkeys(kind for kind, turn in zip(types, turns, strict=True) if turn)
    made = {kind: Rotary.from_config(config, kind) for kind in turned}
    pairs = [one.inv_freq.numel() for one in made.values()] or [head_dim_of(decoder) // 2]
    still = Rotary(torch.zeros(pairs[0]))
    return [made[kind] if turn else still for kind, turn in zip(types, turns, strict=True)]


def head_dim_of(config: Any) -> int:
    """Return the dimensions of an attention head of a text configuration; of the last layer, where layers differ."""
    if getattr(config, "is_heterogeneous", False):
        config = config.per_layer_config[config.num_hidden_layers - 1]
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _rotates(decoder: Any, index: int, layers: list[Any]) -> bool:
    if not getattr(decoder, "rope_parameters", None) or not getattr(decoder, "use_mem_rope", True):
        return False
    if getattr(decoder, "position_embedding_type", "rope") != "rope":  # Granite 4 leaves it empty for NoPE
        return False
    listed = getattr(decoder, "no_rope_layers", None)  # 1 where a layer does rotate
    if listed:
        return bool(listed[index])
    if decoder.model_type not in _UNROTATED_BESIDE_SLIDING:
        return True
    slides = [isinstance(layer, DynamicSlidingWindowLayer) for layer in layers]
    return slides[index] or not any(slides)


def layer_readers(config: PreTrainedConfig, layer: int) -> int:
    """Return how many layers attend to what one layer caches: itself, and the last ones if they share its keys."""
    shared = getattr(text_config(config), "num_kv_shared_layers", None) or 0
    if not shared:
        return 1
    types = text_config(config).layer_types
    is_last_of_its_type = types[layer] not in types[layer + 1 : -shared]
    return 1 + (types[-shared:].count(types[layer]) if is_last_of_its_type else 0)


def is_indexed(config: PreTrainedConfig) -> bool:
    """Return whether some layer attends to the tokens that an indexer chose among those it caches (DeepSeek-V3.2)."""
    return any(isinstance(layer, DynamicIndexedLayer) for layer in cache_layers(config))


def layer_leaders(config: PreTrainedConfig) -> list[int]:
    """Return for every layer the one whose indexer chooses its tokens: itself, or an earlier layer (GLM-5)."""
    decoder = text_config(config)
    kinds = getattr(decoder, "indexer_types", None) or ["full"] * decoder.num_hidden_layers
    leaders: list[int] = []
    for layer, kind in enumerate(kinds):
        leaders.append(leaders[-1] if kind == "shared" and leaders else layer)
    return leaders


def is_latent(config: PreTrainedConfig) -> bool:
    """Return whether a decoder's keys and values come from one latent vector per token (MLA)."""
    return bool(getattr(config, "kv_lora_rank", None))


def hide_unchosen(mask: Tensor, chosen_Bqk: Tensor) -> Tensor:
    """Return an attention mask that also hides what an indexer did not choose.

    Args:
        mask: boolean or additive, [B, 1, q, W].
        chosen_Bqk: columns chosen for every query.
    """
    hidden = torch.ones_like(mask, dtype=torch.bool).scatter(-1, chosen_Bqk[:, None].long(), False)
    return mask & ~hidden if mask.dtype == torch.bool else mask.masked_fill(hidden, float("-inf"))
