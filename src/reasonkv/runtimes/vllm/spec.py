"""The KV cache spec that tells vLLM's scheduler how many slots a request may hold."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Self

from vllm.v1.kv_cache_interface import FullAttentionSpec

from reasonkv import schedule
from reasonkv.budget import Budget


@dataclass(frozen=True, kw_only=True)
class BoundedSpec(FullAttentionSpec):  # type: ignore[misc]
    """One full-attention layer whose physical length follows `reasonkv.schedule`."""

    budget: Budget  # of every request
    max_length: int  # most tokens of a request (the engine's `max_model_len`)
    max_chunk: int  # of a chunk that crosses a compaction: 1 where chunks end there, else `max_num_batched_tokens`

    @classmethod
    def of(cls, spec: FullAttentionSpec, budget: Budget, max_length: int, max_chunk: int) -> BoundedSpec:
        """Return a stock full-attention spec with a budget."""
        stock = {one.name: getattr(spec, one.name) for one in fields(FullAttentionSpec) if one.init}
        return cls(**stock, budget=budget, max_length=max_length, max_chunk=max_chunk)

    def slots_in_prefill(self, prompt: int, fill: int) -> int:
        """Return the most slots until `fill` tokens are in: the prompt, or all tokens of a preempted request.

        A stock scheduler cuts the prompt into chunks of its own choosing; a chunk that crosses a compaction has it at
        its end.
        """
        most = schedule.bound(self.budget, prompt, self.max_length, 1 if fill <= prompt else self.max_chunk)
        if self.budget.prefill_chunk and self.budget.prompt == "count":
            kept = schedule.kept_share(self.budget, prompt, prompt)
            most = max(most, min(prompt, kept + self.budget.prefill_chunk - 1 + self.max_chunk))
        return most

    def slots_in_decode(self, prompt: int) -> int:
        """Return the most slots from then on, one token a step; of a `Window`, at its full length."""
        return schedule.capacity(self.budget, prompt, self.max_length)

    def blocks(self, slots: int) -> int:
        """Return how many blocks hold so many slots."""
        size: int = self.block_size
        return -(-slots // size)

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """Return the bytes of a request whose prompt fits the budget; vLLM derives its maximum concurrency from them.

        A longer prompt needs more during prefill; the worker checks that one of full length fits
        (`Worker.initialize_from_config`).
        """
        longest = vllm_config.model_config.max_model_len  # vLLM tries shorter ones, too
        used: int = self.blocks(schedule.capacity(self.budget, 1, longest)) * self.page_size_bytes
        return used

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """Return one spec for the layers of a group, which all have the same budget."""
        if any(spec != specs[0] for spec in specs):
            raise ValueError("Layers of different shapes cannot share blocks under a budget.")
        return specs[0]
