"""What an engine checks and looks up once its model is loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_layers_from_vllm_config
from vllm.distributed import get_tp_group
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec, FullAttentionSpec, MambaSpec, SlidingWindowSpec

from reasonkv.budget import Budget, BudgetError
from reasonkv.calibration import Calibration, CalibrationError
from reasonkv.calibration.files import FILE, load_calibration
from reasonkv.layers import layer_rotaries
from reasonkv.methods import Method, Requirements, layer_budgets
from reasonkv.numbers import CALIBRATED, shares_in_groups
from reasonkv.resolve import check_model
from reasonkv.rotary import Rotary, RotaryError, RotaryLimits
from reasonkv.runtimes.vllm.backend import CompressedImpl
from reasonkv.runtimes.vllm.config import EngineConfig, ServingError
from reasonkv.runtimes.vllm.layout import Codec, Layout, LayoutError
from reasonkv.runtimes.vllm.spec import BoundedSpec
from reasonkv.view import LayerStatistics

STOCK = (SlidingWindowSpec, ChunkedLocalAttentionSpec, MambaSpec)
"""Caches of a fixed size (windows, recurrent states, convolutions), which stay as vLLM makes them."""


def growing_layers(vllm_config: Any) -> dict[str, Any]:
    """Return the attention layers whose cache grows with every token, by name, in the order they run."""
    layers = get_layers_from_vllm_config(vllm_config, Attention)
    return {name: one for name, one in layers.items() if _grows(one.get_kv_cache_spec(vllm_config))}


def _grows(spec: Any) -> bool:
    return type(spec) is FullAttentionSpec and spec.sliding_window is None and spec.attention_chunk_size is None


def bounded_specs(
    found: dict[str, Any], config: EngineConfig, budgets: Mapping[str, Budget], max_length: int, max_chunk: int,
    *, allows_groups: bool,
) -> dict[str, Any]:  # fmt: skip
    """Return every layer's cache as the scheduler is to see it: a budget for those that grow, others as they are.

    `found` is what vLLM has, and `budgets` are those of the layers that grow, by layer; `allows_groups`: vLLM gives
    kinds of layers blocks of their own. Raises a ServingError for a kind of cache that is neither, or for layers that
    grow but are of different shapes.
    """
    grows = {name: _grows(spec) for name, spec in found.items()}
    foreign = [name for name, spec in found.items() if not grows[name] and type(spec) not in STOCK]
    if foreign:
        kind = type(found[foreign[0]]).__name__
        raise ServingError(f"Layer {foreign[0]} keeps a cache of vLLM's kind {kind}, which reasonkv does not bound.")
    is_hybrid = not all(grows.values())
    if (is_hybrid or config.budget.layer_shares) and not allows_groups:
        raise ServingError(
            "A hybrid model needs blocks of their own for layers of each kind, and layer_shares for layers of each "
            "budget; drop --disable-hybrid-kv-cache-manager."
        )
    if len({found[name] for name, one in grows.items() if one}) > 1:
        raise ServingError("Full-attention layers of different shapes are not served yet; use them with transformers.")
    first = next((budgets[name] for name in found if grows[name]), None)
    return {
        name: BoundedSpec.of(
            spec, config, budgets[name], max_length, max_chunk, is_hybrid=is_hybrid, is_first=budgets[name] == first
        )
        if grows[name]
        else spec
        for name, spec in found.items()
    }


def check_shares(config: EngineConfig, vllm_config: Any) -> None:
    """Raise a ServingError for shares that the calibration lacks, before any weight is loaded."""
    if config.budget.layer_shares == CALIBRATED:
        _calibrated_shares(config, vllm_config)


def with_shares(config: EngineConfig, vllm_config: Any, layers: int) -> EngineConfig:
    """Return the configuration with its layers' shares as numbers, alike within each of its groups of layers.

    `layers` is the number of bounded ones. Raises a ServingError for shares that the calibration lacks, that are those
    of another number of layers, or that leave a layer too little.
    """
    shares = str(config.budget.layer_shares)
    if not shares:
        return config
    if shares == CALIBRATED:
        shares = _calibrated_shares(config, vllm_config)
    try:
        groups = config.layer_groups or groups_for(layers, _other_layers(vllm_config))
        budget = replace(config.budget, layer_shares=shares_in_groups(shares, groups))
        layer_budgets(config.method, budget, layers)
    except BudgetError as error:
        raise ServingError(str(error)) from None
    return replace(config, budget=budget)


def _calibrated_shares(config: EngineConfig, vllm_config: Any) -> str:
    found = statistics_of(
        vllm_config, config.calibration, Requirements(), torch.device("cpu"), "--task QUESTIONS --layer-shares"
    )
    try:
        return found.shares()
    except CalibrationError as error:
        raise ServingError(str(error)) from None


def _other_layers(vllm_config: Any) -> list[int]:
    """Return the numbers of layers of every kind that is not bounded."""
    every: Any = AttentionLayerBase
    found = (one.get_kv_cache_spec(vllm_config) for one in get_layers_from_vllm_config(vllm_config, every).values())
    return list(Counter(spec for spec in found if spec is not None and not _grows(spec)).values())


def groups_for(layers: int, others: Sequence[int] = ()) -> int:
    """Return into how many groups shares put so many layers: about six with all others, and few padded.

    More groups are closer to the shares, but a step makes attention metadata for each.

    Args:
        layers: that are bounded.
        others: numbers of layers of other kinds, of hybrid models.
    """

    def cost(groups: int) -> tuple[float, int]:
        sizes = [layers * (at + 1) // groups - layers * at // groups for at in range(groups)]
        size, found = grouped([*sizes, *others])
        padded = size * found / (layers + sum(others)) - 1
        return padded + abs(found - 6.5) / 20, -groups

    return min(range(2, min(8, layers) + 1), key=cost, default=1)


def grouped(kinds: Sequence[int]) -> tuple[int, int]:
    """Return how many layers vLLM puts into each group, and how many groups it makes, of so many layers of each kind.

    All groups are of one size, padded where layers lack: that of the smallest kind, or of the largest if none is half
    as large again.
    """
    size = max(kinds) if max(kinds) < 1.5 * min(kinds) else min(kinds)
    return size, sum(-(-layers // size) for layers in kinds)


def budgets_by_layer(config: EngineConfig, names: Sequence[str]) -> dict[str, Budget]:
    """Return the budget of every bounded layer, by name; `names` are in the order the layers run."""
    if not config.budget.layer_shares:
        return dict.fromkeys(names, config.budget)
    # requests take turns here (`stagger`), not layers
    each = layer_budgets(config.method, replace(config.budget, stagger=1), len(names))
    return {name: replace(one, stagger=config.budget.stagger) for name, one in zip(names, each, strict=True) if one}


def check_layers(modules: dict[str, Any], vllm_config: Any) -> None:
    """Raise a ServingError for attention layers, by name, that are not plain full attention through our backend."""
    problems = check_model(vllm_config.model_config.hf_config)
    if problems:
        raise ServingError(problems[0])
    if not modules:
        raise ServingError("The model has no attention layers that reasonkv could bound.")
    for name, module in modules.items():
        if not isinstance(module.impl, CompressedImpl):
            raise ServingError(
                f"Layer {name} runs on {type(module.impl).__name__}, which reasonkv does not drive; choose "
                "--attention-backend FLASH_ATTN or TRITON_ATTN (CPU_ATTN on CPU), and start each engine in a process "
                "of its own."
            )
        if module.head_size_v != module.head_size:
            raise ServingError("Values of another width than keys are not served yet.")

    names = modules.keys()
    every = get_layers_from_vllm_config(vllm_config, Attention).values()
    if any(one.kv_sharing_target_layer_name in names for one in every):
        raise ServingError("Layers that share keys and values are not served: one's compaction would cut another.")


def layout_of(module: Any, dtype: torch.dtype) -> tuple[Layout, Codec | None]:
    """Ask the platform where it puts a layer's keys and values, and return what they stand for if stored in 8 bits.

    `dtype` is the model's. Raises a ServingError where nothing can be read back.
    """
    codec = None
    if module.kv_cache.dtype == torch.uint8:
        wide = module.kv_cache_dtype == "fp8_e5m2"
        stored = torch.float8_e5m2 if wide else current_platform.fp8_dtype()
        codec = Codec(stored, {"keys": module._k_scale_float, "values": module._v_scale_float})
    write = partial(module.impl.write, module)
    try:  # block 0 is vLLM's null block, where padding goes
        found = Layout.probe(module.kv_cache, 1, module.num_kv_heads, module.head_size, write, codec, dtype)
    except LayoutError as error:
        raise ServingError(str(error)) from None
    return found, codec


def with_markers(method: Method, vllm_config: Any) -> Method:
    """Return the method with what an option leaves to the model's tokenizer filled in."""
    model = vllm_config.model_config
    if type(method).for_tokenizer is Method.for_tokenizer or model.skip_tokenizer_init:
        return method
    from transformers import AutoTokenizer

    return method.for_tokenizer(AutoTokenizer.from_pretrained(model.tokenizer))


