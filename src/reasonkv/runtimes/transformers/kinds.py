"""Bounded layers that hold more than keys and values: a recurrent state, or the keys of an indexer.

An indexer chooses, for every query, the tokens it attends to (DeepSeek-V3.2, GLM-5). transformers caches one indexer
key per token. It stands here behind the slot's value, so every move of a slot moves it, too, and the indexer ranks
exactly the slots that are held. Layers that share an indexer share its choice, which is a list of slots. So they must
hold the same tokens, and carry out the plans of the layer with the indexer.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicIndexedLayer, LinearAttentionAndFullAttentionLayer, LinearAttentionLayer

from reasonkv.layers import BOUNDED, cache_layers, layer_leaders
from reasonkv.resolve import UnsupportedModelError
from reasonkv.runtimes.transformers.layer import CompressedLayer
from reasonkv.runtimes.transformers.session import Session


class CompressedHybridLayer(CompressedLayer, LinearAttentionAndFullAttentionLayer):
    """A layer that attends and carries a state (Falcon-H1, Zamba); its state stays stock.

    Args:
        session, index: as in `CompressedLayer`.
        number_of_states: states that the layer carries.
    """

    is_croppable = False

    def __init__(self, session: Session, index: int, number_of_states: int) -> None:
        CompressedLayer.__init__(self, session, index)
        LinearAttentionLayer.__init__(self, number_of_states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Allocate a state; keys and values are allocated by the first forward."""
        LinearAttentionLayer.lazy_initialization(self, *args, **kwargs)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Move rows with their beams."""
        CompressedLayer.reorder_cache(self, beam_idx)
        LinearAttentionLayer.reorder_cache(self, beam_idx)


class CompressedIndexedLayer(CompressedLayer):
    """A layer that also holds the keys of an indexer, or follows one that does.

    Args:
        session, index: as in `CompressedLayer`.
        leader: the layer whose indexer chooses for this one; itself where it has its own.
    """

    def __init__(self, session: Session, index: int, leader: int) -> None:
        super().__init__(session, index)
        self.leader = leader
        if session.kv_dtype:
            raise UnsupportedModelError("The keys of an indexer are not stored in fewer bits; leave out dtype.")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append one forward's latents; the indexer's keys follow by `update_indexer`."""
        width = value_states.shape[3]
        keys, values = super().update(key_states, nn.functional.pad(value_states, (0, self.beside)), *args, **kwargs)
        return keys, values[..., :width]

    def update_indexer(self, indexer_keys: Tensor) -> Tensor:
        """Store one forward's indexer keys [B, q, Di] beside its slots; return those of all slots, [B, width, Di]."""
        storage, forward = self.storage, self.forward
        assert storage is not None
        if not self.beside:  # the first forward of a layer with an indexer
            self.beside = indexer_keys.shape[2]
            storage.widen_values(self.beside)
        behind = storage.values[..., -self.beside :]
        storage.write(behind, indexer_keys[:, None], forward)
        return behind[:, 0, : forward.width]


def empty_layers(session: Session, config: PreTrainedConfig) -> list[Any]:
    """Return a bounded layer for every layer that grows, and the stock ones of all others."""
    layers, leaders = cache_layers(config), layer_leaders(config)
    for index, stock in enumerate(layers):
        if isinstance(stock, LinearAttentionAndFullAttentionLayer):
            layers[index] = CompressedHybridLayer(session, index, stock.number_of_states)
        elif isinstance(stock, DynamicIndexedLayer):
            layers[index] = CompressedIndexedLayer(session, index, leaders[index])
        elif type(stock) in BOUNDED:
            layers[index] = CompressedLayer(session, index)
    return layers
