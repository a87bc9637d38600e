"""Rotary position embedding (RoPE) of cached keys: rotate, un-rotate, and move to another position.

Keys are cached rotated: the pair f of dimensions turns by position x inv_freq[f]. Models lay pairs out differently.
Half-split (Llama, Qwen, Mistral, gpt-oss): dimension f pairs with F + f. Interleaved (GLM, Cohere, Ernie, Llama 4): 2f
pairs with 2f + 1. What is not rotated comes after the pairs, in latent attention before them. `canonical` orders the
dimensions of any layout as half-split pairs first; nothing else needs to know the layout.

Frequencies that depend on how long the sequence has become ("dynamic", "longrope") are refused: keys cached earlier
were rotated by other frequencies, and no stored position tells by which. RoPE of several axes (images) is that of one
axis for text, whose positions are equal on all axes. `RotaryLimits` says what a sequence must not do.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from reasonkv.errors import ReasonKVError

_KNOWN = ("default", "linear", "llama3", "yarn", "proportional")
_LENGTH_DEPENDENT = ("dynamic", "longrope")
# tests/test_layouts.py measures the layout of every architecture on a model of it
_INTERLEAVED = (
    "cohere", "cohere2", "cohere2_moe", "deepseek_v2", "ernie4_5", "ernie4_5_moe", "ernie4_5_vl_moe_text", "glm",
    "glm4", "glm4v_text", "glm_ocr_text", "helium", "llama4_text",
)  # fmt: skip
_BACKWARD = ("nanochat",)  # turn the other way


class RotaryError(ReasonKVError, ValueError):
    """A rotary embedding that cannot be undone or moved correctly; the message names it."""


@dataclass(frozen=True, eq=False)
class Rotary:
    """The rotation of one layer type.

    Args:
        inv_freq: float32, radians per position of each pair; scaling variants are already in it.
        scaling: factor on every rotated vector (YaRN's attention factor, otherwise 1); un-rotating divides by it.
        interleaved: dimensions 2f and 2f + 1 are a pair, instead of f and F + f.
        at_end: the last 2F dimensions are rotated (latent attention), instead of the first.
    """

    inv_freq: Tensor
    scaling: float = 1.0
    interleaved: bool = False
    at_end: bool = False

    @classmethod
    def from_config(cls, config: Any, layer_type: str | None = None) -> Rotary:
        """Read a transformers configuration.

        Args:
            config: a `PreTrainedConfig`; of a multi-modal one the text part is used.
            layer_type: which entry to read where the model rotates its layer types differently (Gemma 3:
                "full_attention" or "sliding_attention"); ignored where it does not.

        Raises:
            RotaryError: a variant whose frequencies depend on the sequence's length or that is not known, or a
                missing or unknown layer type.
        """
        config = copy.deepcopy(config.get_text_config())  # transformers' functions complete the parameters in place
        config.standardize_rope_params()
        parameters, nested_type = _select(getattr(config, "rope_parameters", None), layer_type)
        kind = parameters.get("rope_type", "default")
        if kind in _LENGTH_DEPENDENT:
            raise RotaryError(
                f"RoPE type {kind!r} changes its frequencies with the sequence's length, so cached keys cannot be "
                "un-rotated from their positions; use a model with default, linear, llama3 or yarn RoPE."
            )
        if kind not in _KNOWN:
            raise RotaryError(f"RoPE type {kind!r} is not supported; known: {', '.join(_KNOWN)}.")
        direction = -1.0 if config.model_type in _BACKWARD else 1.0
        layout = (config.model_type in _INTERLEAVED, bool(getattr(config, "kv_lora_rank", None)))
        if nested_type is not None and getattr(config, "is_heterogeneous", False):  # layers differ in their head size
            config = config.per_layer_config[nested_type]
        if kind == "default":
            return cls(direction * _default_inv_freq(config, parameters), 1.0, *layout)
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        inv_freq, scaling = ROPE_INIT_FUNCTIONS[kind](config, None, layer_type=nested_type)
        return cls(direction * inv_freq, float(scaling), *layout)

    def to(self, device: torch.device | str) -> Rotary:
        """The same rotation with its frequencies on a device."""
        return replace(self, inv_freq=self.inv_freq.to(device))

    def canonical(self, x: Tensor) -> Tensor:
        """Return the dimensions of `x` [..., D] ordered as half-split pairs and then the rest; often `x` itself."""
        order = self._order(x)
        return x if order is None else x[..., order]

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """What the model caches for `x` at `positions`.

        Args:
            x: [..., N, D], any float dtype; computed in float32 (float64 for float64) and returned in its dtype.
            positions: integers that broadcast to [..., N].
        """
        return self._turn(x, self._phases(x, positions), self.scaling)

    def unrotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """The inverse of `rotate`: the vector before RoPE. Arguments as there."""
        return self._turn(x, -self._phases(x, positions), 1.0 / self.scaling)

    def rerotate(self, x: Tensor, from_positions: Tensor, to_positions: Tensor) -> Tensor:
        """A vector rotated for one position, as it would be at another. Arguments as in `rotate`."""
        # In float64 the difference of the two rounded angles is exact.
        turn = self._phases(x, to_positions).double() - self._phases(x, from_positions).double()
        return self._turn(x, turn, 1.0)

    def _phases(self, x: Tensor, positions: Tensor) -> Tensor:
        """Angles [..., N, F]; in float32 they are the model's own, bit for bit, rounding at far positions included."""
        dtype = _compute_dtype(x)
        return positions.to(x.device, dtype).unsqueeze(-1) * self.inv_freq.to(x.device, dtype)

    def _order(self, x: Tensor) -> Tensor | None:
        """Return the dimension of `x` that stands at each place of the canonical order; None: they stand so already."""
        if not (self.interleaved or self.at_end):
            return None
        D, rotated = x.shape[-1], 2 * self.inv_freq.numel()
        start = D - rotated if self.at_end else 0
        pairs = torch.arange(start, start + rotated, device=x.device)
        if self.interleaved:
            pairs = torch.cat([pairs[0::2], pairs[1::2]])
        rest = torch.arange(D - rotated, device=x.device) + (0 if self.at_end else rotated)
        return torch.cat([pairs, rest])

    def _turn(self, x: Tensor, phases: Tensor, scaling: float) -> Tensor:
        """Turn the pairs of `x` [..., D] by `phases` [..., N, F] and scale them."""
        F, dtype, order = phases.shape[-1], _compute_dtype(x), self._order(x)
        ordered = x if order is None else x[..., order]
        first, second, rest = ordered[..., :F].to(dtype), ordered[..., F : 2 * F].to(dtype), ordered[..., 2 * F :]
        cos, sin = phases.cos().to(dtype) * scaling, phases.sin().to(dtype) * scaling
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin, rest.to(dtype)], dim=-1).to(x.dtype)
        return turned if order is None else turned[..., order.argsort()]


