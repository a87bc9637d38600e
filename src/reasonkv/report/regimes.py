"""The regimes of the report: those of `reasonkv.evaluate.frontier.regime`, and that of methods that select."""

from __future__ import annotations

from reasonkv.evaluate.answers import AnswerRecord
from reasonkv.evaluate.frontier import regime
from reasonkv.evaluate.records import Record

DECODE_ACTIVE = "decode-active"
SELECTING = "selecting"
MEANING = {
    DECODE_ACTIVE: "decoding went on compressing, with tokens of its own to choose from: what comparisons rest on",
    "prefix-exhausted": "events fell, but the prompt and the protected slots left no decode tokens to choose from",
    "uncompressed": "no event fell and nothing was dropped: full KV under another name",
    SELECTING: "everything was held, and every decoded token read a part of it: the budget is what it may read in all, "
    "prompt included, so its place is beside methods with as many mean slots and not beside those of equal budget",
}


def regime_of(record: Record | AnswerRecord) -> str:
    """The regime of a bounded record; `SELECTING` where the method holds everything and reads a part of it."""
    return SELECTING if record.selects else str(regime(record))
