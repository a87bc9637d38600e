"""A model whose attention runs through a compressed cache, until it is given back."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from reasonkv.layers import text_config
from reasonkv.resolve import UnsupportedModelError, attends_by_itself, decoder_of
from reasonkv.rotary import RotaryLimits
from reasonkv.runtimes.transformers.attention import PREFIX, base_kernel
from reasonkv.runtimes.transformers.latent import name_layers
from reasonkv.runtimes.transformers.layer import CompressedLayer


class Attachment:
    """Sets a model's attention to ours and back; holds the model weakly.

    Args:
        model: the model.
        kernel: attention kernel to drive; None for the model's own.
        receive: called as `receive(cache, input_ids)` before every forward, for methods that read token ids.
        unrotates: the method un-rotates keys by the index of their token.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        kernel: str | None,
        receive: Callable[[object, Tensor | None], None] | None,
        unrotates: bool = False,
    ) -> None:
        self._model, self._receive = weakref.ref(model), receive
        self._handles: list[RemovableHandle] | None = None
        self._fed = 0  # columns seen after the newest forward through a compressed cache
        limits = RotaryLimits.of(model.config)
        self._switch, self._refuses_images = limits.switch, limits.has_axes and unrotates
        current = base_kernel(model.config)
        self._is_own = attends_by_itself(model)
        if self._is_own and (kernel or current).startswith("flash"):
            raise UnsupportedModelError(
                "The attention of this model takes no mask in flash attention; load it with eager."
            )
        self._restore = "eager" if current == "reference" else current  # another open cache may drive our own kernel
        self._name = PREFIX + base_kernel(model.config, kernel)

    @property
    def model(self) -> PreTrainedModel | None:
        """The model, unless it is gone."""
        return self._model()

    @property
    def is_plain(self) -> bool:
        """Whether a forward runs no hook of ours, and attends through AttentionInterface."""
        return not (self._is_own or self._refuses_images or self._handles or self._receive or self._switch)

    def attach(self) -> None:
        """Set the model's attention to ours, in case another cache was attached or detached since."""
        model = self._model()
        if model is None:
            return
        if text_config(model.config)._attn_implementation != self._name:
            self._set(model, self._name)
        if self._handles is None:
            self._handles = name_layers(model)
            if self._is_own:
                self._handles.append(decoder_of(model).register_forward_hook(_after_own_attention, with_kwargs=True))
            if self._refuses_images:
                self._handles.append(model.get_decoder().register_forward_pre_hook(_check_axes, with_kwargs=True))
            if self._receive is not None or self._switch is not None:
                self._handles.append(model.register_forward_pre_hook(self._announce, with_kwargs=True))

    def detach(self) -> None:
        """Give the model its attention back; twice is fine."""
        model = self._model()
        for handle in self._handles or []:
            handle.remove()
        self._handles = None
        if model is not None and text_config(model.config)._attn_implementation == self._name:
            self._set(model, self._restore)

    def _set(self, model: PreTrainedModel, name: str) -> None:
        if not self._is_own:
            model.set_attn_implementation(name)
            return
        for module in model.modules():  # no attention is chosen by this name, only the mask is
            if isinstance(module, PreTrainedModel):
                module.config._attn_implementation = name

    def _announce(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = kwargs.get("input_ids", args[0] if args else None)
        cache, ids = kwargs.get("past_key_values"), given if isinstance(given, Tensor) else None
        if self._receive is not None:
            self._receive(cache, ids)
        if self._switch is not None and ids is not None:
            self._check_switch(self._switch, cache, ids.shape[1])

    def _check_switch(self, switch: int, cache: object, columns: int) -> None:
        """Refuse to go beyond the length at which the model rotates by other frequencies.

        `generate` drops the cache there, and transformers 5.19 then goes on from the newest token alone.
        """
        seen: int | None = getattr(cache, "columns_seen", None)
        is_dropped = cache is None and self._fed == switch
        self._fed = 0 if seen is None else seen + columns
        if is_dropped or (seen and seen <= switch < seen + columns):
            raise UnsupportedModelError(
                f"This model changes its rotary frequencies after {switch:,} tokens, and kept keys are rotated by the "
                "old ones; end the answer before (max_new_tokens), or give a prompt that is longer."
            )

    def twin(self, receive: Callable[[object, Tensor | None], None] | None) -> Attachment:
        """Return the attachment of a copied cache."""
        made = copy.copy(self)
        made._handles, made._receive = None, receive
        return made


def _check_axes(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse a prompt whose tokens have positions that differ between axes; one token more never holds an image."""
    positions = kwargs.get("position_ids")
    if positions is None or positions.ndim < 3 or positions.shape[2] == 1:
        return
    if bool((positions[1:] != positions[1]).any()):
        raise UnsupportedModelError(
            "The tokens of images have several rotary positions, and this method un-rotates keys by one; choose a "
            "method that does not, such as snapkv, or give text alone."
        )


def _after_own_attention(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: object) -> None:
    """Compact what a forward fed, once a model has attended by code of its own in all layers."""
    heads = text_config(module.config).num_attention_heads
    for layer in getattr(kwargs.get("past_key_values"), "layers", []):
        if isinstance(layer, CompressedLayer) and layer.waiting:
            layer.after_own_attention(heads)
