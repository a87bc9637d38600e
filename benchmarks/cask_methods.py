"""The methods of `cask_claims.py`, and what leaving a part of CASK out is called."""

BASELINES = ("full", "random", "streaming", "snapkv:window=16", "rkv", "expected")
TRIATTENTION = ("triattention", "triattention:mode=global", "triattention:mode=per_layer_per_head")
CASK = ("cask", "cask:profile=paper")
ABLATIONS = {
    "cask:core_ratio=0,core_least=0,fold=none": "stage 1 only",
    "cask:fold=none": "no folding",
    "cask:fold=neighbours": "folding whatever is adjacent",
    "cask:fold=neighbours,mass=none": "the same without log mass",
    "cask:core_ratio=0,core_least=0": "no core",
    "cask:per_layer=true": "a plan per layer",
    "cask:prompt_share=0.5": "half to the prompt",
}
DEGENERATE = "triattention:profile=paper"
"""The reference's baseline on long prompts: it pins the prompt, or what fits of its beginning."""
GENERATED = (*BASELINES, *TRIATTENTION, *CASK, "cask:fold=neighbours", "cask:per_layer=true")
