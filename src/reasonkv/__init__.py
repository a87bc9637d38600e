"""reasonkv: a bounded KV cache for models that reason, in `transformers` and vLLM."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from reasonkv.budget import Budget, BudgetError, Window
from reasonkv.errors import ReasonKVError

if TYPE_CHECKING:
    from reasonkv.methods import Method, MethodError, Requirements, ScorerMethod, get_method, method_names
    from reasonkv.methods.adakv import AdaKV
    from reasonkv.methods.ams import AMS
    from reasonkv.methods.beaconkv import BeaconKV
    from reasonkv.methods.cake import CAKE
    from reasonkv.methods.cask import CASK
    from reasonkv.methods.chunkkv import ChunkKV
    from reasonkv.methods.curdkv import CurDKV
    from reasonkv.methods.d2o import D2O
    from reasonkv.methods.defensivekv import DefensiveKV
    from reasonkv.methods.expected import ExpectedAttention
    from reasonkv.methods.forecast import Forecast
    from reasonkv.methods.full import FullKV
    from reasonkv.methods.gkv import GKV
    from reasonkv.methods.h2o import H2O
    from reasonkv.methods.importance import ImportanceSampling
    from reasonkv.methods.inertiakv import InertiaKV
    from reasonkv.methods.kara import Kara
    from reasonkv.methods.keydiff import KeyDiff
    from reasonkv.methods.keyformer import Keyformer
    from reasonkv.methods.knorm import Knorm
    from reasonkv.methods.lagkv import LagKV
    from reasonkv.methods.lazyeviction import LazyEviction
    from reasonkv.methods.nacl import NACL
    from reasonkv.methods.oracle import Oracle
    from reasonkv.methods.pyramidkv import PyramidKV
    from reasonkv.methods.quest import Quest
    from reasonkv.methods.raas import RaaS
    from reasonkv.methods.random import RandomAttention, RandomEviction
    from reasonkv.methods.rkv import RKV
    from reasonkv.methods.rpc import RPC
    from reasonkv.methods.sagekv import SageKV
    from reasonkv.methods.scissorhands import Scissorhands
    from reasonkv.methods.seer import SeerAttention
    from reasonkv.methods.snapkv import SnapKV
    from reasonkv.methods.streaming import StreamingLLM
    from reasonkv.methods.tova import TOVA
    from reasonkv.methods.triattention import TriAttention
    from reasonkv.methods.vase_attnv import VaseAttnV
    from reasonkv.methods.vase_dkv import VaseDKV
    from reasonkv.plan import Merge, Plan
    from reasonkv.runtimes.transformers import CompressedCache, UnsupportedModelError, generate_with
    from reasonkv.view import SlotView

__version__ = "0.1.0"
__all__ = [
    "AMS", "CAKE", "CASK", "D2O", "GKV", "H2O", "NACL", "RKV", "RPC", "TOVA", "AdaKV", "BeaconKV", "Budget",
    "BudgetError", "ChunkKV", "CompressedCache", "CurDKV", "DefensiveKV", "ExpectedAttention", "Forecast", "FullKV",
    "ImportanceSampling", "InertiaKV", "Kara", "KeyDiff", "Keyformer", "Knorm", "LagKV", "LazyEviction", "Merge",
    "Method", "MethodError", "Oracle", "Plan", "PyramidKV", "Quest", "RaaS", "RandomAttention", "RandomEviction",
    "ReasonKVError", "Requirements", "SageKV", "Scissorhands", "ScorerMethod", "SeerAttention", "SlotView", "SnapKV",
    "StreamingLLM", "TriAttention", "UnsupportedModelError", "VaseAttnV", "VaseDKV", "Window", "generate_with",
    "get_method", "method_names",
]  # fmt: skip

# torch and transformers take seconds to import; `import reasonkv` and the command line's --help should not
_HOMES = {
    "reasonkv.methods": ("Method", "MethodError", "Requirements", "ScorerMethod", "get_method", "method_names"),
    "reasonkv.plan": ("Merge", "Plan"),
    "reasonkv.runtimes.transformers": ("CompressedCache", "UnsupportedModelError", "generate_with"),
    "reasonkv.view": ("SlotView",),
}


if not TYPE_CHECKING:  # a type checker then finds misspelt names

    def __getattr__(name: str) -> Any:
        for home, names in _HOMES.items():
            if name in names:
                return getattr(import_module(home), name)
        if name in __all__:  # a method's class
            from reasonkv.methods.catalogue import CATALOGUE

            for entry in CATALOGUE.values():
                home, _, found = entry.path.partition(":")
                if found == name:
                    return getattr(import_module(home), name)
        raise AttributeError(f"module 'reasonkv' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
