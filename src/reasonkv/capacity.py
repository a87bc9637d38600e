"""How many requests run at once on given devices, and how fast, by the floor model: with full KV and bounded.

A request has a prompt and an answer of fixed lengths. Requests are at all stages of their answers at once, so each
holds on average what it holds on average over its answer. Links between devices cost nothing here.
"""

from __future__ import annotations

import copy
import math
import os
import time
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.initialization import no_init_weights

from reasonkv.budget import Budget
from reasonkv.floor import Shape, Work, attention_work, compaction, shape_of, weights_work
from reasonkv.layers import head_dim_of, is_latent, text_config
from reasonkv.load import CapacityError, Load, amount
from reasonkv.rates import GPUS as GPUS
from reasonkv.rates import Clock, Rates, measure_attention, measure_rates, shortest
from reasonkv.schedule import attended_slots, bound, walk

THIS = ("this", "cpu")
"""Names of this machine in place of a GPU's: its accelerator if there is one, and its CPU in any case."""
_MEASURED_BATCH, _MEASURED_SLOTS, _MEASURED_BYTES = 64, 4096, 2**29  # the most that efficiencies are measured with


class Device(NamedTuple):
    """What a plan counts with."""

    name: str  # in words
    memory: float  # bytes
    rates: Rates  # peaks of a data sheet, or measured
    products: float = 1.0  # share of the rates that products with weights reach; 1 of a data sheet
    attention: float = 1.0  # the same of attention


@dataclass(frozen=True)
class Capacity:
    """What runs, under one rule of what is kept."""

    kept: str  # the rule in words
    slots_mean: float  # slots of a request per KV head and layer, mean over its answer
    slots_peak: int  # the most it ever holds
    bytes_mean: float  # of a request's cache on all devices of a copy, mean over its answer
    bytes_peak: float  # the most
    at_once: int  # requests that run at once on all copies, as their mean bytes fit; no more than are asked for
    at_once_surely: int  # those that fit if all are at their peak together
    step_ms: float  # one token of every running request of a copy, milliseconds
    tokens_per_second: float  # answer tokens, of all copies, prompts and compactions included
    hours: float | None  # until all requests have their answers; None where no request fits


@dataclass(frozen=True)
class Plan:
    """One model on given devices."""

    device: str  # its name
    devices: int  # how many
    parameters: int  # of the model
    weight_bytes: float  # of one copy of the weights, on the device that holds the most
    cache_memory: float  # bytes that a device has left for keys and values
    kv_copies: float  # how often each KV head is stored, because there are more ranks than heads, or they do not divide
    full: Capacity  # with full KV
    bounded: Capacity  # with the budget


def find_device(name: str, dtype: torch.dtype, clock: Clock = time.perf_counter) -> Device:
    """Return a GPU of the table by its name, or this machine by its measured rates.

    Raises:
        CapacityError: an unknown name.
    """
    for known, gpu in GPUS.items():
        if known.lower() == name.lower():
            return Device(known, gpu.memory, gpu.rates)
    if name.lower() not in THIS:
        raise CapacityError(f"There is no GPU {name!r} in the table; choose one of {', '.join(GPUS)}, or this, or cpu.")
    if name.lower() == "this" and torch.cuda.is_available():
        about = torch.cuda.get_device_properties(0)
        return Device(about.name, about.total_memory, measure_rates(dtype, "cuda"))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device("this CPU", memory, measure_rates(dtype, clock=clock))


