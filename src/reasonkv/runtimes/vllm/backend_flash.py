"""The FlashAttention backend. Its layout is probed at start like any other; it has been read, not run."""

from __future__ import annotations

from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from reasonkv.runtimes.vllm.backend import compressed

Backend = compressed(FlashAttentionBackend, FlashAttentionMetadataBuilder, FlashAttentionImpl)
