"""One engine's compressed requests in one worker: which run, what layers store of them, when they are compacted."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from vllm.config import get_layers_from_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import CommonAttentionMetadata

from reasonkv import schedule
from reasonkv.budget import Budget, ExplicitEventsWindow, PeriodicWindow
from reasonkv.methods import Method, Observed
from reasonkv.runtimes.vllm import setup
from reasonkv.runtimes.vllm.compactions import Compactor, Layer
from reasonkv.runtimes.vllm.config import SCHEDULER, EngineConfig, ServingError, has_scheduler
from reasonkv.runtimes.vllm.layout import Layout
from reasonkv.runtimes.vllm.metrics import Exporter, Meter
from reasonkv.runtimes.vllm.options import RequestConfig, method_of
from reasonkv.runtimes.vllm.step import QueryGroup, RunningRequest, StepLayout
from reasonkv.schedule import BatchSchedule
from reasonkv.slots import SlotStore

logger = init_logger("vllm.reasonkv")

_RESUMED_STOCK = (
    "Request %s was preempted. All it has is fed again, in chunks, and its compactions fall at their ends, so its text "
    f"may go on differently; with --scheduler-cls {SCHEDULER} it would not."
)
_RESUMED = "Request %s was preempted. All it has is fed again in chunks that end at its compactions."
_RESUMED_PERIODIC = (
    "Request %s was preempted. All it has is fed again; under a global period compactions fall elsewhere."
)


class Runtime:
    """Made by the worker once the model is loaded; every compressed layer refers to it (`backend.StepRuntime`).

    The worker's model `runner` orders the batch; `rank` is that of the worker among tensor-parallel ones. Raises a
    ServingError where the model's attention cannot be served.
    """

    def __init__(self, vllm_config: Any, config: EngineConfig, runner: Any, rank: int = 0) -> None:
        self.config, self.runner, self.vllm_config, self.rank = config, runner, vllm_config, rank
        self.device: torch.device = runner.device
        self.has_scheduler = has_scheduler(vllm_config)
        self.requests: dict[str, RunningRequest] = {}
        self.free_rows = list(reversed(range(vllm_config.scheduler_config.max_num_seqs)))
        self.lengths = BatchSchedule(len(self.free_rows))
        self.fed: Mapping[str, int] | None = None  # tokens of every request of the step that begins, by id
        self.step: StepLayout | None = None  # the same step, once the batch is known
        self.steps = 0  # with at least one token, so far
        # ranks agree on what they evict, so one of them counts
        self.meter = Meter(Exporter.where_collected() if rank == 0 else None)
        self._pending: StepLayout | None = None  # the step before, if it has compactions that are not carried out yet
        self._computed: Mapping[str, int] = {}  # tokens that the scheduler counts, of requests that are not new
        self._ring_lines: tuple[Tensor, Tensor | None] | None = None
        self._query_groups: list[QueryGroup] | None = None
        self._suspended: dict[str, Callable[[], None]] = {}  # preempted requests: what starts them again
        self._modules = get_layers_from_vllm_config(vllm_config, Attention)
        setup.check_layers(self._modules, vllm_config)
        self.layers: list[Layer] = []
        self.use(config)
        for number, layer in enumerate(self.layers):
            layer.module.impl.runtime, layer.module.impl.layer_number = self, number

    def use(self, config: EngineConfig) -> None:
        """Serve by another method from now on, under the same budget, while no request is running.

        Raises a ServingError where the statistics or the rotary embedding that the method needs are missing.
        """
        for name in list(self.requests):
            self._free(name)
        self._pending = None
        method = setup.with_markers(config.method, self.vllm_config)
        self.config = replace(config, method=method)
        model, needs = self.vllm_config.model_config, method.needs
        rows = self.vllm_config.scheduler_config.max_num_seqs
        rotates = needs.rotary or needs.observes or needs.calibration
        known = None
        if needs.calibration:
            known = setup.statistics_of(self.vllm_config, config.calibration, needs, self.device)
        layouts = [layer.layout for layer in self.layers] or [None] * len(self._modules)
        self.layers = []
        for (name, module), layout in zip(self._modules.items(), layouts, strict=True):
            index, heads = extract_layer_index(name), module.num_heads
            of_rank = slice(self.rank * heads, (self.rank + 1) * heads)
            statistics = None if known is None else setup.own_heads(known.layer(index), of_rank)
            slots = SlotStore(rows, module.num_kv_heads, model.dtype, self.device, needs)
            slots.prepare(method, heads, module.head_size)
            self.layers.append(Layer(index, module, slots, statistics, layout))
        shape_of_ids = (rows, model.max_model_len)
        self.compactor = Compactor(
            method, config.seed, self.layers, self.meter,
            first_head=self.rank * next(iter(self._modules.values())).num_kv_heads,
            rotary=setup.rotary_of(self.vllm_config, self.device) if rotates else None,
            ranks=setup.TensorParallelRanks() if self.vllm_config.parallel_config.tensor_parallel_size > 1 else None,
            token_ids=torch.zeros(shape_of_ids, dtype=torch.int32, device=self.device) if needs.token_ids else None,
        )  # fmt: skip

    def find_layout(self) -> None:
        """Ask the platform where it puts keys and values, once blocks exist and before any request runs."""
        for layer in self.layers:
            module = layer.module
            # block 0 is vLLM's null block, where padding goes
            write = partial(module.impl.write, module)
            layer.layout = Layout.probe(module.kv_cache, 1, module.num_kv_heads, module.head_size, write)

    @property
    def bytes(self) -> int:
        """Bytes of what is kept beside the blocks."""
        return sum(layer.slots.bytes for layer in self.layers)

    # -- one step ---------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def begin(self, scheduled: Any) -> None:
        """Take in what the scheduler sends before a step (`SchedulerOutput`), and compact what the last one left.

        Compactions wait for it so that nobody waits for them: the last step's tokens are out, and requests that ended
        with it need none. Until the model runs, nothing is written to any block, not even to those that the scheduler
        took back for the next request.
        """
        for name in scheduled.finished_req_ids:
            if self.config.log_requests and self.rank == 0 and name in self.requests:
                logger.info("Request %s ended: %s.", name, self.requests[name])
            self._free(name)
            self._suspended.pop(name, None)
        for name in scheduled.preempted_req_ids or ():
            if name in self.requests:
                self._suspend(name)
        self._compact()
        for new in scheduled.scheduled_new_reqs:
            if self._suspended.pop(new.req_id, None) is not None:  # the second model runner is told it is new
                self._note_resumed(new.req_id)
            self._admit(new.req_id, new.prompt_len, new.sampling_params)
        cached = scheduled.scheduled_cached_reqs
        for name in cached.resumed_req_ids:
            self._note_resumed(name)
            self._suspended.pop(name)()
        if scheduled.num_scheduled_tokens:
            self.fed = scheduled.num_scheduled_tokens
            self._computed = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
            self._list_periodic_compactions(self.fed)

    def physical_metadata(self, common: CommonAttentionMetadata, block_size: int) -> CommonAttentionMetadata:
        """Return a step's attention metadata with physical lengths and slots, for the kernels.

        Raises a RuntimeError where the scheduler counts other tokens than the worker.
        """
        assert self.fed is not None
        step = StepLayout(self.fed, self.requests, self._batch_order(common), common.block_table_tensor)
        self.step, self._ring_lines, self._query_groups = step, None, None
        theirs, ours = [self._computed.get(name, 0) for name in step.order], step.lengths.tolist()
        if ours != theirs:
            name, known, own = next(one for one in zip(step.order, theirs, ours, strict=True) if one[1] != one[2])
            raise RuntimeError(f"The scheduler has {known} tokens of request {name} in the cache, the worker {own}.")
        dropped_B = _padded(torch.from_numpy(step.lengths - step.held), common.num_reqs, 0)
        lengths_B, upper_B = common.seq_lens, common.seq_lens_cpu_upper_bound
        return common.replace(
            seq_lens=lengths_B - dropped_B.to(lengths_B.device, lengths_B.dtype, non_blocking=True),
            seq_lens_cpu_upper_bound=None if upper_B is None else upper_B - dropped_B.to(upper_B.dtype),
            max_seq_len=step.longest,
            slot_mapping=_padded(step.physical_slots(block_size), len(common.slot_mapping), -1),
        )

    def after_attention(self, number: int, query: Tensor) -> None:
        """Remember a layer's rotated queries [tokens, Hq, D], padding behind them, for compactions of this step on."""
        step, layer = self.step, self.layers[number]
        if step is None:  # a warm-up that no scheduler asked for
            return
        if number == 0 and self.compactor.token_ids is not None:
            self._note_tokens(step, self.compactor.token_ids)
        if layer.slots.ring is not None:
            if self._ring_lines is None:
                self._ring_lines = step.ring_lines(layer.slots.ring.shape[1], self.device)
            lines, newest = self._ring_lines
            queries = query[: step.tokens] if newest is None else query.index_select(0, newest)
            layer.slots.remember_queries(queries, lines)
        if self.config.method.needs.observes:
            self._observe(step, layer, query)

    def end(self, seconds: float) -> None:
        """Move the requests on after a step that took so long, the compactions at its beginning included."""
        step, self.step, self.fed = self.step, None, None
        if step is not None:
            step.end()
            self.meter.note_step(step, seconds)
            self._pending = step if step.due else None

    def _compact(self) -> None:
        step, self._pending = self._pending, None
        if step is None:
            return
        start = time.perf_counter()
        self.compactor.run(step, self.requests)
        self.meter.seconds += time.perf_counter() - start

    def _observe(self, step: StepLayout, layer: Layer, query: Tensor) -> None:
        assert self.compactor.rotary is not None
        if self._query_groups is None:
            self._query_groups = step.query_groups(self.device)
        with torch.autocast(self.device.type, enabled=False):
            for one in self._query_groups:
                queries_bHqnD = query[one.token_bn].transpose(1, 2)
                seen = Observed(queries_bHqnD, one.position_bn, one.valid_bn, layer.index, self.compactor.rotary)
                layer.slots.observe(self.config.method, one.row_b, seen)

    def _note_tokens(self, step: StepLayout, token_ids: Tensor) -> None:
        buffers = getattr(self.runner, "input_buffers", None)
        ids = (self.runner.input_ids.gpu if buffers is None else buffers.input_ids)[: step.tokens]
        where = torch.from_numpy(np.stack([step.row, step.position])).to(self.device)
        token_ids[where[0], where[1]] = ids.to(torch.int32)

    def _batch_order(self, common: CommonAttentionMetadata) -> list[str]:
        states = getattr(self.runner, "req_states", None)  # the second model runner keeps a table of requests
        if states is not None:
            return [states.index_to_req_id[int(number)] for number in common.req_idx]
        assert self.fed is not None
        order: list[str] = self.runner.input_batch.req_ids[: len(self.fed)]
        return order

    def _list_periodic_compactions(self, all_fed: Mapping[str, int]) -> None:
        """List the compactions that the step's number brings; the scheduler's manager of blocks computes the same."""
        policy, self.steps = self.config.budget, self.steps + 1
        if not isinstance(policy, PeriodicWindow):
            return
        ends, windows = {}, {}
        for name, fed in all_fed.items():
            one = self.requests[name]
            if isinstance(one.budget, ExplicitEventsWindow):
                ends[name] = one.state._replace(logical=one.state.logical + fed)
                windows[name] = one.budget
        raw = {name: schedule.raw_tokens(windows[name], state) for name, state in ends.items()}
        for name in schedule.periodic_round(policy, self.steps - 1, raw):
            self.lengths.set_budget(self.requests[name].row, schedule.listed(windows[name], ends[name].logical))

    # -- requests that come and go ----------------------------------------------------------------------------------

    def _admit(self, name: str, prompt: int, sampling_params: Any) -> None:
        try:
            asked = RequestConfig.of(getattr(sampling_params, "extra_args", None))
        except ServingError as error:  # `RequestOptions` would have refused it before
            logger.warning("Request %s runs with reasonkv's defaults: %s", name, error)
            asked = RequestConfig()
        engine_method, budget = self.config.method, self.config.budget
        if not asked.enabled:
            if self.has_scheduler:
                self._start(name, prompt, None, engine_method, asked.seed)
                return
            logger.warning("Request %s is compressed: to keep full KV it needs --scheduler-cls %s.", name, SCHEDULER)
        if (
            budget.prompt == "keep"
            and budget.tokens is not None
            and prompt + max(budget.recent, engine_method.needs.recent) >= budget.tokens
        ):
            logger.warning(
                "Request %s has a prompt of %d tokens, which prompt='keep' cannot hold in a budget of %d; "
                "its prompt is compressed like the rest.", name, prompt, budget.tokens,
            )  # fmt: skip
        try:
            method = method_of(engine_method, asked.options)
        except ServingError as error:
            logger.warning("Request %s runs with the engine's options: %s", name, error)
            method = engine_method
        # one and the same object for all requests with equal options, so that they are planned together
        method = next((one.method for one in self.requests.values() if one.method == method), method)
        self._start(name, prompt, schedule.row_budget(budget), method, asked.seed)

    def _start(self, name: str, prompt: int, budget: Budget | None, method: Method, seed: int) -> None:
        """Give a request a row, with nothing in the cache."""
        row = self.free_rows.pop()
        for layer in self.layers:
            layer.slots.start(row)
        self.lengths.start(row, budget, schedule.Lengths(prompt=prompt))
        self.requests[name] = RunningRequest(lengths=self.lengths, row=row, method=method, seed=seed)

    def _suspend(self, name: str) -> None:
        """Free a preempted request's row; it restarts with the same prompt length, budget, method and seed."""
        one = self.requests[name]
        budget = None if one.budget is None else schedule.row_budget(self.config.budget)
        self._suspended[name] = partial(self._start, name, one.state.prompt, budget, one.method, one.seed)
        self._free(name)

    def _note_resumed(self, name: str) -> None:
        if self.has_scheduler:
            periodic = isinstance(self.config.budget, PeriodicWindow)
            logger.info(_RESUMED_PERIODIC if periodic else _RESUMED, name)
        else:
            logger.warning(_RESUMED_STOCK, name)

    def _free(self, name: str) -> None:
        request = self.requests.pop(name, None)
        if request is not None:
            self.free_rows.append(request.row)


def _padded(numbers_n: Tensor, size: int, value: int) -> Tensor:
    """Append a value up to `size`: what is beyond a step's requests and tokens is padding."""
    return functional.pad(numbers_n, (0, size - len(numbers_n)), value=value) if len(numbers_n) < size else numbers_n
