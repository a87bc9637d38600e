"""The interface every method implements, and the registry that finds it.

A method is a frozen dataclass: its fields are its options, its docstring cites the paper. It holds no state; what a
generation accumulates lives in that generation's cache.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from reasonkv.errors import ReasonKVError
from reasonkv.methods.ops import top_k_slots
from reasonkv.plan import Plan
from reasonkv.rotary import Rotary
from reasonkv.view import SlotView


class MethodError(ReasonKVError, ValueError):
    """An unknown method or option; the message names the nearest one that exists."""


@dataclass(frozen=True)
class SlotState:
    """A number that lives beside every slot, moves with it and is counted in bytes.

    Args:
        initial: what a new token's slot gets: its token index ("position"), or a constant.
        fold: how the values of a folded group combine; "kept" takes the kept slot's own.
        dtype: of the stored value, 4 bytes wide.

    """

    initial: Literal["position"] | float
    fold: Literal["sum", "max", "min", "kept"] = "kept"
    dtype: torch.dtype = torch.float32


LOG_MASS = SlotState(0.0)
"""Stored as `state["log_mass"]` by `Requirements(log_mass=True)`: the log of a slot's weight in tokens."""


@dataclass(frozen=True)
class Requirements:
    """What a method asks of the runtime.

    Args:
        queries: newest rotated queries to keep in a ring, per row and query head.
        recent: newest slots the method itself always keeps (the larger of this and the budget's counts, once).
        scope: what one plan covers: "head" - every KV head chooses its own slots; "layer" - all heads of a layer
            share them; "model" - all layers are planned at once, after the last one (`Method.plan_layers`).
        folds: the method merges slots, so counts are stored.
        future: the method reads full KV's attention of tokens still to come (`SlotView.future_attention_BHN`), which
            is known in replay only; every other runtime refuses it.
        slot_state: state beside every slot, by name.
        log_mass: plans carry `Plan.log_mass_BHK`, which the runtime adds to a slot's logits from then on.
        token_ids: the view shows every token a row has seen.
        calibration: the view shows the model's query statistics, and its rotary embedding.
        statistics: which of their optional parts the method reads: "square", "horizon" (`LayerStatistics`).
        rotary: the view shows the rotary embedding alone.
        observes: `Method.observe` is called with the queries of every forward; what it keeps is `view.row_state`.
        output_projection: the view shows the layer's output projection.
        whole_prompt: what the method observes of a prompt is right only if the prompt comes in one forward.

    """

    queries: int = 0
    recent: int = 0
    scope: Literal["head", "layer", "model"] = "head"
    folds: bool = False
    future: bool = False
    slot_state: Mapping[str, SlotState] = field(default_factory=dict)
    log_mass: bool = False
    token_ids: bool = False
    calibration: bool = False
    statistics: frozenset[str] = frozenset()
    rotary: bool = False
    observes: bool = False
    output_projection: bool = False
    whole_prompt: bool = False

    @property
    def stored_state(self) -> dict[str, SlotState]:
        """All state a runtime stores beside slots, log mass included."""
        return {**self.slot_state, **({"log_mass": LOG_MASS} if self.log_mass else {})}


@dataclass(frozen=True)
class Observed:
    """The queries of one forward of one layer, for `Method.observe`.

    Args:
        queries_BHqqD: rotated queries of all query heads.
        positions_Bq: int64, their token indices; of padding, whatever stands there.
        valid_Bq: bool, False at padding.
        layer: index of the layer.
        rotary: how they were rotated.

    """

    queries_BHqqD: Tensor
    positions_Bq: Tensor
    valid_Bq: Tensor
    layer: int
    rotary: Rotary


@dataclass(frozen=True)
class Method(ABC):
    """Chooses which slots stay at an event. Subclasses set the class variables and implement `plan`."""

    name: ClassVar[str]
    title: ClassVar[str]
    """One line for the catalogue."""
    paper: ClassVar[str]
    """Citation with its arXiv number, or "-" for a baseline without one."""
    bounded: ClassVar[bool] = True
    """False only for full KV, which takes no budget."""

    @property
    def needs(self) -> Requirements:
        """What the runtime must provide, given the options."""
        return Requirements()

    @abstractmethod
    def plan(self, view: SlotView, keep: int) -> Plan:
        """Choose the slots that stay.

        Args:
            view: one layer's slots; see `SlotView`.
            keep: slots to return per KV head, fewer than the view holds and at least its protected ones.

        """

    def plan_layers(self, views: Sequence[SlotView], keep: int) -> list[Plan]:
        """Plan several layers at once: all that are compressed with `Requirements(scope="model")`, else one.

        Args:
            views: the layers' slots, in the model's order; all have the same rows, lengths and slot numbers.
            keep: as in `plan`.

        """
        return [self.plan(view, keep) for view in views]

    def new_row_state(self, rows: int, query_heads: int, head_dim: int, device: torch.device) -> dict[str, Tensor]:
        """Fresh state of one layer for `observe`, by name, each [rows, ...]; its bytes count as held.

        Raises:
            NotImplementedError: the method declares `Requirements(observes=True)` without having any.

        """
        raise NotImplementedError(f"{self.name} observes but defines no row state.")

    def observe(self, state: dict[str, Tensor], seen: Observed) -> None:
        """Take in one forward's queries by updating `state` in place, whatever pieces they come in.

        Raises:
            NotImplementedError: the method declares `Requirements(observes=True)` without doing so.

        """
        raise NotImplementedError(f"{self.name} observes but does not say how.")

    def for_tokenizer(self, tokenizer: Any) -> Method:
        """The method with what an option leaves to the model's tokenizer filled in; records keep the option."""
        return self

    def options(self) -> dict[str, object]:
        """The options as recorded in results."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def spec(self) -> str:
        """The shortest text that gives this method back: `name` or `name:key=value,...`."""
        changed = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default]
        return self.name + (":" + ",".join(changed) if changed else "")


@dataclass(frozen=True)
class ScorerMethod(Method):
    """A method that ranks slots: the highest scores stay. Subclasses implement `score` alone."""

    @abstractmethod
    def score(self, view: SlotView) -> Tensor:
        """float32 scores [B, H, N], higher = kept. Protected slots are forced by the caller, whatever their score."""

    def plan(self, view: SlotView, keep: int) -> Plan:
        """Top-k over the scores with protected slots forced; ties go to the newer position."""
        return Plan(top_k_slots(self.score(view), keep, forced_BHN=view.is_protected_BHN))


def refuse_future(method: Method) -> None:
    """Called by every runtime that does not know a trace beforehand.

    Raises:
        MethodError: the method needs the future.

    """
    if method.needs.future:
        raise MethodError(f"{method.name} looks into the future: it works in replay only, where the trace is known.")
