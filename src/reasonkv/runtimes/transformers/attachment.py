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
from reasonkv.runtimes.transformers.attention import PREFIX, base_kernel


class Attachment:
    """Sets a model's attention to ours and back; holds the model weakly.

    Args:
        model: the model.
        kernel: attention kernel to drive; None for the model's own.
        receive: called as `receive(cache, input_ids)` before every forward, for methods that read token ids.

    """

    def __init__(
        self, model: PreTrainedModel, kernel: str | None, receive: Callable[[object, Tensor | None], None] | None
    ) -> None:
        self._model, self._receive = weakref.ref(model), receive
        self._handle: RemovableHandle | None = None
        current = base_kernel(model.config)
        self._restore = "eager" if current == "reference" else current  # another open cache may drive our own kernel
        self._name = PREFIX + base_kernel(model.config, kernel)

    @property
    def model(self) -> PreTrainedModel | None:
        """The model, unless it is gone."""
        return self._model()

    def attach(self) -> None:
        """Set the model's attention to ours, in case another cache was attached or detached since."""
        model = self._model()
        if model is None:
            return
        if text_config(model.config)._attn_implementation != self._name:
            model.set_attn_implementation(self._name)
        if self._handle is None and self._receive is not None:
            self._handle = model.register_forward_pre_hook(self._announce, with_kwargs=True)

    def detach(self) -> None:
        """Give the model its attention back; twice is fine."""
        model = self._model()
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        if model is not None and text_config(model.config)._attn_implementation == self._name:
            model.set_attn_implementation(self._restore)

    def _announce(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if self._receive is not None:
            self._receive(kwargs.get("past_key_values"), ids if isinstance(ids, Tensor) else None)

    def twin(self, receive: Callable[[object, Tensor | None], None] | None) -> Attachment:
        """Return the attachment of a copied cache."""
        made = copy.copy(self)
        made._handle, made._receive = None, receive
        return made
