"""The Triton backend. Its layout is probed at start like any other; it has been read, not run."""

from __future__ import annotations

from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
)

from reasonkv.runtimes.vllm.backend import CompressedBuilder, CompressedImpl


class Builder(CompressedBuilder, TritonAttentionMetadataBuilder):  # type: ignore[misc]
    """Metadata with physical lengths."""


class Impl(CompressedImpl, TritonAttentionImpl):  # type: ignore[misc]
    """Attention over physical slots."""


class Backend(TritonAttentionBackend):  # type: ignore[misc]
    """`TRITON_ATTN` under a budget."""

    forward_includes_kv_cache_update = True

    @staticmethod
    def get_impl_cls() -> type[Impl]:
        """Ours."""
        return Impl

    @staticmethod
    def get_builder_cls() -> type[Builder]:
        """Ours."""
        return Builder
