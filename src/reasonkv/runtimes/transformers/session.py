"""What the layers of one cache share; they know it instead of the cache, which owns them."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor
from transformers import PreTrainedModel

from reasonkv.budget import Budget
from reasonkv.calibration import Calibration, find_calibration
from reasonkv.methods import Method, Requirements
from reasonkv.numbers import CALIBRATED, KVDtype
from reasonkv.offload import input_device
from reasonkv.plan import Plan
from reasonkv.resolve import resolve_budget
from reasonkv.rotary import Rotary
from reasonkv.runtimes.transformers.forward import ForwardPlan
from reasonkv.runtimes.transformers.sparse_read import SparseReader
from reasonkv.runtimes.transformers.tokens import TokenLog
from reasonkv.view import SlotView, TraceAttention

T = TypeVar("T")
Observer = Callable[[int, list[int], SlotView, Plan], None]
"""Called as `observer(layer, rows, view, plan)`: row i of the view and of the plan is batch row `rows[i]`."""


@dataclass(eq=False, kw_only=True)
class Session:
    """Everything that is the same for all layers of a cache.

    Args:
        method, seed, observer, reference, calibration: as in `CompressedCache`.
        needs: the method's.
        rotaries: of every layer of the model, if the method asks for them.
        reader: chooses what decoded tokens read, for methods that evict nothing.
        model_name: for messages.
        max_length: as in `CompressedCache`.
        kv_dtype: what kept slots are stored in, or None for the model's dtype.
        context: most tokens the model was made for, where its configuration says; None once it was warned about.
        reads_mask: the model itself reads the mask of a forward, as an indexer does.
        capacity_step: the capacity of a storage is a multiple of it.
        token_ids: every token, for methods that read the text.
        columns_seen: columns fed so far, padding included.
        attach: sets the model's attention to ours.
        begin_forward: announces batch, columns and the 2-D mask of a forward, and returns its plan.
        layer_done: called by every layer, with itself, after it attended.
        note_allocation: called by a layer that allocated.
    """

    method: Method
    needs: Requirements
    seed: int
    observer: Observer | None
    reference: TraceAttention | None
    calibration: Calibration | None
    rotaries: Sequence[Rotary] | None
    reader: SparseReader | None
    model_name: str
    max_length: int | None
    kv_dtype: KVDtype | None = None
    context: int | None = None
    reads_mask: bool = False
    capacity_step: int = 1
    token_ids: TokenLog = field(default_factory=TokenLog)
    columns_seen: int = 0
    attach: Callable[[], None]
    begin_forward: Callable[[int, int, Tensor | None], ForwardPlan]
    layer_done: Callable[[Any], None]
    note_allocation: Callable[[], None]

    def warn_past_context(self, length: int) -> None:
        """Warn, once for a cache, that a sequence is longer than the model's context: its bound is memory's alone."""
        if self.context is not None and length > self.context:
            message = (
                f"The text has {length} tokens, but {self.model_name} was made for {self.context}; a bounded cache "
                "does not extend the model's context, so the text may become nonsense."
            )
            warnings.warn(message, stacklevel=2)
            self.context = None


def callbacks_of(cache: object) -> dict[str, Any]:
    """Return a session's callbacks as methods of a cache."""
    names = ("attach", "begin_forward", "layer_done", "note_allocation")
    return {name: weakly(getattr(cache, name)) for name in names}


def weakly(method: Callable[..., T]) -> Callable[..., T]:
    """Return a function that calls a method without keeping its object alive: a cache owns its layers."""
    found = weakref.WeakMethod(method)

    def call(*args: Any) -> T:
        bound = found()
        if bound is None:
            raise RuntimeError("The cache these layers belong to is gone; keep it while the model uses it.")
        return bound(*args)

    return call


def resolve_for(
    model: PreTrainedModel, method: Method, budget: Budget | int | None, calibration: Calibration | str | Path | None
) -> tuple[Method, Budget | None]:
    """Return a method and its budget as a model runs them: calibrated shares of the layers are filled in.

    Raises:
        BudgetError: as `resolve_budget`.
        CalibrationError: calibrated shares that are missing or of another model.
    """
    method, found = resolve_budget(method, budget)
    if found is not None and found.layer_shares == CALIBRATED:
        found = replace(found, layer_shares=load_statistics(model, calibration).shares())
    return method, found


def load_statistics(model: PreTrainedModel, given: Calibration | str | Path | None) -> Calibration:
    """Return the statistics a method scores with, checked against the model and on its device.

    Raises:
        CalibrationError: none to be found, or another model's.
    """
    found = given if isinstance(given, Calibration) else find_calibration(model, given)
    found.check(model.config)
    return found.to(input_device(model))
