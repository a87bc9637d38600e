"""vLLM's scheduler with two additions: `--scheduler-cls reasonkv.runtimes.vllm.scheduler.Scheduler`.

It shows the manager of blocks what a request asked for, so that one may opt out of compression; and it feeds no piece
across an event, so that a request that was preempted, or whose prompt is long, has the events it has when it is fed
otherwise. Without `"reasonkv"` in `--additional-config` it is the stock scheduler.
"""

from __future__ import annotations

from typing import Any, Self

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler as StockAsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler as StockScheduler
from vllm.v1.request import Request

from reasonkv.runtimes.vllm.config import RequestConfig, has_scheduler
from reasonkv.runtimes.vllm.manager import BoundedManager

logger = init_logger("vllm.reasonkv")


class Scheduler(StockScheduler):  # type: ignore[misc]
    """The stock scheduler, or where the engine schedules asynchronously, the stock asynchronous one."""

    def __new__(cls, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> Self:
        """vLLM takes one class and decides later which kind of scheduling it is for."""
        is_async = vllm_config.scheduler_config.async_scheduling
        made: Self = super().__new__(AsyncScheduler if cls is Scheduler and is_async else cls)
        return made

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        managers = self.kv_cache_manager.coordinator.single_type_managers
        bounded = [one for one in managers if isinstance(one, BoundedManager)]
        self._bounded: BoundedManager | None = bounded[0] if bounded and has_scheduler(vllm_config) else None
        if self._bounded is not None:
            self._bounded.requests = self.requests

    def add_request(self, request: Request) -> None:
        """Take a new request; one that keeps full KV ends, at the latest, when it fills the cache alone."""
        is_new = request.request_id not in self.requests
        super().add_request(request)
        if is_new and self._bounded is not None and RequestConfig.wants_full_kv(request.sampling_params):
            self._fit(request, self._bounded)

    def _fit(self, request: Request, manager: BoundedManager) -> None:
        slots = (manager.block_pool.num_gpu_blocks - 1) * manager.block_size  # the first block is vLLM's null block
        room = slots + 1 - request.num_prompt_tokens  # the token sampled last is never fed
        if room < 1:
            logger.warning(
                "Request %s has a prompt of %d tokens and keeps full KV, but the cache holds %d tokens in all; it ends "
                "with an error.", request.request_id, request.num_prompt_tokens, slots,
            )  # fmt: skip
            self.grammar_compile_error_reqs.add(request.request_id)  # what vLLM ends so at the end of the next step
        elif request.max_tokens > room and self.max_model_len > slots:
            request.max_tokens = room

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Schedule a step, and take note of the events that its number brings."""
        scheduled = super().schedule(*args, **kwargs)
        if self._bounded is not None:
            self._bounded.end_step(scheduled.num_scheduled_tokens)
        return scheduled

    def _reserve_prefill_lookahead(self, request: Request, num_computed_tokens: int, num_new_tokens: int) -> int:
        """End a piece at the request's next event; vLLM asks here, last, how many tokens to feed."""
        fed: int = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
        if fed > 1 and self._bounded is not None:
            to_event = self._bounded.tokens_to_event(request.request_id)
            fed = fed if to_event is None else min(fed, to_event)
        return fed


class AsyncScheduler(Scheduler, StockAsyncScheduler):  # type: ignore[misc]
    """The same for asynchronous scheduling; `Scheduler` makes one where it is needed."""
