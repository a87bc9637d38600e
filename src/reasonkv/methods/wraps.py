"""Methods that use another method's scores: `chunkkv` and `adakv` those of `snapkv`, say."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from reasonkv.methods.base import Method, Observed, ScorerMethod
from reasonkv.methods.catalogue import MethodError
from reasonkv.methods.registry import get_method


@dataclass(frozen=True)
class ScoreWrapper(Method):
    """A method that scores slots as `base` does, and observes what that needs.

    Args:
        base: the method, with its options as in `snapkv:window=32;kernel=7` (semicolons).

    Raises:
        MethodError: a base that scores no slots, lets heads decide together, or stores something beside slots.
    """

    base: str = "snapkv"

    @cached_property
    def scorer(self) -> ScorerMethod:
        """The base method."""
        found = get_method(self.base.replace(";", ","))
        if not isinstance(found, ScorerMethod) or isinstance(found, ScoreWrapper):
            raise MethodError(f"{self.name}: base must be a method that scores slots, not {found.name}.")
        if found.needs.scope != "head" or found.needs.stored_state:
            must = f"{self.name}: base must score every head by itself and store nothing beside slots"
            raise MethodError(f"{must}, unlike {found.name}.")
        return found

    def check_options(self) -> None:
        assert self.scorer  # which checks the base

    def new_row_state(self, rows: int, query_heads: int, head_dim: int, device: torch.device) -> dict[str, Tensor]:
        return self.scorer.new_row_state(rows, query_heads, head_dim, device)

    def observe(self, state: dict[str, Tensor], seen: Observed) -> None:
        self.scorer.observe(state, seen)
