"""The transformers runtime: a drop-in cache (`CompressedCache`) and a decoding function (`generate_with`)."""

from reasonkv.resolve import TESTED, UnsupportedModelError, check_model
from reasonkv.runtimes.transformers.cache import CompressedCache
from reasonkv.runtimes.transformers.decoding import generate_with
from reasonkv.runtimes.transformers.stats import CacheStats, RowStats

__all__ = [
    "TESTED",
    "CacheStats",
    "CompressedCache",
    "RowStats",
    "UnsupportedModelError",
    "check_model",
    "generate_with",
]
