"""Old names of `reasonkv.evaluate.chunks`."""

from reasonkv.evaluate.chunks import MAX_CHUNK as MAX_PIECE
from reasonkv.evaluate.chunks import TraceRow as Row
from reasonkv.evaluate.chunks import feed

__all__ = ["MAX_PIECE", "Row", "feed"]
