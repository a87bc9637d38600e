"""The attention functions that compressed layers run under, and the mask function that goes with them.

Registered with transformers' public `AttentionInterface` and `AttentionMaskInterface` under `reasonkv_<kernel>`. Keys
of a compressed layer carry a reference to it; every other call goes to the stock function untouched.

Visibility needs no mask per head: every stored slot is older than every new token, so a query sees all slots up to its
own. Only log mass needs one: merged slots weigh more than one token, padding weighs nothing (-inf).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from reasonkv.layers import hide_unchosen, text_config
from reasonkv.resolve import UnsupportedModelError
from reasonkv.runtimes.transformers.forward import ForwardPlan
from reasonkv.runtimes.transformers.latent import NAMED_LAYER
from reasonkv.runtimes.transformers.masks import MORE_THAN_CAUSAL, mask_function
from reasonkv.runtimes.transformers.sparse_read import SparseReader

Attention = Callable[..., tuple[Tensor, Tensor | None]]
PREFIX = "reasonkv_"
"""Of the names that kernels are registered under."""
KERNELS = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "reference")
"""Attention implementations a compressed cache can drive."""
GROUPED_ROWS = 1024  # up to this many query rows per KV head, query heads of a group become rows of one product


@dataclass(frozen=True)
class LogitRule:
    """How a layer turns query-key products into attention logits.

    Args:
        scaling: factor on the products.
        softcap: Gemma 2's cap * tanh(x / cap), or None.
        sinks: learned sink logits [Hq] (gpt-oss), which take probability and give nothing, or None.
    """

    scaling: float
    softcap: float | None = None
    sinks: Tensor | None = None

    @classmethod
    def of(cls, query: Tensor, kwargs: dict[str, Any]) -> LogitRule:
        """From the arguments an attention function is called with."""
        scaling, sinks = kwargs.get("scaling"), kwargs.get("s_aux")
        return cls(
            scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
            softcap=kwargs.get("softcap"),
            sinks=None if sinks is None else sinks.detach(),
        )


class AttendedLayer(Protocol):
    """What attention asks of a compressed layer."""

    index: int

    @property
    def forward(self) -> ForwardPlan:
        """The forward under way."""

    @property
    def reader(self) -> SparseReader | None:
        """Chooses what this forward reads, or None."""

    def log_mass_BH1W(self, dtype: torch.dtype) -> Tensor | None:
        """What is added to every slot's logits, or None."""

    def after_attention(self, query: Tensor, rule: LogitRule, module: nn.Module) -> None:
        """Called with the rotated queries once the layer has attended."""


class SteadyReads(Protocol):
    """What attention asks of a layer whose steps have static shapes."""

    def take(self, query: Tensor) -> None:
        """Called with the rotated queries."""

    def mask(self, mask: Tensor) -> Tensor:
        """What is added to every slot's logits, given the mask of what is held."""


def base_kernel(config: PreTrainedConfig, requested: str | None = None) -> str:
    """Return the attention kernel to drive: the requested one, or the one the model is set to.

    Raises:
        UnsupportedModelError: a kernel that cannot be driven.
    """
    kernel = requested or (text_config(config)._attn_implementation or "eager").removeprefix(PREFIX)
    if kernel not in KERNELS:
        raise UnsupportedModelError(
            f"A compressed cache cannot drive the attention implementation {kernel!r}; "
            f"load the model with one of {', '.join(KERNELS[:-1])}."
        )
    return kernel


