"""A small network for every KV head of a model, which scores slots: what `reasonkv calibrate --forecast` fits.

Legend: L layers, H KV heads, X inputs, U hidden units, B rows, N slots.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_FAR = 1e4  # within float16


@dataclass(frozen=True, eq=False)
class Network:
    """score(x) = out . gelu(hidden' x + bias) + linear . x, with weights of its own for every KV head.

    Inputs beyond what the network was fitted to count as the farthest it was: older tokens as the oldest, for one.

    Args:
        hidden_HXU, bias_HU, out_HU, linear_HX: weights, float32; of all layers with an axis L in front.
        low_HX, high_HX: range of the inputs.
    """

    hidden_HXU: Tensor
    bias_HU: Tensor
    out_HU: Tensor
    linear_HX: Tensor
    low_HX: Tensor
    high_HX: Tensor

    def __call__(self, x_BHNX: Tensor) -> Tensor:
        """Return scores [B, H, N] in the dtype of the inputs; of one layer's network."""
        hidden_HXU, bias_HU, out_HU, linear_HX, low_HX, high_HX = self.to(x_BHNX.dtype).tensors().values()
        x_BHNX = x_BHNX.clamp(low_HX[:, None], high_HX[:, None])
        units_BHNU = functional.gelu(x_BHNX @ hidden_HXU + bias_HU[:, None])
        scores: Tensor = (units_BHNU @ out_HU[..., None] + x_BHNX @ linear_HX[..., None])[..., 0]
        return scores

    @property
    def inputs(self) -> int:
        """Numbers that describe a slot."""
        return self.linear_HX.shape[-1]

    @property
    def numbers(self) -> int:
        """How many numbers it consists of."""
        return sum(tensor.numel() for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Return the numbers by name: hidden, bias, out, linear, low, high."""
        return {one.name.partition("_")[0]: getattr(self, one.name) for one in fields(self)}

    def part(self, index: int | slice | list[int]) -> Network:
        """Return one layer's network, or those of some layers, or of some of one layer's heads."""
        return Network(*(tensor[index] for tensor in self.tensors().values()))

    def to(self, *args: Any) -> Network:
        """Return the same network on a device or in a dtype."""
        return replace(self, **{one.name: getattr(self, one.name).to(*args) for one in fields(self)})

    def fits(self) -> bool:
        """Return whether the shapes belong together and all numbers are finite; of all layers."""
        if self.hidden_HXU.ndim != 4 or not self.hidden_HXU.numel():
            return False
        L, H, X, U = self.hidden_HXU.shape
        fit = self.bias_HU.shape == self.out_HU.shape == (L, H, U)
        fit &= self.linear_HX.shape == self.low_HX.shape == self.high_HX.shape == (L, H, X)
        return fit and all(bool(tensor.isfinite().all()) for tensor in self.tensors().values())

    @classmethod
    def fresh(cls, layers: int, heads: int, inputs: int, units: int, seed: int = 0) -> Network:
        """Return the network before it is fitted: hidden weights of variance 1 / inputs, and scores that are all 0."""
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randn(layers, heads, inputs, units, generator=generator) * inputs**-0.5
        nothing = torch.zeros(layers, heads, units)
        linear = torch.zeros(layers, heads, inputs)
        return cls(hidden, nothing, nothing.clone(), linear, linear - _FAR, linear + _FAR)

    def of_scaled(self, mean_LHX: Tensor, deviation_LHX: Tensor) -> Network:
        """Return the network of plain inputs that scores as this one does inputs less their mean, over their deviation.

        Up to a constant of each head, which changes no order.
        """
        hidden_LHXU = self.hidden_HXU / deviation_LHX[..., None]
        bias_LHU = self.bias_HU - (mean_LHX[..., None, :] @ hidden_LHXU)[..., 0, :]
        low_LHX, high_LHX = (mean_LHX + bound * deviation_LHX for bound in (self.low_HX, self.high_HX))
        return Network(hidden_LHXU, bias_LHU, self.out_HU, self.linear_HX / deviation_LHX, low_LHX, high_LHX)


FORECAST_FEATURES, FORECAST_ATTENTION = 7, 4
"""Inputs of a forecast beside the key, and how many of them come from queries (`reasonkv.methods.forecast`)."""
