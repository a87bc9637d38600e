"""One engine's compressed requests in one worker: what the scheduler said, what every layer keeps, when events fall."""

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
from reasonkv.runtimes.vllm.config import SCHEDULER, EngineConfig, RequestConfig, ServingError, has_scheduler
from reasonkv.runtimes.vllm.events import Layer, Observer, carry_out_events
from reasonkv.runtimes.vllm.layout import Layout
from reasonkv.runtimes.vllm.metrics import Exporter, Meter
from reasonkv.runtimes.vllm.options import method_of
from reasonkv.runtimes.vllm.pieces import Pieces
from reasonkv.runtimes.vllm.ranks import other_ranks
from reasonkv.runtimes.vllm.setup import check_layers, own_heads, rotary_of, statistics_of, with_markers
from reasonkv.runtimes.vllm.slots import LayerSlots
from reasonkv.runtimes.vllm.step import RequestEvent, Sequence, Step
from reasonkv.schedule import BatchSchedule

logger = init_logger("vllm.reasonkv")

_FED_AGAIN = (
    "Request %s was preempted. All it has is fed again, in pieces, and its events fall at their ends, so its text may "
    f"go on differently; with --scheduler-cls {SCHEDULER} it would not."
)
_RESUMED = "Request %s was preempted. All it has is fed again in pieces that end at its events."
_RESUMED_PERIODIC = "Request %s was preempted. All it has is fed again; under a global period events fall elsewhere."


