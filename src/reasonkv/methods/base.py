"""The interface every method implements, and the registry that finds it.

A method is a frozen dataclass: its fields are its options, its docstring cites the paper. It holds no state; what a
generation accumulates lives in that generation's cache.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

from torch import Tensor

from reasonkv.plan import Plan
from reasonkv.selection import top_k_slots
from reasonkv.view import SlotView


class MethodError(ValueError):
    """An unknown method or option; the message names the nearest one that exists."""


@dataclass(frozen=True)
class Needs:
    """What a method asks of the runtime.

    Args:
        queries: newest rotated queries to keep in a ring, per row and query head.
        recent: newest slots the method itself always keeps (the larger of this and the budget's counts, once).
        scope: what one plan covers: "head" - every KV head chooses its own slots; "layer" - all heads of a layer
            share them.
        folds: the method merges slots, so counts are stored.
        future: the method reads full KV's attention of tokens still to come (`SlotView.future_attention_BHN`), which
            is known in replay only; every other runtime refuses it.

    """

    queries: int = 0
    recent: int = 0
    scope: Literal["head", "layer"] = "head"
    folds: bool = False
    future: bool = False


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
    def needs(self) -> Needs:
        """What the runtime must provide, given the options."""
        return Needs()

    @abstractmethod
    def plan(self, view: SlotView, keep: int) -> Plan:
        """Choose the slots that stay.

        Args:
            view: one layer's slots; see `SlotView`.
            keep: slots to return per KV head, fewer than the view holds and at least its protected ones.

        """

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
