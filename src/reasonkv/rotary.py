"""Rotary position embedding (RoPE) of cached keys: rotate, un-rotate, and move to another position.

Keys are cached rotated. The layout is the half-split one of Llama, Qwen, Mistral, Phi-3, Gemma and gpt-oss: dimension
f pairs with dimension F + f and turns by position x inv_freq[f]; dimensions from 2F on are not rotated.

Frequencies that depend on how long the sequence has become ("dynamic", "longrope") are refused: keys cached earlier
were rotated by other frequencies, and no stored position tells by which.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reasonkv.errors import ReasonKVError

_KNOWN = ("default", "linear", "llama3", "yarn")
_LENGTH_DEPENDENT = ("dynamic", "longrope")


class RotaryError(ReasonKVError, ValueError):
    """A rotary embedding that cannot be undone or moved correctly; the message names it."""


@dataclass(frozen=True, eq=False)
class Rotary:
    """The rotation of one layer type.

    Args:
        inv_freq: float32, radians per position of each pair; scaling variants are already in it.
        scaling: factor on every rotated vector (YaRN's attention factor, otherwise 1); un-rotating divides by it.

    """

    inv_freq: Tensor
    scaling: float = 1.0

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
        if "mrope_section" in parameters:
            raise RotaryError("Multi-axis RoPE (mrope_section) has several positions per token and is not supported.")
        if kind == "default":
            return cls(_default_inv_freq(config, parameters))
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        inv_freq, scaling = ROPE_INIT_FUNCTIONS[kind](config, None, layer_type=nested_type)
        return cls(inv_freq, float(scaling))

    def to(self, device: torch.device | str) -> Rotary:
        """The same rotation with its frequencies on a device."""
        return Rotary(self.inv_freq.to(device), self.scaling)

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """What the model caches for `x` at `positions`.

        Args:
            x: [..., N, D], any float dtype; computed in float32 (float64 for float64) and returned in its dtype.
            positions: integers that broadcast to [..., N].

        """
        return _turn(x, self._phases(x, positions), self.scaling)

    def unrotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """The inverse of `rotate`: the vector before RoPE. Arguments as there."""
        return _turn(x, -self._phases(x, positions), 1.0 / self.scaling)

    def rerotate(self, x: Tensor, from_positions: Tensor, to_positions: Tensor) -> Tensor:
        """A vector rotated for one position, as it would be at another. Arguments as in `rotate`."""
        # In float64 the difference of the two rounded angles is exact.
        turn = self._phases(x, to_positions).double() - self._phases(x, from_positions).double()
        return _turn(x, turn, 1.0)

    def _phases(self, x: Tensor, positions: Tensor) -> Tensor:
        """Angles [..., N, F]; in float32 they are the model's own, bit for bit, rounding at far positions included."""
        dtype = _compute_dtype(x)
        return positions.to(x.device, dtype).unsqueeze(-1) * self.inv_freq.to(x.device, dtype)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _turn(x: Tensor, phases: Tensor, scaling: float) -> Tensor:
    """Turn the pairs of `x` [..., N, D] by `phases` [..., N, F] and scale them."""
    F = phases.shape[-1]
    dtype = _compute_dtype(x)
    first, second, rest = x[..., :F].to(dtype), x[..., F : 2 * F].to(dtype), x[..., 2 * F :].to(dtype)
    cos, sin = phases.cos().to(dtype) * scaling, phases.sin().to(dtype) * scaling
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1).to(x.dtype)


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
    rotated = int(head_dim * (parameters.get("partial_rotary_factor") or 1.0))
    exponents = torch.arange(0, rotated, 2, dtype=torch.float) / rotated
    return torch.as_tensor(1.0 / (parameters["rope_theta"] ** exponents))
