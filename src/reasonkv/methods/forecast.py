"""Forecast: what full KV will attend to, told by a small network per KV head that was fitted to the model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reasonkv.methods.base import Requirements, ScorerMethod
from reasonkv.methods.catalogue import MethodError
from reasonkv.methods.ops import newest_attention, squared_norms, upcast
from reasonkv.methods.options import Count
from reasonkv.network import FORECAST_ATTENTION, FORECAST_FEATURES, Network
from reasonkv.view import SlotView

_WINDOW, _NEWEST = 64, 16
_LEAST = 1e-9  # attention, below which slots are alike


@dataclass(frozen=True)
class Forecast(ScorerMethod):
    """Keep what a network expects full KV to attend to, weighed by the norm of the value.

    Which token comes back into use is a property of the token, most of it: its key before RoPE tells more than any
    formula over recent queries does. So every KV head has a network of its own, fitted once to what full KV's later
    queries did (`reasonkv calibrate --forecast`, minutes on a CPU); the model itself is not changed.

    1. A slot's inputs are its key before RoPE and seven logarithms (`inputs`), or the three that need no queries.
    2. The network, one hidden layer of 32 units beside a linear map, gives the slot's score.

    It was fitted to the compactions of a bounded cache as it makes them: the target is full KV's attention still to
    come times the value's norm, as shares among the slots that may go.

    Args:
        window: newest queries that are looked at, as many as the network was fitted with: 64, or 0 for networks that
            see none (`reasonkv calibrate --forecast --without-queries`).
    """

    window: Count = _WINDOW

    @classmethod
    def fitted(cls, network: Network, head_dim: int) -> Forecast:
        """Return the method that reads this network."""
        return cls(window=_WINDOW if network.inputs == head_dim + FORECAST_FEATURES else 0)

    @property
    def needs(self) -> Requirements:
        return Requirements(queries=self.window, rotary=True, calibration=True, statistics=frozenset({"forecast"}))

    def score(self, view: SlotView) -> Tensor:
        return self.network(view)(self.inputs(view))

    def network(self, view: SlotView) -> Network:
        """Return the layer's network.

        Raises:
            MethodError: the calibration has none, or one for keys of another size.
        """
        found = None if view.calibration is None else view.calibration.forecast
        if found is None:
            raise MethodError(
                "forecast reads a network that this calibration has not; fit one with `reasonkv calibrate --forecast`."
            )
        other = {FORECAST_FEATURES: _WINDOW, FORECAST_FEATURES - FORECAST_ATTENTION: 0}
        beside_key = found.inputs - view.keys_BHND.shape[-1]
        if beside_key not in other:
            raise MethodError("The calibration's forecast was fitted to keys of another size; fit it to this model.")
        if bool(other[beside_key]) != bool(self.window):
            raise MethodError(
                f"This calibration's forecast was fitted {'without' if self.window else 'with'} queries; choose "
                f"forecast:window={other[beside_key]}."
            )
        return found

    def inputs(self, view: SlotView) -> Tensor:
        """Return what describes a slot, float32 (float64 for float64 keys) [B, H, N, D + 7], or D + 3 without queries.

        The key before RoPE in canonical order; then the logarithms of the attention that the newest queries pay to the
        slot (mean over queries and query heads; largest mean of a query head; largest mean of a query; mean over the
        newest 16), of its age in tokens, and of the norms of key and value.
        """
        assert view.rotary is not None
        keys_BHND = upcast(view.keys_BHND)
        plain_BHND = view.rotary.canonical(view.rotary.unrotate(keys_BHND, view.positions_BHN))
        age_BHN = (view.length_B[:, None, None] - view.positions_BHN).to(keys_BHND.dtype)
        logarithms = [
            age_BHN.clamp(min=1.0).log(),
            *(squared_norms(x).clamp(min=_LEAST).log() / 2 for x in (view.keys_BHND, view.values_BHND)),
        ]
        if self.window:
            attention_BHFN = newest_attention(view, _summaries)
            logarithms = [*attention_BHFN.clamp(min=_LEAST).log().unbind(2), *logarithms]
        return torch.cat([plain_BHND, torch.stack(logarithms, -1)], -1)


def _summaries(_: slice, attention_rgTN: Tensor) -> Tensor:
    """The four numbers of a slot's attention, [r, 4, N]."""
    of_query_rTN = attention_rgTN.mean(1)
    means = (of_query_rTN.mean(1), attention_rgTN.mean(2).amax(1))
    return torch.stack([*means, of_query_rTN.amax(1), of_query_rTN[:, -_NEWEST:].mean(1)], 1)
