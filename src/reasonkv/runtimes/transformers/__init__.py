"""The transformers runtime: a drop-in cache (`CompressedCache`) and a drop-in decoding function (`generate`)."""

from reasonkv.runtimes.transformers.cache import CompressedCache
from reasonkv.runtimes.transformers.decoding import generate
from reasonkv.runtimes.transformers.stats import CacheStats, RowStats
from reasonkv.runtimes.transformers.support import TESTED, UnsupportedModelError, check_model

__all__ = ["TESTED", "CacheStats", "CompressedCache", "RowStats", "UnsupportedModelError", "check_model", "generate"]
