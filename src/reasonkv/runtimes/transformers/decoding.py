"""A drop-in for code that makes its own cache.

model.generate(**inputs, custom_generate=reasonkv.generate("snapkv", 512))
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from reasonkv.budget import Budget
from reasonkv.methods import Method, get_method, refuse_future
from reasonkv.runtimes.transformers.cache import CompressedCache
from reasonkv.runtimes.transformers.stats import CacheStats
from reasonkv.runtimes.transformers.support import UnsupportedModelError


class generate:  # noqa: N801 - used like a function: custom_generate=reasonkv.generate(...)
    """A decoding function for `custom_generate` that swaps the cache `generate` made for a compressed one.

    Args:
        method: a method or its spec.
        budget: a `Budget`, its tokens, or None for full KV.
        options: further arguments of `CompressedCache` (seed, prompt_lengths, ...).

    Raises:
        MethodError: an unknown method, or one that looks into the future.

    Attributes:
        stats: what the last call's cache held, or None before the first.

    """

    def __init__(self, method: str | Method, budget: Budget | int | None = None, **options: Any) -> None:
        refuse_future(get_method(method))  # whatever the options: what is generated need not be what a reference knows
        self.method, self.budget, self.options = method, budget, options
        self.stats: CacheStats | None = None

    def __call__(
        self, model: PreTrainedModel, input_ids: Tensor, generation_config: GenerationConfig, **kwargs: Any
    ) -> Any:
        """Called by `model.generate` with its prepared arguments."""
        if kwargs.get("assistant_model") is not None:
            raise UnsupportedModelError("A compressed cache cannot be rolled back, so assisted decoding is impossible.")
        with CompressedCache(model, self.method, self.budget, **self.options) as cache:
            kwargs["past_key_values"] = cache
            decode = model._beam_search if (generation_config.num_beams or 1) > 1 else model._sample
            out = decode(input_ids, generation_config=generation_config, **kwargs)
            self.stats = cache.stats()
        return out
