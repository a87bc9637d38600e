"""The token ids of every row, for methods that read the text; a forward pre-hook of the model brings them."""

from __future__ import annotations

import torch
from torch import Tensor

from reasonkv.resolve import UnsupportedModelError
from reasonkv.runtimes.transformers.forward import ForwardPlan


class TokenLog:
    """Every token each row has seen, 4 bytes each, in a buffer that doubles."""

    def __init__(self) -> None:
        self.announced: Tensor | None = None  # [B, q], of the forward that is about to begin
        self.ids: Tensor | None = None  # int32 [B, A]; token t of a row stands at t

    def append(self, forward: ForwardPlan) -> None:
        """Add the announced token ids of a forward.

        Raises:
            UnsupportedModelError: the forward was not announced with token ids.
        """
        new, self.announced = self.announced, None
        if new is None or tuple(new.shape) != (len(forward.rows), forward.columns):
            raise UnsupportedModelError(
                "This method reads token ids; call the model the cache was made with, with input_ids "
                "(not inputs_embeds), or turn the option that needs them off."
            )
        row, column, _, token = forward.scatter(new.device)
        longest = max(state.logical for state in forward.after)
        if self.ids is None or self.ids.shape[1] < longest:
            grown = new.new_zeros(len(forward.rows), max(256, 2 * longest), dtype=torch.int32)
            if self.ids is not None:
                grown[:, : self.ids.shape[1]] = self.ids
            self.ids = grown
        self.ids[row, token] = new[row, column].int()

    def of(self, rows: list[int], lengths: list[int]) -> tuple[Tensor, ...]:
        """Return every token each row has seen, int64 [length] each."""
        assert self.ids is not None
        return tuple(self.ids[row, :length].long() for row, length in zip(rows, lengths, strict=True))

    def select_rows(self, index: Tensor) -> None:
        """Reorder, repeat or drop rows."""
        if self.ids is not None:
            self.ids = self.ids.index_select(0, index.to(self.ids.device))
