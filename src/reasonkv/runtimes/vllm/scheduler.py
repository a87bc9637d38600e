"""vLLM's scheduler with four additions: `--scheduler-cls reasonkv.runtimes.vllm.scheduler.Scheduler`.

It shows the manager of blocks what a request asked for, so a request may opt out of compression. It feeds no chunk
across a compaction, so a preempted request, or one with a long prompt, has its compactions where it has them otherwise.
A response says what its request held. Workers are told what each step leaves (`StepNote`).
Without `"reasonkv"` in `--additional-config` it is the stock scheduler.
"""

from __future__ import annotations

from typing import Any, Self

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler as StockAsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler as StockScheduler
from vllm.v1.request import Request

from reasonkv.runtimes.vllm.config import KEY, EngineConfig, has_scheduler
from reasonkv.runtimes.vllm.manager import BoundedManager
from reasonkv.runtimes.vllm.options import RequestConfig
from reasonkv.runtimes.vllm.spec import bounded_groups, stock_blocks

logger = init_logger("vllm.reasonkv")


class Scheduler(StockScheduler):  # type: ignore[misc]
    """The stock scheduler, or where the engine schedules asynchronously, the stock asynchronous one."""

    def __new__(cls, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> Self:
        """Make the kind the engine needs: vLLM takes one class and decides later which scheduling it is for."""
        is_async = vllm_config.scheduler_config.async_scheduling
        made: Self = super().__new__(AsyncScheduler if cls is Scheduler and is_async else cls)
        return made

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        managers = self.kv_cache_manager.coordinator.single_type_managers
        bounded = [one for one in managers if isinstance(one, BoundedManager) and has_scheduler(vllm_config)]
        # one for every group of layers that grow; all follow the same budgets, so the first speaks for all
        self._every_bounded: list[BoundedManager] = bounded
        self._bounded: BoundedManager | None = bounded[0] if bounded else None
        self._compression = EngineConfig.of(vllm_config)
        groups = self.kv_cache_config.kv_cache_groups
        self._stock_blocks = stock_blocks(groups, vllm_config) if bounded else 0
        for one in bounded:
            one.requests = self.requests
            one.layers = sum(len(group.layer_names) for group in bounded_groups(groups))

    def add_request(self, request: Request) -> None:
        """Take a new request; one with full KV gets no more tokens than the cache holds when it is alone."""
        is_new = request.request_id not in self.requests
        super().add_request(request)
        if not is_new or self._bounded is None or RequestConfig.asked(request.sampling_params).enabled:
            return
        # the first block is vLLM's null block
        blocks = self._bounded.block_pool.num_gpu_blocks - 1 - self._stock_blocks
        slots = blocks // len(self._every_bounded) * self._bounded.block_size
        room = slots + 1 - request.num_prompt_tokens  # the token sampled last is never fed
        if room < 1:
            why = (
                f"The prompt has {request.num_prompt_tokens} tokens and keeps full KV, but the cache holds {slots} "
                "tokens in all; let it be compressed, or give the cache more memory."
            )
            logger.warning("Request %s ends with an error: %s", request.request_id, why)
            end_with_error(self.grammar_compile_error_reqs, request.request_id, why)
        elif request.max_tokens > room and self.max_model_len > slots:
            request.max_tokens = room

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> tuple[dict[str, Any] | None, ...]:
        """Free a request that ended; its response says under `kv_transfer_params` what it held."""
        held = None if self._bounded is None else self._bounded.held(request.request_id)
        transfer, *others = super()._free_request(request, *args, **kwargs)
        if held is not None:
            assert self._compression is not None
            transfer = {**(transfer or {}), KEY: self._compression.to_dict() | held}
        return transfer, *others

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        """Preempt a request, which then feeds all it had: later prompts may share blocks beyond its own prompt."""
        super()._preempt_request(request, *args, **kwargs)
        if self._bounded is not None:
            request.skip_reading_prefix_cache = True

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Schedule a step, and note for the workers what it leaves."""
        scheduled = super().schedule(*args, **kwargs)
        if self._bounded is not None:
            notes = [one.end_step(scheduled.num_scheduled_tokens) for one in self._every_bounded]
            setattr(scheduled, KEY, notes[0])
        return scheduled

    def _reserve_prefill_lookahead(self, request: Request, num_computed_tokens: int, num_new_tokens: int) -> int:
        """End a chunk at the request's next compaction; vLLM asks here, last, how many tokens to feed."""
        fed: int = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
        if fed > 1 and self._bounded is not None:
            left = self._bounded.tokens_to_compaction(request.request_id, num_computed_tokens)
            fed = fed if left is None else min(fed, left)
        return fed


class AsyncScheduler(Scheduler, StockAsyncScheduler):  # type: ignore[misc]
    """The same for asynchronous scheduling; `Scheduler` makes one where it is needed."""


def end_with_error(failed: Any, name: str, why: str) -> None:
    """Enter a request among those that vLLM ends with an error after the next step: a set of ids before vLLM 0.33."""
    if isinstance(failed, set):
        failed.add(name)
        return
    from vllm.outputs import RequestError

    failed[name] = RequestError(code="validation_error", message=why)
