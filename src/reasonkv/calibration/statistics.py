"""What calibration knows of a model: statistics of its queries before RoPE, per layer, query head and rotary pair.

A query's rotary pair f is read as the complex number q_f = x[f] + i x[F + f] (the half-split layout of
`reasonkv.rotary`), after the layer's query normalisation if it has one, and before RoPE. TriAttention and CASK score
cached keys with the mean of q_f, the mean of |q_f| and, in one variant, the mean of |q_f|^2.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from reasonkv.errors import ReasonKVError
from reasonkv.rotary import Rotary
from reasonkv.view import LayerStatistics


class CalibrationError(ReasonKVError, ValueError):
    """A calibration that is missing, unreadable, or made for another model; the message is one sentence."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """Statistics of all layers' queries, and the model they belong to; L = layers, Hq = query heads, F = rotary pairs.

    Args:
        mean_LHqF: complex64, mean of q_f.
        modulus_LHqF: float32, mean of |q_f|.
        square_LHqF: float32, mean of |q_f|^2, or None (older files have none).
        horizon_LHqJ: float32, every head's weights of the future distances 1, 2, 4, ..., or None
            (`reasonkv.calibration.horizon`).
        head_dim: dimensions of a query head, those that RoPE leaves alone included.
        tokens: how many tokens were averaged, where known.
        model: hash of the model (`reasonkv.identity.model_hash`), where known.
        rope_type: the model's RoPE type, where known.
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
    horizon_LHqJ: Tensor | None = field(default=None, kw_only=True)
    head_dim: int = field(kw_only=True)
    tokens: int | None = field(default=None, kw_only=True)
    model: str | None = field(default=None, kw_only=True)
    rope_type: str | None = field(default=None, kw_only=True)
    date: str | None = field(default=None, kw_only=True)
    verified: bool = field(default=False, kw_only=True)
    name: str | None = field(default=None, kw_only=True)
    source: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Check that the parts belong together."""
        parts = {"mean": (self.mean_LHqF, torch.complex64), "modulus": (self.modulus_LHqF, torch.float32)}
        if self.square_LHqF is not None:
            parts["square"] = (self.square_LHqF, torch.float32)
        for name, (tensor, dtype) in parts.items():
            if tensor.ndim != 3 or tensor.shape != self.mean_LHqF.shape:
                raise CalibrationError(
                    f"Calibration statistics must be [layers, query heads, rotary pairs] all alike, but the {name} is "
                    f"{list(tensor.shape)} and the mean {list(self.mean_LHqF.shape)}."
                )
            if tensor.dtype != dtype:
                raise CalibrationError(f"The calibration's {name} must be {dtype}, not {tensor.dtype}.")
            if not tensor.isfinite().all():
                raise CalibrationError(f"The calibration's {name} has values that are not finite.")
        horizon = self.horizon_LHqJ
        if horizon is not None and (
            horizon.shape[:-1] != self.mean_LHqF.shape[:-1]
            or not bool(((horizon >= 0).all(-1) & ((horizon.sum(-1) - 1).abs() < 1e-3)).all())
        ):
            raise CalibrationError(
                "The calibration's weights of future distances must be one row per layer and query head, none "
                "negative, each row summing to 1."
            )
        if 2 * self.mean_LHqF.shape[2] > self.head_dim:
            raise CalibrationError(
                f"The calibration has {self.mean_LHqF.shape[2]} rotary pairs, more than fit a head_dim of "
                f"{self.head_dim}."
            )

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
        for tensor in (self.mean_LHqF, self.modulus_LHqF, self.square_LHqF, self.horizon_LHqJ):
            if tensor is not None:
                digest.update(
                    torch.view_as_real(tensor).cpu().numpy().tobytes()
                    if tensor.is_complex()
                    else tensor.cpu().numpy().tobytes()
                )
        return digest.hexdigest()[:12]

    def layer(self, index: int) -> LayerStatistics:
        """Statistics of one layer: views, not copies."""
        square = None if self.square_LHqF is None else self.square_LHqF[index]
        horizon = None if self.horizon_LHqJ is None else self.horizon_LHqJ[index]
        return LayerStatistics(self.mean_LHqF[index], self.modulus_LHqF[index], square, horizon)

    def to(self, device: torch.device | str) -> Calibration:
        """The same statistics on a device."""
        parts = ("mean_LHqF", "modulus_LHqF", "square_LHqF", "horizon_LHqJ")
        moved: dict[str, Any] = {
            name: getattr(self, name).to(device) for name in parts if getattr(self, name) is not None
        }
        return replace(self, **moved)

    def concentration_LHqF(self) -> Tensor:
        """R = |mean of q_f| / mean of |q_f|, float32 in [0, 1] (0 where a pair is always zero).

        1: the queries of this pair all point one way before RoPE, so that a score can be told from positions alone;
        0: they point everywhere (TriAttention, section on query concentration).
        """
        modulus = self.modulus_LHqF
        ratio = self.mean_LHqF.abs() / modulus.clamp(min=torch.finfo(torch.float32).tiny)
        return ratio.clamp(max=1.0)

    def head_concentration_LHq(self) -> Tensor:
        """R of a head: the mean of its pairs' R, each weighted by |mean of q_f|; float32 in [0, 1]."""
        weight_LHqF = self.mean_LHqF.abs()
        total_LHq = weight_LHqF.sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
        return (weight_LHqF * self.concentration_LHqF()).sum(-1) / total_LHq

    def check(self, config: Any, model_hash: str | None = None) -> None:
        """Refuse a model that these statistics were not made for.

        Args:
            config: the model's transformers configuration; of a multi-modal one the text part is used.
            model_hash: the model's hash (`reasonkv.identity.model_hash`); None leaves the weights unchecked.

        Raises:
            CalibrationError: another number of layers, query heads, head dimensions or rotary pairs, another RoPE
                type, or another hash; both values are in the message.
        """
        text = config.get_text_config()
        rotary = Rotary.from_config(text, layer_type_of_rotary(text))
        comparisons: tuple[tuple[str, Any, Any], ...] = (
            ("layers", self.layers, text.num_hidden_layers),
            ("query heads in a layer", self.query_heads, text.num_attention_heads),
            ("dimensions in a head", self.head_dim, head_dim_of(text)),
            ("rotary pairs in a head", self.pairs, rotary.inv_freq.numel()),
        )
        for what, found, wanted in comparisons:
            if found != wanted:
                raise CalibrationError(f"The calibration has {found} {what}, but the model has {wanted}.")
        if self.rope_type is not None and self.rope_type != rope_type_of(text):
            raise CalibrationError(
                f"The calibration was made with RoPE type {self.rope_type!r}, but the model has {rope_type_of(text)!r}."
            )
        if self.model is not None and model_hash is not None and self.model != model_hash:
            raise CalibrationError(
                f"The calibration was made with the model whose hash is {self.model}, but this model's is {model_hash}."
            )


def head_dim_of(config: Any) -> int:
    """Dimensions of an attention head of a transformers text configuration."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def layer_type_of_rotary(config: Any) -> str | None:
    """Which RoPE entry of a text configuration stands for the model: the full-attention one where types differ."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return None if "rope_type" in parameters or "full_attention" not in parameters else "full_attention"


def rope_type_of(config: Any) -> str:
    """The RoPE type of a text configuration (of its full-attention layers where types differ)."""
    parameters = getattr(config, "rope_parameters", None) or {}
    layer_type = layer_type_of_rotary(config)
    return str((parameters[layer_type] if layer_type else parameters).get("rope_type", "default"))
