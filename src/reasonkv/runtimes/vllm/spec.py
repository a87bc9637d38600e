"""The KV cache spec that tells vLLM's scheduler how many slots a request may hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

from vllm.v1.kv_cache_interface import FullAttentionSpec

from reasonkv import schedule
from reasonkv.budget import Budget, Window
from reasonkv.runtimes.vllm.config import EngineConfig


@dataclass(frozen=True, kw_only=True)
class BoundedSpec(FullAttentionSpec):  # type: ignore[misc]
    """One full-attention layer whose physical length follows `reasonkv.schedule`."""

    budget: Budget  # of every request
    max_length: int  # most tokens of a request (the engine's `max_model_len`)
    max_chunk: int  # of a chunk that crosses a compaction: 1 where chunks end there, else `max_num_batched_tokens`
    own_tokens: int | None = None  # newest of a prompt that are not looked up for sharing; None: no prompt is shared
    recent: int = 0  # newest slots that the method itself protects
    layer_shares: str = ""  # of all bounded layers, by which `budget` is this one's; "": all are alike

    @classmethod
    def of(
        cls, spec: FullAttentionSpec, config: EngineConfig, budget: Budget, max_length: int, max_chunk: int,
        *, is_hybrid: bool = False, is_first: bool = True,
    ) -> BoundedSpec:  # fmt: skip
        """Return a stock full-attention spec with a layer's budget.

        `is_hybrid`: other layers are of other kinds. `is_first`: it has the budget of the first layer. vLLM looks up
        blocks for these first, and for the others only as far as it found some. So these alone leave out the tokens
        whose queries the method reads.
        """
        stock = {one.name: getattr(spec, one.name) for one in fields(FullAttentionSpec) if one.init}
        needs = config.method.needs
        # what a method collects of a prompt's tokens would be missing where another request fed them, and a merge
        # changes slots that others read; the other layers of a hybrid would share answers, too, which compressed
        # attention wrote
        collects = needs.observes or needs.token_ids or needs.merges or bool(needs.stored_state)
        own = None if collects or is_hybrid or max_chunk > 1 else max(1, needs.queries if is_first else 0)
        return cls(
            **stock, budget=budget, max_length=max_length, max_chunk=max_chunk, own_tokens=own,
            recent=needs.recent, layer_shares=str(config.budget.layer_shares),
        )  # fmt: skip

    def shares(self, prompt: int) -> bool:
        """Return whether the blocks of a prompt of so many tokens never change, so that other requests may read them.

        A window begins behind the prompt. A budget that keeps the prompt protects it where it fits.
        """
        if self.own_tokens is None or isinstance(self.budget, Window):
            return self.own_tokens is not None
        if self.budget.prompt == "keep" and self.budget.tokens is not None:
            return prompt + self.budget.protected(self.recent)[1] < self.budget.tokens
        return self.budget.prompt != "count"

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

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, Any]) -> bool:
        """Return whether vLLM may give all these layers one block table: layers of other budgets have their own."""
        return all(spec == self for spec in kv_cache_specs.values())

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """Return one spec for the layers of a group; an AssertionError tells vLLM that these are no group."""
        if any(spec != specs[0] for spec in specs):
            raise AssertionError("Layers of different kinds or shapes cannot share blocks under a budget.")
        return specs[0]


def bounded_groups(groups: Sequence[Any]) -> list[Any]:
    """Return those of vLLM's groups of layers whose requests have a budget."""
    return [one for one in groups if isinstance(one.kv_cache_spec, BoundedSpec)]


def stock_blocks(groups: Sequence[Any], vllm_config: Any) -> int:
    """Return the most blocks a request holds in the other groups: windows, states and convolutions of a hybrid."""
    specs = [one.kv_cache_spec for one in groups if not isinstance(one.kv_cache_spec, BoundedSpec)]
    return sum(-(-one.max_memory_usage_bytes(vllm_config) // one.page_size_bytes) for one in specs)
