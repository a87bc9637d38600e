"""Compressed generation without holding a cache.

model.generate(**inputs, custom_generate=reasonkv.generate_with(SnapKV(), tokens=512))
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Unpack

from torch import Tensor
from transformers import CompileConfig, GenerationConfig, PreTrainedModel

from reasonkv.budget import Budget, BudgetFields
from reasonkv.calibration import Calibration
from reasonkv.methods import Method, get_method, refuse_future
from reasonkv.numbers import KVDtype
from reasonkv.resolve import UnsupportedModelError, resolve_budget
from reasonkv.runtimes.transformers.cache import CompressedCache
from reasonkv.runtimes.transformers.session import Observer
from reasonkv.runtimes.transformers.stats import CacheStats
from reasonkv.runtimes.transformers.steady import SteadyCache

MODES = ("greedy_search", "sample", "beam_search", "beam_sample")
"""Ways of decoding that work, as `GenerationConfig.get_generation_mode` names them."""


class CacheOptions(BudgetFields, total=False):
    """What `generate_with` passes on to `CompressedCache`."""

    prompt_lengths: list[int] | int | None
    seed: int
    row_seeds: list[int] | None
    max_length: int | None
    kernel: str | None
    observer: Observer | None
    calibration: Calibration | str | Path | None
    dtype: KVDtype | None


class GenerateWith:
    """A decoding function for `custom_generate`, with `stats` of its last call (None before the first)."""

    def __init__(
        self, method: Method | None, budget: Budget | int | None, options: dict[str, Any], is_compiled: bool = False
    ) -> None:
        self.method, self.budget, self.options, self.is_compiled = method, budget, options, is_compiled
        self.stats: CacheStats | None = None

    def __call__(
        self, model: PreTrainedModel, input_ids: Tensor, generation_config: GenerationConfig, **kwargs: Any
    ) -> Any:
        """Decode as `model.generate` would, with a compressed cache in place of the one it prepared."""
        check_mode(generation_config)
        options = {"max_length": generation_config.max_length, **self.options}
        if generation_config.prefill_chunk_size is not None:  # else the first forward tells where prompts end
            mask, (rows, columns) = kwargs.get("attention_mask"), input_ids.shape
            options.setdefault("prompt_lengths", [columns] * rows if mask is None else mask.sum(-1).tolist())
        kind = CompressedCache
        if self.is_compiled:
            compile_steps(generation_config)
            kind = SteadyCache
        with kind(model, self.method, self.budget, **options) as cache:
            kwargs["past_key_values"] = cache
            decode = model._beam_search if (generation_config.num_beams or 1) > 1 else model._sample
            out = decode(input_ids, generation_config=generation_config, **kwargs)
            self.stats = cache.stats()
        return out


def check_mode(config: GenerationConfig) -> None:
    """Refuse what `generate` would do by other means than sampling or beams over one cache.

    Raises:
        UnsupportedModelError: one sentence.
    """
    mode = config.get_generation_mode().value
    if mode not in MODES:
        raise UnsupportedModelError(
            f"A compressed cache cannot do {mode.replace('_', ' ')}, which rolls back, branches or reads other layers; "
            "use greedy decoding, sampling or beams."
        )
    if not config.use_cache:
        raise UnsupportedModelError("use_cache=False recomputes the whole text at every step; leave it out.")


def compile_steps(config: GenerationConfig) -> None:
    """Let `generate` compile decode steps, on a CPU, too; with the caller's `compile_config`, if there is one.

    Raises:
        UnsupportedModelError: beams, or a prompt in chunks.
    """
    if (config.num_beams or 1) > 1 or config.prefill_chunk_size is not None:
        raise UnsupportedModelError("compile=True serves no beams and no prefill_chunk_size; leave one of them out.")
    config.compile_config = config.compile_config or CompileConfig()
    config.compile_config._compile_all_devices = True


def generate_with(
    method: str | Method | None = None,
    budget: Budget | int | None = None,
    *,
    compile: bool = False,
    **options: Unpack[CacheOptions],
) -> GenerateWith:
    """Return a decoding function for `model.generate(custom_generate=...)`, also through `pipeline`.

    Args:
        method: a method or its spec; unless given, what `CompressedCache` takes.
        budget: a `Budget`, its tokens, or a `Window`; every field of `Budget` is also a keyword.
        compile: compile decode steps (`SteadyCache`); the first call takes as long as `torch.compile` does.
        options: fields of `Budget`, and arguments of `CompressedCache` (seed, prompt_lengths, ...).

    Raises:
        BudgetError: a budget that makes no sense.
        MethodError: an unknown method, or one that looks into the future.
    """
    made = None if method is None else get_method(method)
    fields = {name: value for name, value in options.items() if name in BudgetFields.__annotations__}
    rest = {name: value for name, value in options.items() if name not in fields}
    whole = Budget.from_fields(budget, fields)
    if made is not None:
        refuse_future(made)
        resolve_budget(made, whole)  # so that a mistake is said here, not in the middle of generate
    return GenerateWith(made, whole, rest, compile)
