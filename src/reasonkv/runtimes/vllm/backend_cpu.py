"""The CPU backend, with the platform's packed attention kernel."""

from __future__ import annotations

from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from reasonkv.runtimes.vllm.backend import CompressedBuilder, CompressedImpl


class Builder(CompressedBuilder, CPUAttentionMetadataBuilder):  # type: ignore[misc]
    """Metadata with physical lengths."""


class Impl(CompressedImpl, CPUAttentionBackendImpl):  # type: ignore[misc]
    """Attention over physical slots."""


class Backend(CPUAttentionBackend):  # type: ignore[misc]
    """`CPU_ATTN` under a budget."""

    forward_includes_kv_cache_update = True

    @staticmethod
    def get_impl_cls() -> type[Impl]:
        """Ours."""
        return Impl

    @staticmethod
    def get_builder_cls() -> type[Builder]:
        """Ours."""
        return Builder
