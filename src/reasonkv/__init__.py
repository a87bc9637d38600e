"""reasonkv: a bounded KV cache for models that reason, in `transformers` and beyond."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from reasonkv.budget import Budget, BudgetError
from reasonkv.methods import Method, MethodError, Needs, ScorerMethod, get_method, method_names
from reasonkv.plan import Fold, Plan
from reasonkv.view import SlotView

if TYPE_CHECKING:
    from reasonkv.runtimes.transformers import CompressedCache, UnsupportedModelError, generate

__version__ = "0.1.0"
__all__ = [
    "Budget",
    "BudgetError",
    "CompressedCache",
    "Fold",
    "Method",
    "MethodError",
    "Needs",
    "Plan",
    "ScorerMethod",
    "SlotView",
    "UnsupportedModelError",
    "generate",
    "get_method",
    "method_names",
]


def __getattr__(name: str) -> Any:
    # transformers takes seconds to import; `import reasonkv` and the CLI's --help should not
    if name in {"CompressedCache", "UnsupportedModelError", "generate"}:
        from reasonkv.runtimes import transformers as runtime

        return getattr(runtime, name)
    raise AttributeError(f"module 'reasonkv' has no attribute {name!r}")
