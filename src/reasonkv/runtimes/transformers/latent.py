"""Latent attention (DeepSeek's MLA): what a slot is, and the form in which methods see it.

transformers caches one latent vector c (R dimensions) and one rotated key part r per token, and expands them to keys
and values of every query head h before it attends: k_h = [U_h c, r], v_h = W_h c. Logits do not change if U_h moves to
the query: q_h . k_h = [U_h' n_h, p_h] . [c, r] for a query q_h = [n_h, p_h]. So methods see one KV head with the keys
[c, r], the values c, and the queries [U_h' n_h, p_h] of all heads: attention as engines compute it.

Legend: B rows, Hq query heads, T queries, n dimensions of a head without rotation, R latent dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

Expand = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
NAMED_LAYER = "reasonkv_layer"
"""Argument that names the cache's layer where the keys that are attended are not the ones that were cached."""


@dataclass(frozen=True)
class Expansion:
    """The linear map of one layer from latent vectors to keys and values.

    Args:
        expand: the attention module's own function of latents [B, 1, N, R] and rotated parts [B, 1, N, r].
        latent: R.
        rotated: r.
    """

    expand: Expand
    latent: int
    rotated: int

    def __deepcopy__(self, memo: dict[int, Any]) -> Expansion:
        """Return itself: the model belongs to no cache."""
        return self

    def maps(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the maps from a latent to each head's key, [Hq, R, n], and value, [Hq, R, Dv], in `like`'s dtype.

        They are what the layer makes of unit vectors, so that quantised and offloaded weights need no care.
        """
        units = torch.eye(self.latent, dtype=like.dtype, device=like.device)[None, None]
        with torch.no_grad():
            keys, values = self.expand(units, units.new_zeros(1, 1, self.latent, self.rotated))
        return keys[0, ..., : keys.shape[-1] - self.rotated], values[0]

    def shown(self, latents: Tensor, rotated: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values that methods see for what is cached, [..., R + r] and [..., R]."""
        return torch.cat([latents, rotated[..., : self.rotated]], dim=-1), latents

    def absorb(self, queries_BHqTD: Tensor) -> Tensor:
        """Return queries that fit the cached keys, [B, Hq, T, R + r], for the queries [n, r] of the model."""
        keys_HqRn, _ = self.maps(queries_BHqTD)
        n = keys_HqRn.shape[-1]
        return torch.cat([queries_BHqTD[..., :n] @ keys_HqRn.mT, queries_BHqTD[..., n:]], dim=-1)

    def project(self, output_HqDM: Tensor, like: Tensor) -> Tensor:
        """Return the output projection of latent values, [Hq, R, M], for that of the heads' values."""
        _, values_HqRD = self.maps(like)
        return values_HqRD.to(output_HqDM.dtype) @ output_HqDM


def name_layers(model: PreTrainedModel) -> list[Any]:
    """Let every latent attention of a model tell its attention function which layer of the cache it reads.

    Returns:
        Handles; removing them undoes it.
    """
    latent = [module for module in model.modules() if hasattr(module, "expand_kv")]
    return [module.register_forward_pre_hook(_name_layer, with_kwargs=True) for module in latent]


def _name_layer(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    layers = getattr(kwargs.get("past_key_values"), "layers", None)
    return (args, kwargs) if not layers else (args, {**kwargs, NAMED_LAYER: layers[module.layer_idx]})
