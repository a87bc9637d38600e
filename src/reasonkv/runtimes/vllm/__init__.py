"""reasonkv inside vLLM: `vllm serve MODEL --worker-cls reasonkv.runtimes.vllm.worker.Worker --additional-config ...`.

By vLLM's own registries alone, nothing patched. See `docs/serving.md`. Reading order: `config` (what is asked for, what
is refused), `spec` and `manager` (blocks, in the scheduler), `worker`, `runtime` and `step` (requests, in the worker),
`backend` (the attention path), `layout` and `slots` (one layer's cache), `events` (compaction).
"""
