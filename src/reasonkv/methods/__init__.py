"""Methods: each chooses which slots of the cache are kept at a compaction.

Everything is imported on first use, because torch takes a second that `reasonkv methods` does not need.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from reasonkv.methods.catalogue import CATALOGUE as CATALOGUE
from reasonkv.methods.catalogue import MethodError as MethodError
from reasonkv.methods.catalogue import method_names as method_names

if TYPE_CHECKING:
    from reasonkv.methods.base import Method as Method
    from reasonkv.methods.base import Observed as Observed
    from reasonkv.methods.base import Requirements as Requirements
    from reasonkv.methods.base import ScorerMethod as ScorerMethod
    from reasonkv.methods.base import SlotState as SlotState
    from reasonkv.methods.base import divides as divides
    from reasonkv.methods.base import layer_budgets as layer_budgets
    from reasonkv.methods.base import refuse_future as refuse_future
    from reasonkv.methods.registry import get_method as get_method
    from reasonkv.methods.registry import method_class as method_class
    from reasonkv.methods.registry import method_classes as method_classes
    from reasonkv.methods.registry import with_options as with_options

_MODULES = {
    "base": (
        "Method", "Observed", "Requirements", "ScorerMethod", "SlotState", "divides", "layer_budgets", "refuse_future",
    ),
    "registry": ("get_method", "method_class", "method_classes", "with_options"),
}  # fmt: skip


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
