"""reasonkv: a bounded KV cache for models that reason, in `transformers` and beyond."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from reasonkv.budget import Budget, BudgetError, Window

if TYPE_CHECKING:
    from reasonkv.methods import Method, MethodError, Requirements, ScorerMethod, get_method, method_names
    from reasonkv.plan import Fold, Plan
    from reasonkv.runtimes.transformers import CompressedCache, UnsupportedModelError, generate
    from reasonkv.view import SlotView

__version__ = "0.1.0"
__all__ = [
    "Budget",
    "BudgetError",
    "CompressedCache",
    "Fold",
    "Method",
    "MethodError",
    "Plan",
    "Requirements",
    "ScorerMethod",
    "SlotView",
    "UnsupportedModelError",
    "Window",
    "generate",
    "get_method",
    "method_names",
]

# torch and transformers take seconds to import; `import reasonkv` and the command line's --help should not
_HOMES = {
    "reasonkv.methods": ("Method", "MethodError", "Requirements", "ScorerMethod", "get_method", "method_names"),
    "reasonkv.plan": ("Fold", "Plan"),
    "reasonkv.runtimes.transformers": ("CompressedCache", "UnsupportedModelError", "generate"),
    "reasonkv.view": ("SlotView",),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module 'reasonkv' has no attribute {name!r}")
