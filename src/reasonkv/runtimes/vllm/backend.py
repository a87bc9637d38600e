"""The attention path: stock backends whose requests store fewer slots than they have tokens.

Three things differ from a stock backend. The metadata builder gives the kernels physical lengths. Keys and values are
written at physical slots inside `forward`, because vLLM's runner would write them at logical positions. After a layer
has attended, the runtime sees its queries. A layer without a runtime is stock: one of a hybrid model that slides over a
window, or of another engine of the process.

`backend.CPU_ATTN`, `backend.FLASH_ATTN` and `backend.TRITON_ATTN` are the backends. Each is made when first asked for,
because its stock backend cannot be imported on other platforms. Only `CPU_ATTN` has been run.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

import torch
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from reasonkv.runtimes.vllm.config import BACKENDS

if TYPE_CHECKING:
    from torch import Tensor

DRIVEN = {AttentionBackendEnum[name]: f"{__name__}.{name}" for name in BACKENDS}
"""Stock backends, and the path of what takes their place."""


class StepRuntime(Protocol):
    """What the attention path asks of an engine's runtime."""

    fed: Mapping[str, int] | None
    """Tokens of every request of the step under way; None in a step that no scheduler asked for (warm-up)."""

    def physical_metadata(
        self, common: CommonAttentionMetadata, block_size: int, number: int = 0
    ) -> CommonAttentionMetadata:
        """Return a step's metadata with physical lengths and slots, for layer `number` and those that share blocks."""

    def after_attention(self, number: int, query: Tensor) -> None:
        """Take in the rotated queries of layer `number`, which has attended."""


class CompressedBuilder:
    """Mixed into a stock metadata builder: physical lengths and slots instead of logical ones.

    No full CUDA graphs: compactions are host decisions. Piecewise graphs leave attention out and are fine.
    """

    _cudagraph_support = AttentionCGSupport.NEVER
    supports_update_block_table = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._impl: CompressedImpl | None = None  # of one of the layers that share blocks; they are alike

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Any:
        """Build the metadata of one step; of a warm-up step, the stock one."""
        common = common_attn_metadata
        if self._impl is None:
            layers = get_layers_from_vllm_config(self.vllm_config, Attention, self.layer_names)  # type: ignore[attr-defined]
            self._impl = next(iter(layers.values())).impl
        runtime, number = self._impl.runtime, self._impl.layer_number
        if runtime is not None and runtime.fed is not None:
            common = runtime.physical_metadata(common, self.kv_cache_spec.block_size, number)  # type: ignore[attr-defined]
        return super().build(common_prefix_len, common, fast_build)  # type: ignore[misc]


class CompressedImpl:
    """Mixed into a stock attention implementation: write at physical slots, attend, show the queries."""

    runtime: StepRuntime | None = None
    """The engine's; it sets this once the model is loaded."""
    layer_number = 0
    """Which of the engine's compressed layers this is, in the order they run."""

    def forward(
        self, layer: Any, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, attn_metadata: Any,
        output: Tensor, *args: Any, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        """Attend as the stock implementation does; `attn_metadata` is None while the engine warms up."""
        # a layer that reads another one's keys (Gemma 3n) writes none
        if attn_metadata is not None and self.kv_sharing_target_layer_name is None:  # type: ignore[attr-defined]
            slots = attn_metadata.slot_mapping[: key.shape[0]]
            n = slots.shape[0]
            self.do_kv_cache_update(layer, key[:n], value[:n], kv_cache, slots)  # type: ignore[attr-defined]
        out: Tensor = super().forward(  # type: ignore[misc]
            layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs
        )
        if attn_metadata is not None and self.runtime is not None:
            if query.element_size() == 1:  # some backends take 8-bit queries beside an 8-bit cache
                query = query.to(output.dtype) * layer._q_scale.to(output.dtype)
            self.runtime.after_attention(self.layer_number, query)
        return out

    def write(self, layer: Any, keys_nHD: Tensor, values_nHD: Tensor, kv_cache: Tensor, slots_n: Tensor) -> None:
        """Write whole tokens of all heads by the platform's own cache operation."""
        slots_n = slots_n.to(torch.int64)
        self.do_kv_cache_update(layer, keys_nHD, values_nHD, kv_cache, slots_n)  # type: ignore[attr-defined]


def __getattr__(name: str) -> type[Any]:
    if name not in {stock.name for stock in DRIVEN}:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _compressed(AttentionBackendEnum[name].value)


@cache
def _compressed(path: str) -> type[Any]:
    """Extend the stock backend at `path`."""
    stock = resolve_obj_by_qualname(path)

    class Builder(CompressedBuilder, stock.get_builder_cls()):  # type: ignore[misc]
        """Metadata with physical lengths."""

    class Impl(CompressedImpl, stock.get_impl_cls()):  # type: ignore[misc]
        """Attention over physical slots."""

    class Backend(stock):  # type: ignore[misc, valid-type]
        """The stock backend with both."""

        forward_includes_kv_cache_update = True

        @staticmethod
        def get_impl_cls() -> type[Impl]:
            return Impl

        @staticmethod
        def get_builder_cls() -> type[Builder]:
            return Builder

    return Backend