class Runtime:
    """Made by the worker once the model is loaded; every compressed layer refers to it.

    Args:
        vllm_config: vLLM's whole configuration.
        config: ours.
        runner: the worker's model runner, which orders the batch.
        rank: of this worker among tensor-parallel ones.

    Raises:
        ServingError: the model's attention cannot be served; one sentence says why.

    """

    def __init__(self, vllm_config: Any, config: EngineConfig, runner: Any, rank: int = 0) -> None:
        self.config, self.runner, self.vllm_config, self.rank = config, runner, vllm_config, rank
        self.device: torch.device = runner.device
        self.has_scheduler = has_scheduler(vllm_config)
        self.sequences: dict[str, Sequence] = {}
        self.free_places = list(reversed(range(vllm_config.scheduler_config.max_num_seqs)))
        self.courses = BatchSchedule(len(self.free_places))
        self.fed: Mapping[str, int] | None = None  # tokens of every request of the step that begins, by id
        self.step: Step | None = None  # the same step, once the batch is known
        self.pending: Step | None = None  # the step before, if it has events that are not carried out yet
        self.observer: Observer | None = None
        self.steps = 0  # with at least one token, so far
        # ranks agree on what they drop, so one of them counts
        self.meter = Meter(exporter=Exporter.where_collected() if rank == 0 else None)
        self.ranks = other_ranks(vllm_config.parallel_config.tensor_parallel_size)
        self._computed: Mapping[str, int] = {}  # tokens that the scheduler counts, of requests that are not new
        self._ring_lines: tuple[Tensor, Tensor | None] | None = None
        self._pieces: list[Pieces] | None = None
        self._suspended: dict[str, Callable[[], None]] = {}  # preempted requests: begin again
        self._modules = get_layers_from_vllm_config(vllm_config, Attention)
        check_layers(self._modules, vllm_config)
        self.first_head = rank * next(iter(self._modules.values())).num_kv_heads
        self.layers: list[Layer] = []
        self.use(config)
        for number, layer in enumerate(self.layers):
            layer.module.impl.runtime, layer.module.impl.layer_number = self, number

    def use(self, config: EngineConfig) -> None:
        """Serve by another method from now on, under the same budget.

        No request may be running: those that finished are forgotten here, before the scheduler says so.

        Raises:
            ServingError: the statistics or the rotary embedding that the method needs are missing.

        """
        for name in list(self.sequences):
            self._forget(name)
        self.pending = None
        self.config = replace(config, method=with_markers(config.method, self.vllm_config))
        model, needs = self.vllm_config.model_config, self.config.method.needs
        places = self.vllm_config.scheduler_config.max_num_seqs
        rotates = needs.rotary or needs.observes or needs.calibration
        self.rotary = rotary_of(self.vllm_config, self.device) if rotates else None
        known = statistics_of(self.vllm_config, config.calibration, needs, self.device) if needs.calibration else None
        layouts = [layer.layout for layer in self.layers] or [None] * len(self._modules)
        self.layers = []
        for (name, module), layout in zip(self._modules.items(), layouts, strict=True):
            shape = (places, module.num_kv_heads, module.num_heads, module.head_size)
            index, first = extract_layer_index(name), self.first_head * module.num_heads // module.num_kv_heads
            heads = slice(first, first + module.num_heads)
            statistics = None if known is None else own_heads(known.layer(index), heads)
            slots = LayerSlots(*shape, model.dtype, self.device, needs, self._row_states_of(module))
            self.layers.append(Layer(index, module, slots, statistics, layout))
        self.token_ids: Tensor | None = None  # int32 [places, length]
        if needs.token_ids:
            self.token_ids = torch.zeros(places, model.max_model_len, dtype=torch.int32, device=self.device)

    def find_layout(self) -> None:
        """Ask the platform where it puts keys and values, once blocks exist and before any request runs."""
        for layer in self.layers:
            module = layer.module

            def write(keys: Tensor, values: Tensor, kv_cache: Tensor, slots: Tensor, module: Any = module) -> None:
                module.impl.write(module, keys, values, kv_cache, slots)

            # block 0 is vLLM's null block, where padding goes
            layer.layout = Layout.probe(module.kv_cache, 1, module.num_kv_heads, module.head_size, write)

    # -- one step ---------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def begin(self, scheduled: Any) -> None:
        """Take in what the scheduler sends before a step (`SchedulerOutput`), and carry out the events of the last one.

        They wait for it so that nobody waits for them: a step's tokens are out before, a first token above all, and
        requests that ended with the step need none. Until the model runs, nothing is written to any block, not even
        to those that the scheduler took back for the next request.
        """
        for name in scheduled.finished_req_ids:
            if self.config.log_requests and self.rank == 0 and name in self.sequences:
                logger.info("Request %s ended: %s.", name, self.sequences[name])
            self._forget(name)
            self._suspended.pop(name, None)
        for name in scheduled.preempted_req_ids or ():
            if name in self.sequences:
                self._suspend(name)
        self._carry_out_events()
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
            self._choose_rows(self.fed)

    def make_physical(self, common: CommonAttentionMetadata, block_size: int) -> CommonAttentionMetadata:
        """A step's attention metadata with the lengths and slots that are there, for the kernels."""
        assert self.fed is not None
        step = Step(self.fed, self.sequences, self._batch_order(common), common.block_table_tensor)
        self.step, self._ring_lines, self._pieces = step, None, None
        self._check_agreement(step)
        dropped_B = _padded(torch.from_numpy(step.lengths - step.held), common.num_reqs, 0)
        lengths_B, upper_B = common.seq_lens, common.seq_lens_cpu_upper_bound
        return common.replace(
            seq_lens=lengths_B - dropped_B.to(lengths_B.device, lengths_B.dtype, non_blocking=True),
            seq_lens_cpu_upper_bound=None if upper_B is None else upper_B - dropped_B.to(upper_B.dtype),
            max_seq_len=step.longest,
            slot_mapping=_padded(step.physical_slots(block_size), len(common.slot_mapping), -1),
        )

    def after_attention(self, number: int, query: Tensor) -> None:
        """Called by every compressed layer after it attended: remember its queries, for events of this step and later.

        Args:
            number: which layer, in the order they run.
            query: rotated queries [tokens, Hq, D], padding behind them.

        """
        step = self.step
        if step is None:  # a warm-up that no scheduler asked for
            return
        layer = self.layers[number]
        if number == 0 and self.token_ids is not None:
            self._log_tokens(step)
        if layer.slots.ring is not None:
            if self._ring_lines is None:
                self._ring_lines = step.ring_lines(layer.slots.ring.shape[1], self.device)
            layer.slots.remember_queries(query[: step.tokens], self._ring_lines)
        if self.config.method.needs.observes:
            self._observe(layer, query)

    def end(self, seconds: float) -> None:
        """Move the requests on after a step that took so long, the events at its beginning included."""
        step, self.step, self.fed = self.step, None, None
        if step is not None:
            step.end()
            self.meter.note_step(step, seconds)
            self.pending = step if step.events else None

    def token_ids_of(self, events: list[RequestEvent]) -> tuple[Tensor, ...]:
        """Per request with an event, int64 [length]: every token it has seen, those of the step included."""
        assert self.token_ids is not None
        return tuple(self.token_ids[event.sequence.place, : event.after.logical].long() for event in events)

    # -- internals --------------------------------------------------------------------------------------------------

    def _carry_out_events(self) -> None:
        step, self.pending = self.pending, None
        if step is None:
            return
        start = time.perf_counter()
        with torch.autocast(self.device.type, enabled=False):  # scores are float32 whoever calls
            carry_out_events(self, step)
        self.meter.seconds += time.perf_counter() - start

    def _row_states_of(self, module: Any) -> Callable[[int], dict[str, Tensor]] | None:
        if not self.config.method.needs.observes:
            return None
        geometry = {"query_heads": module.num_heads, "head_dim": module.head_size, "device": self.device}
        return partial(self.config.method.new_row_state, **geometry)

    def _observe(self, layer: Layer, query: Tensor) -> None:
        assert self.step is not None and self.rotary is not None
        if self._pieces is None:
            self._pieces = Pieces.of(self.step, self.device)
        with torch.autocast(self.device.type, enabled=False):
            for one in self._pieces:
                queries_bHqnD = query[one.token_bn].transpose(1, 2)
                seen = Observed(queries_bHqnD, one.position_bn, one.valid_bn, layer=layer.index, rotary=self.rotary)
                layer.slots.observe(self.config.method, one.place_b, seen)

    def _admit(self, name: str, prompt: int, sampling_params: Any) -> None:
        try:
            asked = RequestConfig.of(getattr(sampling_params, "extra_args", None))
        except ServingError as error:  # a server that was told to (`RequestOptions`) has refused it before
            logger.warning("Request %s runs with reasonkv's defaults: %s", name, error)
            asked = RequestConfig()
        budget = self.config.budget
        if not asked.enabled:
            if self.has_scheduler:
                self._open(name, prompt, None, self.config.method, asked.seed)
                return
            logger.warning("Request %s is compressed: to keep full KV it needs --scheduler-cls %s.", name, SCHEDULER)
        if budget.prompt == "keep" and prompt + max(budget.recent, self.config.method.needs.recent) >= budget.tokens:
            logger.warning(
                "Request %s has a prompt of %d tokens, which prompt='keep' cannot hold in a budget of %d; "
                "its prompt is compressed like the rest.", name, prompt, budget.tokens,
            )  # fmt: skip
        self._open(name, prompt, schedule.row_budget(budget), self._method_of(name, asked), asked.seed)

    def _suspend(self, name: str) -> None:
        """A request is preempted: it leaves its place, and will begin again as it began."""
        one = self.sequences[name]
        own = None if one.budget is None else schedule.row_budget(self.config.budget)
        self._suspended[name] = partial(self._open, name, one.state.prompt, own, one.method, one.seed)
        self._forget(name)

    def _open(self, name: str, prompt: int, budget: Budget | None, method: Method, seed: int) -> None:
        """A request begins, from nothing."""
        place = self.free_places.pop()
        for layer in self.layers:
            layer.slots.start(place)
        self.courses.start(place, budget, schedule.Lengths(prompt=prompt))
        self.sequences[name] = Sequence(courses=self.courses, place=place, method=method, seed=seed)

    def _method_of(self, name: str, asked: RequestConfig) -> Method:
        """The engine's method with a request's options; one and the same for all requests with equal ones."""
        try:
            made = method_of(self.config.method, asked.options)
        except ServingError as error:
            logger.warning("Request %s runs with the engine's options: %s", name, error)
            return self.config.method
        return next((one.method for one in self.sequences.values() if one.method == made), made)

    def _note_resumed(self, name: str) -> None:
        if self.has_scheduler:
            periodic = isinstance(self.config.budget, PeriodicWindow)
            logger.info(_RESUMED_PERIODIC if periodic else _RESUMED, name)
        else:
            logger.warning(_FED_AGAIN, name)

    def _forget(self, name: str) -> None:
        sequence = self.sequences.pop(name, None)
        if sequence is not None:
            self.free_places.append(sequence.place)

    def _check_agreement(self, step: Step) -> None:
        theirs = [self._computed.get(name, 0) for name in step.order]
        ours = step.lengths.tolist()
        if ours != theirs:
            name, length, known = next(one for one in zip(step.order, theirs, ours, strict=True) if one[1] != one[2])
            raise RuntimeError(f"The scheduler has {length} tokens of request {name} in the cache, the worker {known}.")

    def _choose_rows(self, all_fed: Mapping[str, int]) -> None:
        """The events that the step's number brings; the scheduler's manager of blocks computes the same."""
        policy, self.steps = self.config.budget, self.steps + 1
        if not isinstance(policy, PeriodicWindow):
            return
        ends, windows = {}, {}
        for name, fed in all_fed.items():
            one = self.sequences[name]
            if isinstance(one.budget, ExplicitEventsWindow):
                ends[name] = one.state._replace(logical=one.state.logical + fed)
                windows[name] = one.budget
        raw = {name: schedule.raw_tokens(windows[name], state) for name, state in ends.items()}
        for name in schedule.periodic_round(policy, self.steps - 1, raw):
            place = self.sequences[name].place
            self.courses.set_budget(place, schedule.listed(windows[name], ends[name].logical))

    def _batch_order(self, common: CommonAttentionMetadata) -> list[str]:
        states = getattr(self.runner, "req_states", None)  # the second model runner keeps a table of requests
        if states is not None:
            return [states.index_to_req_id[int(number)] for number in common.req_idx]
        assert self.fed is not None
        order: list[str] = self.runner.input_batch.req_ids[: len(self.fed)]
        return order

    def _log_tokens(self, step: Step) -> None:
        assert self.token_ids is not None
        buffers = getattr(self.runner, "input_buffers", None)
        ids = (self.runner.input_ids.gpu if buffers is None else buffers.input_ids)[: step.tokens]
        where = torch.from_numpy(np.stack([step.place, step.position])).to(self.device)
        self.token_ids[where[0], where[1]] = ids.to(torch.int32)


def _padded(numbers_n: Tensor, size: int, value: int) -> Tensor:
    """With as many of a value behind them: what is beyond a step's requests and tokens is padding."""
    return functional.pad(numbers_n, (0, size - len(numbers_n)), value=value) if len(numbers_n) < size else numbers_n
