"""The attention path: stock backends whose requests hold fewer slots than tokens.

Three things differ from the stock backend, whichever it is. The metadata builder tells the kernels physical lengths;
keys and values are written at physical slots (vLLM's runner would write them at logical ones, so the write moves into
`forward`); and after a layer has attended, its requests' events are carried out. Where a layer belongs to no
`Runtime`, as in another engine of the same process, nothing differs.

Each platform's backend is made in a module of its own (`backend_cpu`, `backend_flash`, `backend_triton`), because
importing it fails on others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata

if TYPE_CHECKING:
    from torch import Tensor

    from reasonkv.runtimes.vllm.runtime import Runtime


class CompressedBuilder:
    """Mixed into a stock metadata builder: physical lengths and slots instead of logical ones.

    No full CUDA graphs: events are host decisions. Piecewise graphs leave attention out and are fine.
    """

    _cudagraph_support = AttentionCGSupport.NEVER
    supports_update_block_table = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._runtime: Runtime | None = None

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Any:
        """Metadata of one step; of a step that no scheduler asked for (warm-up), the stock one."""
        common, runtime = common_attn_metadata, self._attached()
        if runtime is not None and runtime.fed is not None:
            common = runtime.make_physical(common, self.kv_cache_spec.block_size)  # type: ignore[attr-defined]
        return super().build(common_prefix_len, common, fast_build)  # type: ignore[misc]

    def _attached(self) -> Runtime | None:
        if self._runtime is None:
            layers = get_layers_from_vllm_config(self.vllm_config, Attention, self.layer_names)  # type: ignore[attr-defined]
            self._runtime = next((layer.impl.runtime for layer in layers.values()), None)
        return self._runtime


class CompressedImpl:
    """Mixed into a stock attention implementation: write at physical slots, attend, carry out events."""

    runtime: Runtime | None = None
    """The engine's; set by it once the model is loaded."""
    layer_number = 0
    """Which of the engine's compressed layers this is, in the order they run."""

    def forward(
        self, layer: Any, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, attn_metadata: Any,
        output: Tensor, *args: Any, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        """As the stock implementation; `attn_metadata` is None while the engine warms up."""
        if attn_metadata is not None:
            slots = attn_metadata.slot_mapping[: key.shape[0]]
            n = slots.shape[0]
            self.do_kv_cache_update(layer, key[:n], value[:n], kv_cache, slots)  # type: ignore[attr-defined]
        out: Tensor = super().forward(  # type: ignore[misc]
            layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs
        )
        if attn_metadata is not None and self.runtime is not None:
            self.runtime.after_attention(self.layer_number, query)
        return out

    def write(self, layer: Any, keys_nHD: Tensor, values_nHD: Tensor, kv_cache: Tensor, slots_n: Tensor) -> None:
        """The platform's own cache operation, for whole tokens of all heads."""
        slots_n = slots_n.to(torch.int64)
        self.do_kv_cache_update(layer, keys_nHD, values_nHD, kv_cache, slots_n)  # type: ignore[attr-defined]


def compressed(stock: type[Any], stock_builder: type[Any], stock_impl: type[Any]) -> type[Any]:
    """A stock backend under a budget, from its own class and those of its metadata builder and implementation."""

    class Builder(CompressedBuilder, stock_builder):  # type: ignore[misc]
        """Metadata with physical lengths."""

    class Impl(CompressedImpl, stock_impl):  # type: ignore[misc]
        """Attention over physical slots."""

    class Backend(stock):  # type: ignore[misc]
        """The stock backend with both."""

        forward_includes_kv_cache_update = True

        @staticmethod
        def get_impl_cls() -> type[Impl]:
            return Impl

        @staticmethod
        def get_builder_cls() -> type[Builder]:
            return Builder

    return Backend
