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
from reasonkv.runtimes.vllm.spec import stock_blocks
from reasonkv.runtimes.vllm.step import StepNote

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
        self._bounded: list[BoundedManager] = bounded  # one for every group of layers that grow
        self._compression = EngineConfig.of(vllm_config)
        groups = self.kv_cache_config.kv_cache_groups
        self._stock_blocks = stock_blocks(groups, vllm_config) if bounded else 0
        for one in bounded:
            one.requests = self.requests
            one.layers = len(groups[one.kv_cache_group_id].layer_names)

    def add_request(self, request: Request) -> None:
        """Take a new request; one with full KV gets no more tokens than the cache holds when it is alone."""
        is_new = request.request_id not in self.requests
        super().add_request(request)
        if not is_new or not self._bounded or RequestConfig.asked(request.sampling_params).enabled:
            return
        # the first block is vLLM's null block
        blocks = self._bounded[0].block_pool.num_gpu_blocks - 1 - self._stock_blocks
        slots = blocks // len(self._bounded) * self._bounded[0].block_size
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
        held = self._held(request.request_id)
        transfer, *others = super()._free_request(request, *args, **kwargs)
        return ({**(transfer or {}), KEY: held} if held else transfer), *others

    def _held(self, request_id: str) -> dict[str, Any] | None:
        """Return what a response says: the engine's budget, what the request holds, and the bytes of a slot.

        Slots are those of a KV head, a mean over this rank's bounded layers. None: it has had no step.
        """
        lengths = [one.held(request_id) for one in self._bounded]
        if not lengths or lengths[0] is None:
            return None
        assert self._compression is not None
        said, bounded = self._compression.to_dict(), self._bounded
        if shares := bounded[0].kv_cache_spec.layer_shares:
            said["budget"]["layer_shares"] = shares  # as they are, where the configuration says "calibrated"
        slots = sum(found.physical * one.layers for found, one in zip(lengths, bounded, strict=True) if found)
        mean = slots / sum(one.layers for one in bounded)
        return said | {
            "tokens": lengths[0].logical,
            "slots": int(mean) if mean.is_integer() else round(mean, 2),
            "slot_bytes": sum(one.slot_bytes for one in bounded),
        }

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        """Preempt a request, which then feeds all it had: later prompts may share blocks beyond its own prompt."""
        super()._preempt_request(request, *args, **kwargs)
        if self._bounded:
            request.skip_reading_prefix_cache = True

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Schedule a step, and note for the workers what it leaves."""
        scheduled = super().schedule(*args, **kwargs)
        if self._bounded:
            fed = scheduled.num_scheduled_tokens
            found = {one.kv_cache_group_id: one.end_step(fed) for one in self._bounded}
            periodic = next(iter(found.values()))[1]  # a window is the same in all layers
            setattr(scheduled, KEY, StepNote({group: slots for group, (slots, _) in found.items()}, periodic))
        return scheduled

    def _reserve_prefill_lookahead(self, request: Request, num_computed_tokens: int, num_new_tokens: int) -> int:
        """End a chunk at the request's next compaction; vLLM asks here, last, how many tokens to feed."""
        fed: int = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
        if fed > 1 and self._bounded:
            left = [one.tokens_to_compaction(request.request_id, num_computed_tokens) for one in self._bounded]
            fed = min([fed, *(tokens for tokens in left if tokens is not None)])
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
