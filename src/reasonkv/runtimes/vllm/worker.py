"""vLLM's worker with our runtime beside its model runner: `--worker-cls reasonkv.runtimes.vllm.worker.Worker`.

The platform's own worker is the base. Without `"reasonkv"` in `--additional-config` it does exactly what that one does.
"""

from __future__ import annotations

import time
from typing import Any

from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.kv_cache_interface import FullAttentionSpec

from reasonkv.runtimes.vllm.backend import DRIVEN
from reasonkv.runtimes.vllm.config import EngineConfig, ServingError, check_engine, has_scheduler, installed_package
from reasonkv.runtimes.vllm.runtime import Runtime
from reasonkv.runtimes.vllm.spec import BoundedSpec

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker

logger = init_logger("vllm.reasonkv")


class Worker(PlatformWorker):  # type: ignore[misc]
    """A worker whose requests stay within a budget; raises a ServingError for what it cannot serve."""

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        self.compression = EngineConfig.of(vllm_config)
        self.runtime: Runtime | None = None
        if self.compression is not None:
            self._vllm_version = installed_package()[1]
            check_engine(vllm_config, self.compression)
            for stock, path in DRIVEN.items():
                register_backend(stock, path)
            if current_platform.is_cpu() and vllm_config.attention_config.backend is None:
                # There is no other; naming it keeps this engine apart from a stock one of the same process.
                vllm_config.attention_config.backend = AttentionBackendEnum.CPU_ATTN
        super().__init__(vllm_config, *args, **kwargs)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model; what is kept beside it is allocated here, so that vLLM's memory profile sees it."""
        super().load_model(*args, **kwargs)
        if self.compression is not None:
            rank = get_tensor_model_parallel_rank()
            self.runtime = Runtime(self.vllm_config, self.compression, self.model_runner, rank)

    def get_kv_cache_spec(self) -> dict[str, Any]:
        """Return every layer's cache, as the scheduler is to see it."""
        found: dict[str, Any] = super().get_kv_cache_spec()
        if self.compression is None:
            return found
        foreign = sorted(name for name, spec in found.items() if type(spec) is not FullAttentionSpec)
        if foreign:
            raise ServingError(f"Only full-attention layers are served, and {foreign[0]} is none.")
        longest, budget = self.model_config.max_model_len, self.compression.budget
        chunk = 1 if has_scheduler(self.vllm_config) else self.scheduler_config.max_num_batched_tokens
        return {name: BoundedSpec.of(spec, budget, longest, chunk) for name, spec in found.items()}

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        """Allocate blocks, and find out how the platform fills them."""
        super().initialize_from_config(kv_cache_config)
        if self.runtime is None:
            return
        spec = kv_cache_config.kv_cache_groups[0].kv_cache_spec
        longest = self.model_config.max_model_len
        blocks, needed = kv_cache_config.num_blocks - 1, spec.blocks(spec.slots_in_prefill(longest, longest))
        if needed > blocks:
            raise ServingError(
                f"A prompt of {longest} tokens needs {needed} blocks until it is compacted, but there are {blocks}; "
                "lower --max-model-len, give the cache more memory, or set prefill_chunk so that prompts are compacted "
                "as they come."
            )
        self.runtime.find_layout()
        steady = spec.blocks(spec.slots_in_decode(1))
        logger.info(
            "reasonkv on vLLM %s: %s. %d blocks of %d a request (full KV: up to %d), so %d requests at once; "
            "%.1f MiB of queries and token indices beside the cache.",
            self._vllm_version, self.runtime.config.describe(), steady, spec.block_size, spec.blocks(longest),
            blocks // steady, self.runtime.bytes / 2**20,
        )  # fmt: skip

    def execute_model(self, scheduler_output: Any) -> Any:
        """Run one engine step."""
        if self.runtime is None:
            return super().execute_model(scheduler_output)
        start = time.perf_counter()
        self.runtime.begin(scheduler_output)
        output = super().execute_model(scheduler_output)
        self.runtime.end(time.perf_counter() - start)
        return output

    def shutdown(self) -> None:
        """Leave the registry of backends as it was, for other engines of this process."""
        if self.runtime is not None:
            logger.info("reasonkv: %s.", self.runtime.meter)
            for stock, path in DRIVEN.items():
                if stock.is_overridden() and stock.get_path() == path:
                    stock.clear_override()
        super().shutdown()
