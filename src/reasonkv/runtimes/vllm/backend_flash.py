"""The FlashAttention backend. Its layout is probed at start like any other; it has been read, not run."""

from __future__ import annotations

from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from reasonkv.runtimes.vllm.backend import CompressedBuilder, CompressedImpl


class Builder(CompressedBuilder, FlashAttentionMetadataBuilder):  # type: ignore[misc]
    """Metadata with physical lengths."""


class Impl(CompressedImpl, FlashAttentionImpl):  # type: ignore[misc]
    """Attention over physical slots."""


class Backend(FlashAttentionBackend):  # type: ignore[misc]
    """`FLASH_ATTN` under a budget."""

    forward_includes_kv_cache_update = True

    @staticmethod
    def get_impl_cls() -> type[Impl]:
        """Ours."""
        return Impl

    @staticmethod
    def get_builder_cls() -> type[Builder]:
        """Ours."""
        return Builder
