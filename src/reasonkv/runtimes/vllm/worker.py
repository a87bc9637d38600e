"""vLLM's worker with our runtime beside its model runner: `--worker-cls reasonkv.runtimes.vllm.worker.Worker`.

The platform's own worker is the base. Without `"reasonkv"` in `--additional-config` it does exactly what that one does.
"""

from __future__ import annotations

import time
from typing import Any

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.selector import get_attn_backend

try:
    from vllm.v1.core.kv_cache_planning import get_kv_cache_groups
except ImportError:  # vLLM 0.32
    from vllm.v1.core.kv_cache_utils import get_kv_cache_groups

from reasonkv.runtimes.vllm.backend import DRIVEN
from reasonkv.runtimes.vllm.config import (
    BACKENDS,
    EngineConfig,
    ServingError,
    check_engine,
    has_scheduler,
    installed_package,
)
from reasonkv.runtimes.vllm.runtime import Runtime
from reasonkv.runtimes.vllm.setup import bounded_specs, check_shares
from reasonkv.runtimes.vllm.spec import bounded_groups, stock_blocks

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker

logger = init_logger("vllm.reasonkv")


def chosen_backend(vllm_config: VllmConfig) -> str:
    """Return the first of `BACKENDS` that the platform takes for the model, before any weight is loaded.

    vLLM's own first choice on some GPUs is one that reasonkv does not extend. Raises a ServingError if it takes none.
    """
    if current_platform.is_cpu():
        return "CPU_ATTN"
    model, reasons = vllm_config.model_config, []
    for name in BACKENDS[:2]:
        vllm_config.attention_config.backend = AttentionBackendEnum[name]
        try:
            with set_current_vllm_config(vllm_config):
                get_attn_backend(model.get_head_size(), model.dtype, vllm_config.cache_config.cache_dtype)
        except (ValueError, ImportError) as error:
            reasons.append(f"{name}: {error}")
        else:
            return name
    raise ServingError(f"No attention backend that reasonkv serves fits this model and device ({'; '.join(reasons)}).")


class Worker(PlatformWorker):  # type: ignore[misc]
    """A worker whose requests stay within a budget; raises a ServingError for what it cannot serve."""

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        self.compression = EngineConfig.of(vllm_config)
        self.runtime: Runtime | None = None
        if self.compression is not None:
            self._vllm_version = installed_package(untested=self.compression.untested)[1]
            check_engine(vllm_config, self.compression)
            check_shares(self.compression, vllm_config)
            for stock, path in DRIVEN.items():
                register_backend(stock, path)
            if vllm_config.attention_config.backend is None:
                # Named, it also keeps this engine apart from a stock one of the same process.
                vllm_config.attention_config.backend = AttentionBackendEnum[chosen_backend(vllm_config)]
        super().__init__(vllm_config, *args, **kwargs)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model, and check that its attention can be served."""
        super().load_model(*args, **kwargs)
        if self.compression is not None:
            rank = get_tensor_model_parallel_rank()
            counts = rank == 0 and get_pp_group().is_first_rank
            self.runtime = Runtime(self.vllm_config, self.compression, self.model_runner, rank, counts=counts)

    def get_kv_cache_spec(self) -> dict[str, Any]:
        """Return every layer's cache, as the scheduler is to see it."""
        found: dict[str, Any] = super().get_kv_cache_spec()
        if self.compression is None:
            return found
        chunk = 1 if has_scheduler(self.vllm_config) else self.scheduler_config.max_num_batched_tokens
        assert self.runtime is not None  # the model is loaded
        return bounded_specs(
            found, self.runtime.config, self.runtime.budgets, self.model_config.max_model_len, chunk,
            allows_groups=not self.scheduler_config.disable_hybrid_kv_cache_manager,
        )  # fmt: skip

    def determine_available_memory(self) -> Any:
        """Return the bytes for blocks: vLLM's, less what each request that they hold keeps beside them."""
        found = super().determine_available_memory()
        if self.runtime is None:
            return found
        runtime, groups = self.runtime, get_kv_cache_groups(self.vllm_config, self.get_kv_cache_spec())
        bounded = bounded_groups(groups)
        page = max(one.kv_cache_spec.page_size_bytes * len(one.layer_names) for one in groups)
        most = max(len(one.layer_names) for one in bounded)
        beside = runtime.slot_bytes * most * bounded[0].kv_cache_spec.block_size
        request = _fewest_blocks(bounded) * (page + beside) + runtime.row_bytes
        rows = runtime.rows_in(found // request + 1)  # one more than fit: what is left of the memory may hold one
        return max(0, found - (rows + 1) * runtime.row_bytes) * page // (page + beside)

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        """Allocate blocks and what is kept beside them, and find out how the platform fills blocks."""
        super().initialize_from_config(kv_cache_config)
        if self.runtime is None:
            return
        groups = kv_cache_config.kv_cache_groups
        bounded = bounded_groups(groups)
        specs, others = [one.kv_cache_spec for one in bounded], stock_blocks(groups, self.vllm_config)
        longest = self.model_config.max_model_len
        blocks = kv_cache_config.num_blocks - 1
        needed = sum(spec.blocks(spec.slots_in_prefill(longest, longest)) for spec in specs) + others
        if needed > blocks:
            raise ServingError(
                f"A prompt of {longest} tokens needs {needed} blocks until it is compacted, but there are {blocks}; "
                "lower --max-model-len, give the cache more memory, or set prefill_chunk so that prompts are compacted "
                "as they come."
            )
        self.runtime.find_layout([one.layer_names for one in groups])
        self.runtime.allocate(self.runtime.rows_in(blocks // _fewest_blocks(bounded)))
        steady = sum(spec.blocks(spec.slots_in_decode(1)) for spec in specs) + others
        logger.info(
            "reasonkv on vLLM %s: %s. %d blocks of %d a request (full KV: up to %d), so %d requests at once; "
            "%.1f MiB of queries and token indices beside the cache, for %d of them.",
            self._vllm_version, self.runtime.config.describe(), steady, specs[0].block_size,
            specs[0].blocks(longest) * len(bounded) + others,
            blocks // steady, self.runtime.bytes / 2**20, self.runtime.rows,
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


def _fewest_blocks(bounded: list[Any]) -> int:
    """Return the fewest blocks that a compressed request reserves while it runs, in all groups of bounded layers."""
    specs = [one.kv_cache_spec for one in bounded]
    return sum(spec.blocks(1 if not spec.budget.is_bounded else spec.slots_in_decode(1)) for spec in specs)
