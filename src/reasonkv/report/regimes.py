"""What the regimes of `reasonkv.evaluate.frontier.regime` mean, in words."""

from __future__ import annotations

DECODE_ACTIVE = "decode-active"
SELECTING = "selecting"
MEANING = {
    DECODE_ACTIVE: "decoding went on compressing, with tokens of its own to choose from: what comparisons rest on",
    "prefix-exhausted": "events fell, but the prompt and the protected slots left no decode tokens to choose from",
    "uncompressed": "no event fell and nothing was dropped: full KV under another name",
    SELECTING: "everything was held, and every decoded token read a part of it: the budget is what it may read, "
    "so its place is beside methods with as many mean slots and not beside those of equal budget",
}
