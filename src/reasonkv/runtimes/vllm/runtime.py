"""One engine's compressed requests in one worker: which run, what layers store of them, when they are compacted."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import CommonAttentionMetadata

from reasonkv import schedule
from reasonkv.batch_schedule import BatchSchedule, Integers
from reasonkv.budget import Budget
from reasonkv.methods import Method
from reasonkv.runtimes.vllm import setup
from reasonkv.runtimes.vllm.compactions import Compactor, Layer
from reasonkv.runtimes.vllm.config import KEY, SCHEDULER, EngineConfig, ServingError, has_scheduler
from reasonkv.runtimes.vllm.metrics import Exporter, Meter, note_resumed
from reasonkv.runtimes.vllm.observing import Observing
from reasonkv.runtimes.vllm.options import RequestConfig, method_of
from reasonkv.runtimes.vllm.slots import PagedSlotStore
from reasonkv.runtimes.vllm.step import Asked, RunningRequest, StepLayout, StepNote, StepPlaces
from reasonkv.runtimes.vllm.tiers import Tier

logger = init_logger("vllm.reasonkv")


class Runtime:
    """Made by the worker once the model is loaded; every compressed layer refers to it (`backend.StepRuntime`).

    The worker's model `runner` orders the batch; `rank` is that of the worker among tensor-parallel ones. One worker of
    an engine `counts`: it alone writes metrics and the log, because all evict alike. Raises a ServingError where the
    model's attention cannot be served.
    """

    def __init__(
        self, vllm_config: Any, config: EngineConfig, runner: Any, rank: int = 0, *, counts: bool = True
    ) -> None:
        self.config, self.runner, self.vllm_config, self.rank = config, runner, vllm_config, rank
        self.counts = counts
        self.device: torch.device = runner.device
        self.has_scheduler = has_scheduler(vllm_config)
        self.rows = 0  # in the slot stores, one for each request that can be compressed at once
        self.fed: Mapping[str, int] | None = None  # tokens of every request of the step that begins, by id
        self.meter = Meter(Exporter.where_collected() if counts else None)
        self._note: StepNote | None = None  # what the scheduler says about the step
        self._computed: dict[str, int] = {}  # tokens that the scheduler counts as computed before the step
        self._suspended: dict[str, Callable[[int], None]] = {}  # preempted requests: what starts them again
        self._modules = setup.growing_layers(vllm_config)
        setup.check_layers(self._modules, vllm_config)
        self.layers: list[Layer] = []
        self.tiers: list[Tier] = []
        self.budgets: dict[str, Budget] = {}  # by layer's name
        self.use(config)
        for number, layer in enumerate(self.layers):
            layer.module.impl.runtime, layer.module.impl.layer_number = self, number

    def use(self, config: EngineConfig) -> None:
        """Serve by another method from now on, under the same budget, while no request is running.

        Raises a ServingError for another budget, or where statistics or a rotary embedding that it needs are missing.
        """
        for name in list(self.requests) if self.tiers else ():
            self._free(name)
        config = setup.with_shares(config, self.vllm_config, len(self._modules))
        method = setup.with_markers(config.method, self.vllm_config)
        self.config = replace(config, method=method)
        budgets = setup.budgets_by_layer(self.config, list(self._modules))
        if any(one.layout is not None for one in self.layers) and budgets != self.budgets:
            raise ServingError("Blocks were made for the budget that the engine started with.")
        self.budgets = budgets
        needs = method.needs
        rotates = needs.rotary or needs.observes or needs.calibration
        known = (
            setup.statistics_of(self.vllm_config, config.calibration, needs, self.device) if needs.calibration else None
        )
        before, self.layers = self.layers, []
        for number, (name, module) in enumerate(self._modules.items()):
            index = extract_layer_index(name)
            of_rank = [slice(self.rank * n, (self.rank + 1) * n) for n in (module.num_heads, module.num_kv_heads)]
            statistics = None if known is None else setup.own_heads(known.layer(index), *of_rank)
            slots = self._slot_store(module, 0)
            known_layer = before[number] if before else Layer(index, module, slots)
            self.layers.append(replace(known_layer, slots=slots, calibration=statistics))
        self.tiers = []
        for budget in dict.fromkeys(self.budgets.values()):
            same = [layer for layer, one in zip(self.layers, self.budgets.values(), strict=True) if one == budget]
            for layer in same:
                layer.tier = len(self.tiers)
            self.tiers.append(Tier(budget, same))
        indices = [layer.index for layer in self.layers]
        self.compactor = Compactor(
            method, config.seed, self.layers, self.meter,
            first_head=self.rank * next(iter(self._modules.values())).num_kv_heads,
            rotary=setup.rotary_of(self.vllm_config, indices, self.device) if rotates else None,
            ranks=setup.TensorParallelRanks() if self.vllm_config.parallel_config.tensor_parallel_size > 1 else None,
        )  # fmt: skip
        self.allocate(self.rows)

    def allocate(self, rows: int) -> None:
        """Allocate what is kept beside the blocks, for so many compressed requests at once."""
        most = self.vllm_config.scheduler_config.max_num_seqs
        self.rows = rows
        self.free_rows = list(reversed(range(rows)))
        # requests with full KV store nothing beside their blocks: what they would write goes to the row behind the last
        self.free_full_rows = list(reversed(range(rows, rows + most)))
        for tier in self.tiers:
            tier.lengths = BatchSchedule(rows + most)
        # all tiers have seen the same tokens
        self.observing = Observing(self.config.method, self.tiers[0].lengths, rows, self.compactor.rotary)
        stores: dict[int, PagedSlotStore] = {}  # by place
        for layer in self.layers:
            layer.slots = self._slot_store(layer.module, rows + 1)
            if layer.place in stores:
                layer.slots.share(stores[layer.place])
            elif layer.layout is not None:
                blocks, _, block_size, *_ = layer.module.kv_cache.shape
                layer.slots.reserve(blocks, block_size)
                stores[layer.place] = layer.slots
        if self.config.method.needs.token_ids:
            shape = (rows + 1, self.vllm_config.model_config.max_model_len)
            self.compactor.token_ids = torch.zeros(shape, dtype=torch.int32, device=self.device)

    def rows_in(self, requests: int) -> int:
        """Return how many rows the stores need where blocks hold so many compressed requests.

        Only our scheduler's steps can be told from warm-up steps, whose requests need rows, too.
        """
        most: int = self.vllm_config.scheduler_config.max_num_seqs
        return min(most, requests) if self.has_scheduler else most

    @property
    def requests(self) -> dict[str, RunningRequest]:
        """The requests of this worker by id, as its first tier has them."""
        return self.tiers[0].requests

    @property
    def row_bytes(self) -> int:
        """Bytes of what is kept per compressed request, in all layers of this rank."""
        tokens = 4 * self.vllm_config.model_config.max_model_len if self.config.method.needs.token_ids else 0
        return tokens + sum(self._slot_store(layer.module, 1).bytes for layer in self.layers)

    @property
    def slot_bytes(self) -> int:
        """Bytes of what is kept per slot of one layer beside its keys and values; all layers are of one shape."""
        return self.layers[0].slots.slot_bytes()

    def _slot_store(self, module: Any, rows: int) -> PagedSlotStore:
        """Return a store of one layer, without its slots."""
        method, dtype = self.config.method, self.vllm_config.model_config.dtype
        slots = PagedSlotStore(rows, module.num_kv_heads, dtype, self.device, method.needs)
        slots.prepare(method, module.num_heads, module.head_size)
        return slots

    def find_layout(self, groups: list[list[str]]) -> None:
        """Ask the platform where it puts keys and values, once blocks exist and before any request runs.

        `groups` are the names of layers that share block tables.
        """
        found = {name: (group, place) for group, names in enumerate(groups) for place, name in enumerate(names)}
        for name, layer in zip(self._modules, self.layers, strict=True):
            layer.group, layer.place = found[name]
            layer.layout, layer.codec = setup.layout_of(layer.module, self.vllm_config.model_config.dtype)

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
            if self.config.log_requests and self.counts and name in self.requests:
                said = (tier.describe(name, is_only=len(self.tiers) == 1) for tier in self.tiers)
                logger.info("Request %s ended: %s.", name, " | ".join(said))
            self._free(name)
            self._suspended.pop(name, None)
        for name in scheduled.preempted_req_ids or ():
            if name in self.requests:
                self._suspend(name)
        self._compact()
        self._note = getattr(scheduled, KEY, None)
        is_warm_up = self.has_scheduler and self._note is None
        cached = scheduled.scheduled_cached_reqs
        self._computed = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        for new in scheduled.scheduled_new_reqs:
            self._computed[new.req_id] = new.num_computed_tokens
            if self._suspended.pop(new.req_id, None) is not None:  # the second model runner is told it is new
                note_resumed(new.req_id, self.config.budget, self.has_scheduler)
            if is_warm_up:
                self._start(new.req_id, new.prompt_len, self.config.method, 0, full_kv=True)
            else:
                self._admit(new)
        for name in cached.resumed_req_ids:
            note_resumed(name, self.config.budget, self.has_scheduler)
            self._suspended.pop(name)(self._computed[name])
        if scheduled.num_scheduled_tokens:
            self.fed = scheduled.num_scheduled_tokens
            for name in () if self._note is None else self._note.periodic:
                for tier in self.tiers:
                    tier.compact_after(name, self.fed[name])

    def physical_metadata(
        self, common: CommonAttentionMetadata, block_size: int, number: int = 0
    ) -> CommonAttentionMetadata:
        """Return a step's attention metadata with physical lengths and slots, for the kernels.

        It is asked for once a step and group of layers, by one of the group's, `number`. Raises a RuntimeError where
        the scheduler counts other tokens than the worker.
        """
        assert self.fed is not None
        layer = self.layers[number]
        tier = self.tiers[layer.tier]
        if tier.step is None:
            is_first = all(one.step is None for one in self.tiers)
            places = tier.begin_step(self.fed, self._batch_order(common), common, layer.group, self.rows)
            step = places.step
            self._agree("tokens", step, [self._computed.get(name, 0) for name in step.order], step.lengths)
            if is_first:
                self.observing.begin(places)
        return tier.metadata(common, block_size, layer.group)

    def _agree(self, what: str, step: StepLayout, theirs: list[int], ours: Integers) -> None:
        """Raise a RuntimeError where the scheduler counts otherwise than the worker."""
        if ours.tolist() != theirs:
            both = zip(step.order, theirs, ours.tolist(), strict=True)
            name, known, own = next(one for one in both if one[1] != one[2])
            raise RuntimeError(f"The scheduler has {known} {what} of request {name} in the cache, the worker {own}.")

    def after_attention(self, number: int, query: Tensor) -> None:
        """Remember a layer's rotated queries [tokens, Hq, D], padding behind them, for compactions of this step on."""
        layer = self.layers[number]
        tier = self.tiers[layer.tier]
        if tier.step is None:  # a warm-up that no scheduler asked for
            return
        if number == 0 and self.compactor.token_ids is not None:
            self._note_tokens(tier.places[layer.group], self.compactor.token_ids)
        self.observing.take_in(layer, query)

    def end(self, seconds: float) -> None:
        """Move the requests on after a step that took so long, the compactions at its beginning included."""
        self.fed = None
        steps = [step for tier in self.tiers if (step := tier.end_step()) is not None]
        if steps:
            self.observing.end()
            noted = {} if self._note is None else self._note.slots
            for tier, step in zip(self.tiers, steps, strict=True) if noted else ():
                slots = noted[tier.layers[0].group]
                self._agree("slots", step, [slots[name] for name in step.order], tier.lengths.lengths(step.rows)[1])
            self.meter.note_step(steps, [len(tier.layers) / len(self.layers) for tier in self.tiers], seconds)
        elif not self.requests:
            self.meter.note_idle()

    def _compact(self) -> None:
        pending = [(tier, step) for tier in self.tiers if (step := tier.take_pending()) is not None]
        if not pending:
            return
        start = time.perf_counter()
        due = [one for tier, step in pending for one in step.due if tier.requests.get(one.name) is one.request]
        self.observing.before_compaction(self.layers, sorted({one.request.row for one in due}))
        for tier, step in pending:
            tables = {group: places.block_table for group, places in tier.places.items()}
            self.compactor.run(step, tier.layers, tables, tier.requests)
        self.meter.seconds += time.perf_counter() - start

    def _note_tokens(self, places: StepPlaces, token_ids: Tensor) -> None:
        buffers = getattr(self.runner, "input_buffers", None)
        ids = self.runner.input_ids.gpu if buffers is None else buffers.input_ids
        token_ids[places.row_n, places.position_n] = ids[: places.step.tokens].to(torch.int32)

    def _batch_order(self, common: CommonAttentionMetadata) -> list[str]:
        states = getattr(self.runner, "req_states", None)  # the second model runner keeps a table of requests
        if states is not None:
            return [states.index_to_req_id[int(number)] for number in common.req_idx]
        assert self.fed is not None
        order: list[str] = self.runner.input_batch.req_ids[: len(self.fed)]
        return order

    # -- requests that come and go ----------------------------------------------------------------------------------

    def _admit(self, new: Any) -> None:
        """Start a request that the scheduler sends for the first time (`NewRequestData`)."""
        name, prompt, computed = new.req_id, new.prompt_len, new.num_computed_tokens
        try:
            asked = RequestConfig.of(getattr(new.sampling_params, "extra_args", None))
        except ServingError as error:  # `RequestOptions` would have refused it before
            logger.warning("Request %s runs with reasonkv's defaults: %s", name, error)
            asked = RequestConfig()
        engine_method, budget = self.config.method, self.config.budget
        if not asked.enabled:
            if self.has_scheduler:
                self._start(name, prompt, engine_method, asked.seed, computed, full_kv=True)
                return
            logger.warning("Request %s is compressed: to keep full KV it needs --scheduler-cls %s.", name, SCHEDULER)
        needed = prompt + max(budget.recent, engine_method.needs.recent)
        if budget.prompt == "keep" and budget.tokens is not None and needed >= budget.tokens:
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
        self._start(name, prompt, method, asked.seed, computed)

    def _start(
        self, name: str, prompt: int, method: Method, seed: int, computed: int = 0, *, full_kv: bool = False
    ) -> None:
        """Give a request a row; `computed` tokens of its prompt are in blocks that it shares with others."""
        row = (self.free_full_rows if full_kv else self.free_rows).pop()
        if not full_kv:
            self.observing.start(row)
            for layer in self.layers:
                layer.slots.start(row)
        turn = seed if self.has_scheduler else 0  # only our scheduler knows a request's seed, too
        asked = Asked(method, seed)
        for tier in self.tiers:
            budget = None if full_kv else schedule.row_budget(tier.budget, prompt, turn)
            tier.start(name, row, schedule.Lengths(computed, computed, prompt), asked, budget)

    def _suspend(self, name: str) -> None:
        """Free a preempted request's row; it restarts with the same prompt length, budget, method and seed."""
        one = self.requests[name]
        self._suspended[name] = partial(
            self._start, name, one.state.prompt, one.method, one.seed, full_kv=one.budget is None
        )
        self._free(name)

    def _free(self, name: str) -> None:
        request, *_ = [tier.requests.pop(name, None) for tier in self.tiers]
        if request is not None:
            (self.free_rows if request.row < self.rows else self.free_full_rows).append(request.row)