@torch.no_grad()
def with_efficiencies(
    device: Device, config: PreTrainedConfig, batch: int, slots: int, dtype: torch.dtype, place: str,
    clock: Clock = time.perf_counter,
) -> Device:  # fmt: skip
    """Return a device with what its products and its attention reach of its rates, at a batch and a number of slots.

    Timed are a step of the model without a cache (its first layers, 0.5 GB of them, in weights that mean nothing), and
    one layer's attention. A square product, by which the rates go, says little about the few rows of a step.

    Raises:
        CapacityError: a model whose first layers cannot be run alone.
    """
    decoder = text_config(config)
    batch, slots = min(batch, _MEASURED_BATCH), min(slots, _MEASURED_SLOTS)
    few = _first_layers(config, dtype)
    least = weights_work(shape_of(few), batch, dtype).seconds(device.rates)
    try:
        with no_init_weights(), torch.device(place):
            model = AutoModelForCausalLM.from_config(few, dtype=dtype).eval()
        for parameter in model.parameters():
            parameter.fill_(0.01)
        ids = torch.ones(batch, 1, dtype=torch.long, device=place)
        took = shortest(lambda: model(ids, use_cache=False), torch.device(place), clock)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise CapacityError(
            f"The first layers of {config.model_type} cannot be timed alone on {device.name}; name a GPU of the table."
        ) from error
    device = device._replace(products=min(1.0, least / took))
    if is_latent(decoder):
        return device
    heads, dim = decoder.num_attention_heads, head_dim_of(decoder)
    kv_heads = getattr(decoder, "num_key_value_heads", None) or heads
    layer = Work(2.0 * batch * kv_heads * slots * dim * dtype.itemsize, 4.0 * batch * heads * slots * dim)
    took = measure_attention(batch, kv_heads, heads // kv_heads, dim, slots, dtype, place, clock)
    return device._replace(attention=min(1.0, layer.seconds(device.rates) / took))


def _first_layers(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedConfig:
    """Return the configuration of a model's first layers, of 0.5 GB at most but one at least."""
    few = copy.deepcopy(config)
    decoder, shape = text_config(few), shape_of(config)
    each = (shape.dense + shape.experts) * dtype.itemsize / decoder.num_hidden_layers
    decoder.num_hidden_layers = max(1, min(decoder.num_hidden_layers, int(_MEASURED_BYTES / each)))
    types = getattr(decoder, "layer_types", None)
    if types:
        decoder.layer_types = types[: decoder.num_hidden_layers]
    return few


def step_seconds(shape: Shape, device: Device, batch: int, slots: float, seen: float, dtype: torch.dtype) -> float:
    """Return the time of a decode step: products with weights, then attention over that many slots."""
    products = weights_work(shape, batch, dtype).seconds(device.rates) / device.products
    attention = attention_work(shape, batch, 1, slots - 1, dtype, seen).seconds(device.rates)
    return products + attention / device.attention


def slots_over_answer(budget: Budget | None, prompt: int, length: int) -> tuple[float, int]:
    """Return the slots that tokens of an answer attend to on average, and those its compactions keep, summed up."""
    chunks = walk(budget, prompt, length)
    moved = sum(after.physical for before, _, after, cut in chunks if cut and before.logical >= prompt)
    return attended_slots(budget, prompt, length) / (length - prompt), moved


def plan_capacity(
    config: PreTrainedConfig, device: Device, load: Load, budget: Budget, dtype: torch.dtype, place: str | None = None
) -> Plan:
    """Return what runs on the devices, with full KV and under a budget.

    Args:
        config: the model's.
        device: each of them.
        load: requests, and how the devices share the model.
        budget: of the bounded cache.
        dtype: of weights, keys and values.
        place: torch's name of a device of this machine, to time products and attention at the plan's own batch.

    Raises:
        CapacityError: the weights do not fit, or the model cannot be divided so.
        FootprintError: a model whose cache cannot be measured without weights.
    """
    shape, decoder = shape_of(config), text_config(config)
    layers, ranks, stages = decoder.num_hidden_layers, load.tensor_parallel, load.pipeline_parallel
    if stages > layers:
        raise CapacityError(f"{layers} layers cannot be divided among {stages} pipeline stages.")
    if decoder.num_attention_heads % ranks:
        raise CapacityError(
            f"{decoder.num_attention_heads} query heads do not divide among {ranks} tensor-parallel ranks."
        )
    heads = 1 if is_latent(decoder) else getattr(decoder, "num_key_value_heads", None) or decoder.num_attention_heads
    copies = math.ceil(heads / ranks) * ranks / heads
    deepest = math.ceil(layers / stages) / layers  # share of the layers on the stage that has most
    ends = [shape.head, max(0, shape.parameters - shape.dense - shape.experts - shape.head)]
    held = (shape.dense + shape.experts) * deepest + (sum(ends) if stages == 1 else max(ends))
    weight_bytes = held * dtype.itemsize / ranks
    memory = device.memory * (1 - load.reserve) - weight_bytes
    if memory <= 0:
        raise CapacityError(
            f"The weights take {weight_bytes / 1e9:,.1f} GB of each device, and {device.name} has "
            f"{device.memory * (1 - load.reserve) / 1e9:,.1f} GB without the reserve; raise tensor_parallel or "
            "pipeline_parallel, or take a larger device."
        )
    found = [
        _capacity(shape, config, device, load, one, dtype, (memory, copies, deepest), place) for one in (None, budget)
    ]
    devices = ranks * stages * load.data_parallel
    return Plan(device.name, devices, shape.parameters, weight_bytes, memory, copies, *found)


def _capacity(
    shape: Shape, config: PreTrainedConfig, device: Device, load: Load, budget: Budget | None, dtype: torch.dtype,
    division: tuple[float, float, float], place: str | None,
) -> Capacity:  # fmt: skip
    memory, copies, deepest = division
    prompt, length = amount(load.prompt, "prompt"), amount(load.length, "length")
    ranks, stages, answer = load.tensor_parallel, load.pipeline_parallel, length - prompt
    slots, kept = slots_over_answer(budget, prompt, length)
    peak, seen = bound(budget, prompt, length), (prompt + length) / 2
    means = _cache_bytes(shape, slots, seen, dtype) * copies
    peaks = _cache_bytes(shape, peak, length, dtype) * copies
    share = deepest / ranks  # of a request's cache on the device that holds most of it
    asked = math.ceil(load.requests / load.data_parallel)
    running, surely = (min(asked, int(memory / (one * share))) for one in (means, peaks))
    words = "full KV" if budget is None else budget.describe()
    if running == 0:
        return Capacity(words, slots, peak, means, peaks, 0, 0, 0.0, 0.0, None)
    micro = math.ceil(running / stages)
    if place is not None:
        device = with_efficiencies(device, config, micro, math.ceil(slots), dtype, place)
    part = _part(shape, deepest, ranks, copies)
    tick = step_seconds(part, device, micro, slots, seen, dtype)
    moved = compaction(part, 1, kept + 1, kept, dtype).seconds(device.rates) if kept else 0.0
    # prompts are computed beside decode steps, which read the weights anyway
    whole = weights_work(part, prompt, dtype).plus(attention_work(part, 1, prompt, 0, dtype))
    prefill = whole.operations / device.rates.operations_per_second / device.products
    each = answer * tick / micro + prefill + moved  # seconds of a stage for one request
    rate = load.data_parallel * answer / each
    return Capacity(
        words, slots, peak, means, peaks, running * load.data_parallel, surely * load.data_parallel,
        1e3 * tick * stages, rate, load.requests * answer / rate / 3600,
    )  # fmt: skip


def _part(shape: Shape, deepest: float, ranks: int, copies: float) -> Shape:
    """Return what one device has of a model: the stage with most layers, and its share of their heads."""
    share = deepest / ranks
    kinds = [
        replace(
            one,
            bytes_per_token=round(one.bytes_per_token * share * copies),
            bytes_fixed=round(one.bytes_fixed * share),
        )
        for one in shape.kinds
    ]
    return replace(
        shape, dense=round(shape.dense * share), experts=round(shape.experts * share), head=round(shape.head / ranks),
        operations_per_slot=tuple(one * share for one in shape.operations_per_slot), kinds=tuple(kinds),
    )  # fmt: skip


def _cache_bytes(shape: Shape, slots: float, seen: float, dtype: torch.dtype) -> float:
    held = (
        one.bytes_fixed + one.bytes_per_token * min(slots if one.bounded else seen, one.window or math.inf)
        for one in shape.kinds
    )
    return sum(held) * dtype.itemsize / shape.element_size
