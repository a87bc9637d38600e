"""How many slots a request may hold: the KV cache spec that tells vLLM's scheduler about a budget."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from vllm.v1.kv_cache_interface import FullAttentionSpec

from reasonkv import schedule
from reasonkv.budget import Budget

if TYPE_CHECKING:
    from typing import Self


@dataclass(frozen=True, kw_only=True)
class BoundedSpec(FullAttentionSpec):  # type: ignore[misc]
    """One full-attention layer whose physical length follows `reasonkv.schedule`.

    Args:
        budget: of every request.
        max_length: most tokens of a request (the engine's `max_model_len`).
        max_piece: most tokens of a piece that crosses an event: 1 where the scheduler ends pieces at events (ours
            does), otherwise the engine's `max_num_batched_tokens`.

    """

    budget: Budget
    max_length: int
    max_piece: int

    @classmethod
    def of(cls, spec: FullAttentionSpec, budget: Budget, max_length: int, max_piece: int) -> BoundedSpec:
        """A stock full-attention spec with a budget."""
        stock = {one.name: getattr(spec, one.name) for one in fields(FullAttentionSpec) if one.init}
        return cls(**stock, budget=budget, max_length=max_length, max_piece=max_piece)

    def slots_while_filling(self, prompt: int, fill: int) -> int:
        """Most slots held until `fill` tokens are in: the prompt, or a preempted request's tokens fed again.

        A stock scheduler cuts the prompt into pieces of its own choosing. A piece that crosses an event has it at its
        end.
        """
        pieces = 1 if fill <= prompt else self.max_piece
        most = schedule.bound(self.budget, prompt, self.max_length, pieces)
        if self.budget.prefill_chunk and self.budget.prompt == "count":
            overshoot = self.budget.tokens + self.budget.prefill_chunk - 1 + self.max_piece
            most = max(most, min(prompt, overshoot))
        return most

    def slots_while_decoding(self, prompt: int) -> int:
        """Most slots held from then on, one token a step; of a `Window`, at its full length."""
        return schedule.capacity(self.budget, prompt, self.max_length)

    def blocks(self, slots: int) -> int:
        """Blocks that hold so many slots."""
        size: int = self.block_size
        return -(-slots // size)

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """Bytes of a request whose prompt fits the budget: what vLLM derives its maximum concurrency from.

        A longer prompt needs more while it is fed; the worker checks that one of full length fits
        (`Worker.initialize_from_config`).
        """
        longest = vllm_config.model_config.max_model_len
        used: int = self.blocks(schedule.capacity(self.budget, 1, longest)) * self.page_size_bytes
        return used

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """One spec for the layers of a group: all layers of an engine have the same budget."""
        if any(spec != specs[0] for spec in specs):
            raise ValueError("Layers of different shapes cannot share blocks under a budget.")
        return specs[0]
