"""The Triton backend. Its layout is probed at start like any other; it has been read, not run."""

from __future__ import annotations

from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
)

from reasonkv.runtimes.vllm.backend import compressed

Backend = compressed(TritonAttentionBackend, TritonAttentionMetadataBuilder, TritonAttentionImpl)
