"""The CPU backend, with the platform's packed attention kernel."""

from __future__ import annotations

from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from reasonkv.runtimes.vllm.backend import compressed

Backend = compressed(CPUAttentionBackend, CPUAttentionMetadataBuilder, CPUAttentionBackendImpl)
