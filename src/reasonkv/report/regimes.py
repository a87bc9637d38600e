"""What the three regimes mean, in the report's words; `reasonkv.evaluate.frontier.regime` decides which one it is."""

from __future__ import annotations

DECODE_ACTIVE = "decode-active"
MEANING = {
    DECODE_ACTIVE: "decoding went on compressing, with tokens of its own to choose from: what comparisons rest on",
    "prefix-exhausted": "events fell, but the prompt and the protected slots left no decode tokens to choose from",
    "uncompressed": "no event fell and nothing was dropped: full KV under another name",
}
