"""lm-evaluation-harness on bounded caches: `python -m reasonkv.lm_eval --model reasonkv ...`."""