@dataclass(frozen=True)
class RotaryLimits:
    """What a sequence must not do once keys are kept."""

    # tokens after which the model changes its frequencies and computes its cache anew (longrope), or None
    switch: int | None = None
    has_axes: bool = False  # tokens of images and videos have several positions

    @classmethod
    def of(cls, config: Any) -> RotaryLimits:
        """Read a transformers configuration; of a multi-modal one the text part."""
        text = config.get_text_config()
        nested = getattr(text, "rope_parameters", None) or {}
        all_types = [nested, *(one for one in nested.values() if isinstance(one, Mapping))]
        switches = [
            one.get("original_max_position_embeddings") or getattr(text, "original_max_position_embeddings", None)
            for one in all_types
            if one.get("rope_type") == "longrope" and one.get("short_factor") != one.get("long_factor")
        ]
        return cls(next(iter(switches), None), any("mrope_section" in one for one in all_types))


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _select(parameters: Any, layer_type: str | None) -> tuple[Mapping[str, Any], str | None]:
    """The parameters of one layer type, and the key they are nested under (None where they are not)."""
    if not isinstance(parameters, Mapping) or not parameters:
        raise RotaryError("The configuration has no rotary position embedding.")
    if "rope_type" in parameters:
        return parameters, None
    if layer_type not in parameters:
        known = ", ".join(parameters)
        raise RotaryError(f"The model rotates its layer types differently: name one of {known}, not {layer_type!r}.")
    if not parameters[layer_type]:
        raise RotaryError(f"Layers of type {layer_type!r} have no rotary position embedding.")
    return parameters[layer_type], layer_type


def _default_inv_freq(config: Any, parameters: Mapping[str, Any]) -> Tensor:
    """rope_theta ** (-2f / d) over the rotated dimensions d, in the order of operations of the models."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if getattr(config, "kv_lora_rank", None):
        head_dim = config.qk_rope_head_dim
    rotated = int(head_dim * (parameters.get("partial_rotary_factor") or 1.0))
    exponents = torch.arange(0, rotated, 2, dtype=torch.float) / rotated
    return torch.as_tensor(1.0 / (parameters["rope_theta"] ** exponents))
