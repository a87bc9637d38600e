"""Statistics of a model's queries before RoPE, per layer, query head and rotary pair.

A query's rotary pair f is read as the complex number q_f = x[f] + i x[F + f] (the canonical order of
`reasonkv.rotary`), after the layer's query normalisation if it has one, and before RoPE. TriAttention and CASK score
cached keys with the mean of q_f, the mean of |q_f| and, in one variant, the mean of |q_f|^2.

Legend: L layers, Hq query heads, F rotary pairs, J future distances.
"""

from __future__ import annotations

import hashlib
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from reasonkv.errors import BudgetError, ReasonKVError
from reasonkv.layers import head_dim_of, layer_rotaries
from reasonkv.network import Network
from reasonkv.numbers import CALIBRATED, layer_shares
from reasonkv.view import LayerStatistics

_PARTS = {
    "mean_LHqF": torch.complex64, "modulus_LHqF": torch.float32, "square_LHqF": torch.float32,
    "horizon_LHqJ": torch.float32,
}  # fmt: skip
_LARGEST = 1e12
_OTHER_WEIGHTS = 0.02  # how far the norms' weights of another model are at least, as a share of their size
_TINY = torch.finfo(torch.float32).tiny


class CalibrationError(ReasonKVError, ValueError):
    """A calibration that is missing, unreadable, or made for another model; the message is one sentence."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """Statistics of all layers' queries, and the model they belong to.

    Args:
        mean_LHqF: complex64, mean of q_f.
        modulus_LHqF: float32, mean of |q_f|.
        square_LHqF: float32, mean of |q_f|^2, or None (older files have none).
        horizon_LHqJ: float32, every head's weights of the future distances 1, 2, 4, ..., or None
            (`reasonkv.calibration.horizon`).
        forecast: networks of all layers' KV heads, or None (`reasonkv.methods.forecast`).
        layer_shares: what each bounded layer should have of the slots that are not protected, relative to the others,
            with slashes between, or None (`reasonkv.evaluate.sharing`).
        norms: float32 [N], the first weights of the model's norms (`reasonkv.identity.norm_weights`), where known.
        head_dim: dimensions of a query head, those that RoPE leaves alone included.
        tokens: how many tokens were averaged, where known.
        model: hash of the model (`reasonkv.identity.model_hash`), where known.
        rope_type: the model's RoPE type, where known.
        frequencies: hash of the model's rotary frequencies (`frequencies_of`); older files have none.
        date: when it was made, ISO 8601 in UTC, where known.
        verified: made by reasonkv on the model with that hash; False for imported files.
        name: the model's name as it was given; for people, never compared.
        source: what was averaged, in words; for people.

    Raises:
        CalibrationError: shapes or dtypes that do not belong together, or values that are not finite.
    """

    mean_LHqF: Tensor
    modulus_LHqF: Tensor
    square_LHqF: Tensor | None = None
    _: KW_ONLY
    horizon_LHqJ: Tensor | None = None
    forecast: Network | None = None
    layer_shares: str | None = None
    norms: Tensor | None = None
    head_dim: int
    tokens: int | None = None
    model: str | None = None
    rope_type: str | None = None
    frequencies: str | None = None
    date: str | None = None
    verified: bool = False
    name: str | None = None
    source: str | None = None

    def __post_init__(self) -> None:
        for field, tensor in self._tensors().items():
            name, axes = field.partition("_")[0], 2 if field == "horizon_LHqJ" else 3
            if tensor.ndim != 3 or tensor.shape[:axes] != self.mean_LHqF.shape[:axes]:
                raise CalibrationError(
                    f"Calibration statistics must be [layers, query heads, rotary pairs] all alike, but the {name} is "
                    f"{list(tensor.shape)} and the mean {list(self.mean_LHqF.shape)}."
                )
            if tensor.dtype != _PARTS[field]:
                raise CalibrationError(f"The calibration's {name} must be {_PARTS[field]}, not {tensor.dtype}.")
            if tensor.numel() == 0 or not bool((tensor.abs() < _LARGEST).all()):
                raise CalibrationError(
                    f"The calibration's {name} has no values, or some that are not finite or too large."
                )
        weights = self.horizon_LHqJ
        if weights is not None and bool(((weights < 0).any(-1) | ((weights.sum(-1) - 1).abs() > 1e-3)).any()):
            raise CalibrationError(
                "The calibration's weights of future distances must not be negative, and each head's must sum to 1."
            )
        if self.forecast is not None and (not self.forecast.fits() or len(self.forecast.linear_HX) != self.layers):
            raise CalibrationError(
                f"The calibration's forecast must have a network of finite numbers per KV head of {self.layers} layers."
            )
        if self.layer_shares is not None:
            self._check_shares(self.layer_shares)
        if 2 * self.pairs > self.head_dim:
            raise CalibrationError(
                f"The calibration has {self.pairs} rotary pairs, more than fit a head_dim of {self.head_dim}."
            )

    def shares(self) -> str:
        """Return the layers' shares.

        Raises:
            CalibrationError: there are none.
        """
        if self.layer_shares is None:
            raise CalibrationError(
                "This calibration holds no layer_shares; measure them with "
                "`reasonkv calibrate --task QUESTIONS --layer-shares`, or give them as numbers."
            )
        return self.layer_shares

    @property
    def layers(self) -> int:
        """Number of layers."""
        return self.mean_LHqF.shape[0]

    @property
    def query_heads(self) -> int:
        """Number of query heads in a layer."""
        return self.mean_LHqF.shape[1]

    @property
    def pairs(self) -> int:
        """Number of rotary pairs in a head."""
        return self.mean_LHqF.shape[2]

    @property
    def digest(self) -> str:
        """Twelve hex digits of the statistics themselves, for manifests."""
        digest = hashlib.sha256()
        network = {} if self.forecast is None else self.forecast.tensors()
        for tensor in (*self._tensors().values(), *network.values()):
            real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
            digest.update(real.cpu().numpy().tobytes())
        return digest.hexdigest()[:12]

    def layer(self, index: int) -> LayerStatistics:
        """Return the statistics of one layer: views, not copies."""
        square, horizon, forecast = self.square_LHqF, self.horizon_LHqJ, self.forecast
        return LayerStatistics(
            self.mean_LHqF[index], self.modulus_LHqF[index], None if square is None else square[index],
            None if horizon is None else horizon[index], None if forecast is None else forecast.part(index),
        )  # fmt: skip

    def to(self, device: torch.device | str) -> Calibration:
        """Return the same statistics on a device."""
        moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in self._tensors().items()}
        forecast = None if self.forecast is None else self.forecast.to(device)
        return replace(self, **moved, forecast=forecast)

    def concentration_LHqF(self) -> Tensor:
        """Return R = |mean of q_f| / mean of |q_f|, float32 in [0, 1] (0 where a pair is always zero).

        1: the queries of this pair all point one way before RoPE, so that a score follows from positions alone;
        0: they point everywhere (TriAttention, section on query concentration).
        """
        return (self.mean_LHqF.abs() / self.modulus_LHqF.clamp(min=_TINY)).clamp(max=1.0)

    def concentration(self, *dims: int) -> Tensor:
        """Return the mean of R over dimensions of [L, Hq, F], weighted by |mean of q_f|; float32 in [0, 1]."""
        weight_LHqF = self.mean_LHqF.abs()
        return (weight_LHqF * self.concentration_LHqF()).sum(dims) / weight_LHqF.sum(dims).clamp(min=_TINY)

    def layer_concentrations(self) -> list[dict[str, float]]:
        """Return R of every layer: its "mean", and the "min" and "max" over its query heads."""
        heads_LHq = self.concentration(2)
        columns = (self.concentration(1, 2).tolist(), heads_LHq.amin(1).tolist(), heads_LHq.amax(1).tolist())
        return [{"mean": mean, "min": low, "max": high} for mean, low, high in zip(*columns, strict=True)]

    def check(self, config: Any, model_hash: str | None = None) -> None:
        """Refuse a model that these statistics cannot be of.

        Shapes and rotary frequencies decide. Weights may differ, as an adapter or a quantisation changes them, unless
        the file is too old to name its frequencies.

        Args:
            config: the model's transformers configuration; of a multi-modal one the text part is used.
            model_hash: the model's hash (`reasonkv.identity.model_hash`); read only where no frequencies are known.

        Raises:
            CalibrationError: another number of layers, query heads, head dimensions or rotary pairs, another RoPE
                type or other frequencies; both values are in the message.
        """
        text = config.get_text_config()
        for what, found, wanted in (
            ("layers", self.layers, text.num_hidden_layers),
            ("query heads in a layer", self.query_heads, text.num_attention_heads),
            ("dimensions in a head", self.head_dim, head_dim_of(text)),
            ("rotary pairs in a head", self.pairs, layer_rotaries(text)[0].inv_freq.numel()),
        ):
            if found != wanted:
                raise CalibrationError(f"The calibration has {found} {what}, but the model has {wanted}.")
        if self.rope_type not in (None, rope_type_of(text)):
            raise CalibrationError(
                f"The calibration was made with RoPE type {self.rope_type!r}, but the model has {rope_type_of(text)!r}."
            )
        if self.frequencies not in (None, frequencies_of(text)):
            raise CalibrationError(
                f"The calibration was made with rotary frequencies whose hash is {self.frequencies}, but this model's "
                f"is {frequencies_of(text)}: its rope_theta or its scaling is another."
            )
        if self.frequencies is None and self.model is not None and model_hash not in (None, self.model):
            raise CalibrationError(
                f"The calibration was made with the model whose hash is {self.model}, but this model's is {model_hash}."
            )

    def is_of(self, norms: Tensor | None) -> bool | None:
        """Return whether a model with these norm weights is the one it was made with, adapted or quantised perhaps.

        None: it cannot be told.
        """
        own = self.norms
        if own is None or norms is None:
            return None
        return own.shape == norms.shape and bool((own - norms).norm() < _OTHER_WEIGHTS * own.norm())

    def _check_shares(self, given: str) -> None:
        try:
            shares = layer_shares(given)
        except BudgetError as error:
            raise CalibrationError(str(error)) from None
        if shares in ("", CALIBRATED) or len(shares.split("/")) > self.layers:
            raise CalibrationError(f"The calibration's layer_shares must be a number for each layer, not {given!r}.")

    def _tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in _PARTS if getattr(self, name) is not None}


def frequencies_of(config: Any) -> str:
    """Return twelve hex digits of the rotary frequencies of all layers, and of their scaling."""
    # float32 of several machines may differ in the last bits
    numbers = [f"{x:.5e}" for one in layer_rotaries(config) for x in (*one.inv_freq.tolist(), one.scaling)]
    return hashlib.sha256(" ".join(numbers).encode()).hexdigest()[:12]


def rope_type_of(config: Any) -> str:
    """Return the RoPE type of a text configuration (of its full-attention layers where types differ)."""
    parameters = getattr(config, "rope_parameters", None) or {}
    own = parameters if "rope_type" in parameters else parameters.get("full_attention", parameters)
    return str(own.get("rope_type", "default"))