def rotary_of(vllm_config: Any, layers: list[int], device: torch.device) -> Rotary:
    """Return the rotary embedding of the bounded layers, by index; raise a ServingError if it cannot be undone."""
    config = vllm_config.model_config.hf_config
    if RotaryLimits.of(config).has_axes:
        raise ServingError(
            "The tokens of images have several rotary positions, and this method un-rotates keys by one; choose a "
            "method that does not, such as snapkv."
        )
    try:
        every = layer_rotaries(config)
    except RotaryError as error:
        raise ServingError(str(error)) from None
    first, *others = (every[layer] for layer in layers)
    if any(other is not first for other in others):
        raise ServingError("The model rotates only some of its layers, which this method cannot be served with yet.")
    return first.to(device)


def statistics_of(
    vllm_config: Any, given: str | None, needs: Requirements, device: torch.device, flags: str = "--text FILE"
) -> Calibration:
    """Return statistics of the model's queries: from the file that is given, or from the model's folder.

    They are checked against the configuration, but not against the weights: vLLM lays those out otherwise. Raises a
    ServingError for none (with `flags`, `reasonkv calibrate` makes some), another model's, or a missing part.
    """
    model = vllm_config.model_config
    path = Path(given).expanduser() if given is not None else Path(model.model) / FILE
    if given is None and not path.is_file():
        raise ServingError(
            f"The method or layer_shares need a calibration, and {model.model} is no folder that has one; make "
            f"it with `reasonkv calibrate --model {model.model} {flags} --out stats.safetensors` and put "
            '"calibration": "stats.safetensors" into the configuration.'
        )
    try:
        found = load_calibration(path)
        found.check(model.hf_config)
    except CalibrationError as error:
        raise ServingError(str(error)) from None
    known = {"square": found.square_LHqF, "horizon": found.horizon_LHqJ, "forecast": found.forecast}
    missing = sorted(part for part in needs.statistics if known[part] is None)
    if missing:
        raise ServingError(
            f"{path} has no {' and no '.join(missing)} statistics, which the method reads with these options; make "
            "them with `reasonkv calibrate`, for the horizon with --horizon, for a forecast with --forecast."
        )
    return found.to(device)


def own_heads(whole: LayerStatistics, heads: slice, kv_heads: slice) -> LayerStatistics:
    """Return one layer's statistics of this rank's query heads and KV heads."""
    square = None if whole.square_HqF is None else whole.square_HqF[heads]
    horizon = None if whole.horizon_HqJ is None else whole.horizon_HqJ[heads]
    forecast = None if whole.forecast is None else whole.forecast.part(kv_heads)
    return LayerStatistics(whole.mean_HqF[heads], whole.modulus_HqF[heads], square, horizon, forecast)


class TensorParallelRanks:
    """The ranks that hold a layer's other heads, for methods whose heads decide together (`SlotView.reduce`).

    Everything goes through vLLM's own group by one collective, gathering, and is added up in the order of the ranks.
    So all ranks have the same numbers to the bit, and evict the same slots.
    """

    def gather(self, x: Tensor) -> Tensor:
        """Return every rank's `x`, stacked in front."""
        gathered: Tensor = get_tp_group().all_gather(x.contiguous()[None], 0)
        return gathered