def naive_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention written out: the yardstick for the fast kernels, in the dtype of its inputs throughout.

    Args:
        query: [B, Hq, q, D]; key: [B, H, S, D]; value: [B, H, S, Dv].
        attention_mask: boolean or additive, broadcastable to [B, Hq, q, S]; None is causal, aligned to the end.
        scaling: factor on the products, D ** -0.5 by default.
        softcap: Gemma 2's cap * tanh(x / cap).
        s_aux: learned sink logits [Hq] (gpt-oss), which take probability and give nothing.

    Returns:
        [B, q, Hq, Dv] and None.
    """
    B, Hq, q, D = query.shape
    H, S = key.shape[1], key.shape[2]
    grouped = query.view(B, H, Hq // H, q, D)
    logits = torch.einsum("bhgqd,bhsd->bhgqs", grouped, key) * (D**-0.5 if scaling is None else scaling)
    logits = logits.view(B, Hq, q, S)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if attention_mask is None and q > 1:
        attention_mask = torch.ones(q, S, dtype=torch.bool, device=query.device).tril(S - q)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        logits = logits.masked_fill(~attention_mask, float("-inf"))
    elif attention_mask is not None:
        logits = logits + attention_mask
    if s_aux is not None:
        sink = s_aux.to(logits.dtype).view(1, Hq, 1, 1).expand(B, Hq, q, 1)
        weights = torch.cat([logits, sink], -1).softmax(-1)[..., :-1]
    else:
        weights = logits.softmax(-1)
    if attention_mask is not None:  # a query that sees nothing (padding) gives zeros, as in sdpa
        weights = weights.masked_fill((logits == float("-inf")).all(-1, keepdim=True), 0.0)
    out = torch.einsum("bhgqs,bhsd->bhgqd", weights.view(B, H, Hq // H, q, S), value)
    return out.reshape(B, Hq, q, -1).transpose(1, 2).contiguous(), None


def _grouped(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """Attend without repeating keys: the query heads of a group become rows of one product. [B, q, Hq, D]."""
    (B, Hq, q, _), H = query.shape, key.shape[1]
    rows = query.reshape(B, H, Hq // H * q, -1)
    attended = nn.functional.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scale)
    return attended.view(B, Hq, q, value.shape[-1]).transpose(1, 2).contiguous()


def _sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, layer: AttendedLayer, kwargs: dict[str, Any]
) -> Tensor:
    forward = layer.forward
    group, q = query.shape[1] // key.shape[1], query.shape[2]
    is_whole_prompt = forward.is_uniform and forward.columns > 1 and forward.width == forward.columns
    if is_whole_prompt or group * q > GROUPED_ROWS:
        mask = None if is_whole_prompt else _mask(layer, query)
        out: Tensor = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **kwargs)[0]
        return out
    mask = None
    if not (forward.is_uniform and q == 1):
        mask = forward.additive_mask(query.device, query.dtype, repeats=group)
    log_mass = layer.log_mass_BH1W(query.dtype)
    if log_mass is not None:
        mask = log_mass if mask is None else mask + log_mass
    return _grouped(query, key, value, mask, kwargs.get("scaling"))


def _mask(layer: AttendedLayer, query: Tensor) -> Tensor:
    """Additive mask [B, 1 or Hq, q, width]: visibility, and the log mass of slots."""
    mask = layer.forward.additive_mask(query.device, query.dtype)
    log_mass = layer.log_mass_BH1W(query.dtype)
    if log_mass is None:
        return mask
    return mask + log_mass.repeat_interleave(query.shape[1] // log_mass.shape[1], dim=1)


def _attend(
    kernel: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layer: AttendedLayer,
    kwargs: dict[str, Any],
) -> Tensor:
    chosen = kwargs.pop("indices", None)
    if chosen is not None:  # by the model's indexer, for every query
        attend = _masked_kernel(kernel, module, kwargs) or ALL_ATTENTION_FUNCTIONS["sdpa"]
        return attend(module, query, key, value, hide_unchosen(_mask(layer, query), chosen), **kwargs)[0]
    if layer.reader is not None:
        return _attend_selected(kernel, module, query, key, value, layer, layer.reader, kwargs)
    if kernel.startswith("flash"):
        if layer.log_mass_BH1W(query.dtype) is not None:
            raise UnsupportedModelError(
                "Flash attention adds nothing to logits, so slots cannot weigh more or less than one token; load the "
                "model with sdpa, or choose options without log mass (cask:mass=none, adakv:stretch=1)."
            )
        if layer.forward.is_uniform:
            # stored slots are visible to all queries, and flash aligns its causal triangle to the end: no mask needed
            out: Tensor = ALL_ATTENTION_FUNCTIONS[kernel](module, query, key, value, None, **kwargs)[0]
            return out
    masked = _masked_kernel(kernel, module, kwargs)
    if masked is not None:
        return masked(module, query, key, value, _mask(layer, query), **kwargs)[0]
    return _sdpa(module, query, key, value, layer, kwargs)


def _attend_all(
    kernel: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    kwargs: dict[str, Any],
) -> Tensor:
    """Attend with one query a row to the whole storage, under an additive mask [B, 1 or H, 1, C]."""
    masked = _masked_kernel(kernel, module, kwargs)
    if masked is None:
        return _grouped(query, key, value, mask, kwargs.get("scaling"))
    if mask.shape[1] > 1:
        mask = mask.repeat_interleave(query.shape[1] // mask.shape[1], dim=1)
    return masked(module, query, key, value, mask, **kwargs)[0]


def _attend_selected(
    kernel: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layer: AttendedLayer,
    reader: SparseReader,
    kwargs: dict[str, Any],
) -> Tensor:
    """Attend where every query reads only the slots its method selects, under a mask for every query head."""
    if kernel.startswith("flash"):
        raise UnsupportedModelError(
            "Flash attention takes no mask for every query, so nothing can be selected; load the model with sdpa."
        )
    B, H, masked = query.shape[0], key.shape[1], _masked_kernel(kernel, module, kwargs)
    parts = []
    for columns, mask in reader.masks(layer.index, query, H, layer.forward):
        asked = query[:, :, columns]
        if masked is not None:
            parts.append(masked(module, asked, key, value, mask, **kwargs)[0])
        else:
            rows = mask.reshape(B, H, -1, mask.shape[3])
            parts.append(_grouped(asked, key, value, rows, kwargs.get("scaling")))
    return torch.cat(parts, 1).contiguous()


def _masked_kernel(kernel: str, module: nn.Module, kwargs: dict[str, Any]) -> Attention | None:
    """The attention that takes a mask per query head; None where sdpa serves the model."""
    if kernel == "eager":
        return _model_eager(module)
    if kernel == "reference" or kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        return naive_attention
    return None


def _model_eager(module: nn.Module) -> Attention:
    """The eager attention of the model's own file (it knows the model's softcap and sinks)."""
    found: Attention | None = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if found is None:
        raise UnsupportedModelError(f"{type(module).__name__} has no eager attention to call; load it with sdpa.")
    return found


def _stock(kernel: str, module: nn.Module) -> Attention:
    if kernel == "eager":
        return _model_eager(module)
    if kernel == "reference":
        return naive_attention
    function: Attention = ALL_ATTENTION_FUNCTIONS[kernel]
    return function


def _attention_function(kernel: str) -> Attention:
    def forward(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        steady: SteadyReads | None = getattr(key, "reasonkv_steady", None)
        if steady is not None and attention_mask is not None:
            steady.take(query)
            kwargs.pop("dropout", None)
            return _attend_all(kernel, module, query, key, value, steady.mask(attention_mask), kwargs), None
        layer: AttendedLayer | None = getattr(key, "reasonkv_layer", None)
        named = kwargs.pop(NAMED_LAYER, None)
        if layer is None and getattr(named, "waiting", False):  # keys were expanded from what is cached
            layer = named
        if layer is None:
            return _stock(kernel, module)(module, query, key, value, attention_mask, **kwargs)
        if attention_mask is not None and "indices" not in kwargs:
            raise UnsupportedModelError(MORE_THAN_CAUSAL)
        if kwargs.get("output_attentions"):
            raise UnsupportedModelError("A compressed cache does not return attention weights; drop output_attentions.")
        kwargs.pop("dropout", None)  # a cache is for inference
        out = _attend(kernel, module, query, key, value, layer, kwargs)
        layer.after_attention(query, LogitRule.of(query, kwargs), module)
        return out, None

    return forward


for _kernel in KERNELS:
    AttentionInterface.register(PREFIX + _kernel, _attention_function(_kernel))
    AttentionMaskInterface.register(PREFIX + _kernel, mask_function(_kernel))
