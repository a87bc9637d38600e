"""A cache class for models that take no other than that of their own file (MiniMax's lightning attention).

MiniMax checks the class of its cache, and keeps the states of its linear layers in a list of that class. Here the class
stands behind ours, and the states are those of the stock layers, so that rows move and reset as in every hybrid.
"""

from __future__ import annotations

from typing import Any, Self

from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from reasonkv.layers import text_config


class _Lightning:
    """How MiniMax asks for the states of its linear layers."""

    layers: list[Any]
    linear_cache: tuple[Tensor, ...] = ()  # where its own class keeps them

    def get_linear_cache(self, layer_idx: int) -> Tensor | None:
        """Return the state of a linear layer, or None before the first forward."""
        state: Tensor | None = self.layers[layer_idx].recurrent_states[0]
        return state

    def set_linear_cache(self, layer_idx: int, linear_cache: Tensor) -> None:
        """Store the state of a linear layer."""
        self.layers[layer_idx].update_recurrent_state(linear_cache)


def _cache_class(base: type[Any], config: PreTrainedConfig | None) -> type[Any]:
    """Return a cache class, or one derived from it that a model takes for its own."""
    if config is None or text_config(config).model_type != "minimax":
        return base
    from transformers.models.minimax.modeling_minimax import MiniMaxCache

    bases = () if issubclass(MiniMaxCache, base) else (base,)
    return type(base.__name__, (*bases, _Lightning, MiniMaxCache), {})


def stock_cache(config: PreTrainedConfig) -> DynamicCache:
    """Return an empty stock cache that a model takes."""
    made: DynamicCache = object.__new__(_cache_class(DynamicCache, config))
    DynamicCache.__init__(made, config=config)
    return made


class FittingCache(Cache):
    """A cache of a class that its model takes."""

    def __new__(cls, model: PreTrainedModel, *args: Any, **options: Any) -> Self:
        """Make a cache of this class, derived from the model's own where that is asked for."""
        made: Self = object.__new__(_cache_class(cls, getattr(model, "config", None)))
        return made

    def __init__(self, layers: list[Any]) -> None:
        Cache.__init__(self, layers=layers)  # not that of a model's own class
