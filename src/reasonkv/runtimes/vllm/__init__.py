"""reasonkv inside vLLM: `vllm serve MODEL --worker-cls reasonkv.runtimes.vllm.worker.Worker --additional-config ...`.

By vLLM's own registries alone, nothing patched. See `docs/serving.md`. Reading order: `config` and `options` (what is
asked for, what is refused), `spec`, `manager` and `scheduler` (blocks, in the scheduler), `worker`, `runtime` and
`step` (requests, in the worker), `backend` (the attention path), `layout` (blocks in memory), `compactions`.
"""
