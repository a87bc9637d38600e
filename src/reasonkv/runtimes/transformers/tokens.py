"""The token ids of every row, for methods that read the text; a public forward pre-hook of the model brings them."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from reasonkv.runtimes.transformers.rows import Piece
from reasonkv.runtimes.transformers.support import UnsupportedModelError

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from reasonkv.runtimes.transformers.cache import CompressedCache


class TokenLog:
    """Every token each row has seen, 4 bytes each, in a buffer that doubles."""

    def __init__(self) -> None:
        self.announced: Tensor | None = None  # [B, q], of the forward that is about to begin
        self.ids: Tensor | None = None  # int32 [B, A]; token t of a row stands at t

    def append(self, piece: Piece) -> None:
        """Take over what was announced for a forward.

        Raises:
            UnsupportedModelError: the forward was not announced with token ids.

        """
        new, self.announced = self.announced, None
        if new is None or tuple(new.shape) != (len(piece.rows), piece.columns):
            raise UnsupportedModelError(
                "This method reads token ids; call the model the cache was made with, with input_ids "
                "(not inputs_embeds), or turn the option that needs them off."
            )
        row, column, _, token = piece.scatter(new.device)
        longest = max(state.length for state in piece.after)
        if self.ids is None or self.ids.shape[1] < longest:
            grown = new.new_zeros(len(piece.rows), max(256, 2 * longest), dtype=torch.int32)
            if self.ids is not None:
                grown[:, : self.ids.shape[1]] = self.ids
            self.ids = grown
        self.ids[row, token] = new[row, column].int()

    def of(self, rows: list[int], lengths: list[int]) -> tuple[Tensor, ...]:
        """Per row, int64 [length]: every token it has seen."""
        assert self.ids is not None
        return tuple(self.ids[row, :length].long() for row, length in zip(rows, lengths, strict=True))

    def select_rows(self, index: Tensor) -> None:
        """Reorder, repeat or drop rows."""
        if self.ids is not None:
            self.ids = self.ids.index_select(0, index.to(self.ids.device))


def listen(model: nn.Module, cache: CompressedCache) -> RemovableHandle:
    """Tell a cache the token ids of every forward of `model` that uses it, until the handle is removed."""
    owner = weakref.ref(cache)

    def announce(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        listener, cache_used = owner(), kwargs.get("past_key_values")
        if listener is None or id(cache_used) != id(listener):
            return
        ids = kwargs.get("input_ids", args[0] if args else None)
        listener.token_ids.announced = ids if isinstance(ids, Tensor) else None

    return model.register_forward_pre_hook(announce, with_kwargs=True)
