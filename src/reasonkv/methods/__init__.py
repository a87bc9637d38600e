"""Methods: each chooses which slots of the cache are kept at a compaction.

Everything is imported on first use, because torch takes a second that `reasonkv methods` does not need.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from reasonkv.methods.catalogue import CATALOGUE, method_names
from reasonkv.methods.options import MethodError

if TYPE_CHECKING:
    from reasonkv.methods.base import (
        Method,
        Observed,
        Requirements,
        ScorerMethod,
        SlotState,
        layer_budgets,
        refuse_future,
    )
    from reasonkv.methods.registry import get_method, method_class, method_classes, with_options

__all__ = [
    "CATALOGUE",
    "Method",
    "MethodError",
    "Observed",
    "Requirements",
    "ScorerMethod",
    "SlotState",
    "get_method",
    "layer_budgets",
    "method_class",
    "method_classes",
    "method_names",
    "refuse_future",
    "with_options",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'reasonkv.methods' has no attribute {name!r}")
    is_lookup = name in ("get_method", "method_class", "method_classes", "with_options")
    return getattr(import_module("reasonkv.methods.registry" if is_lookup else "reasonkv.methods.base"), name)
