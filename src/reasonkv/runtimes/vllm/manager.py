"""Blocks of requests under a budget, in the scheduler.

A request's whole bound is reserved when it is admitted, so it is never preempted for want of blocks. Once its prompt is
in and compacted, the blocks that it can never need again are freed, once: the worker's block table only appends, so no
block may be added after one was freed. A `Window` or a share of the text grows: blocks are added as they are needed,
and none is freed before the end.

A request that opts out holds a block for every so many tokens, as in a stock engine. The blocks that it will still need
are promised to it: nobody else is admitted to them.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

from reasonkv import schedule
from reasonkv.budget import Budget, ExplicitEventsWindow, PeriodicWindow
from reasonkv.runtimes.vllm.options import RequestConfig
from reasonkv.runtimes.vllm.spec import BoundedSpec

_REMEMBERED = 4096  # prompt lengths of requests that gave their blocks back: more than can wait preempted


@dataclass(kw_only=True)
class RequestAllocation:
    """What one request may hold."""

    budget: Budget | None  # None for full KV; a window cut by the engine's steps lists the compactions so far
    state: schedule.Lengths  # after the step that was scheduled last; once trimmed, those at the time
    fill: int  # tokens fed in chunks: the prompt, or after a preemption all it had, unless chunks end at compactions
    whole: int  # most tokens it will ever have in the cache; known where our scheduler is
    high_water: int = 0  # most slots so far
    is_trimmed: bool = False  # the blocks it never needs again were freed; it is fed one token a step from then on
    length: int = 0  # tokens after the step that was scheduled last, noted once it is trimmed
    boundary: int = 0  # logical length of the compaction after `state`, looked up once `length` reaches it
    _newest: tuple[tuple[int, schedule.Lengths], tuple[int, schedule.Lengths]] | None = field(default=None, repr=False)

    @property
    def grows(self) -> bool:
        """Its number of blocks has no bound but its length."""
        return self.budget is None or not self.budget.is_bounded

    @property
    def now(self) -> schedule.Lengths:
        """Lengths after the step that was scheduled last."""
        if not self.is_trimmed:
            return self.state
        if self.length >= self.boundary:
            self.state = schedule.one_by_one(self.budget, self.state, self.length)
            self.boundary = schedule.next_event(self.budget, self.state) or sys.maxsize
        fed = self.length - self.state.logical
        return self.state._replace(logical=self.length, physical=self.state.physical + fed)

    def after(self, num_tokens: int) -> tuple[int, schedule.Lengths]:
        """Return high water and lengths after a step that ends at so many tokens; asked twice a step, so remembered."""
        asked = (num_tokens, self.state)
        if self._newest is None or self._newest[0] != asked:
            fed = max(0, num_tokens - self.state.logical)
            high_water = max(self.high_water, self.state.physical + fed)
            self._newest = asked, (high_water, schedule.step(self.budget, self.state, fed)[0])
        return self._newest[1]

    def compact(self, dropped: int) -> None:
        """Note a compaction that the engine's step brought, at the end of what the step fed."""
        assert isinstance(self.budget, ExplicitEventsWindow)
        self.budget = schedule.listed(self.budget, self.state.logical)
        self.state = self.state._replace(physical=self.state.physical - dropped)


class BoundedManager(FullAttentionManager):  # type: ignore[misc]
    """Allocates what `reasonkv.schedule` says, and never a block more."""

    kv_cache_spec: BoundedSpec
    requests: Mapping[str, Any] | None = None
    """vLLM's unfinished requests by id, where our scheduler shows them; otherwise only their lengths are known."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.allocations: dict[str, RequestAllocation] = {}
        self.prompts: OrderedDict[str, int] = OrderedDict()
        self.layers = 0  # of this group; our scheduler shows them
        self.steps = 0  # with at least one token, so far

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int, num_local_computed_tokens: int, num_tokens_main_model: int,
        apply_admission_cap: bool = False, prefill_end: int = 0,
    ) -> int:  # fmt: skip
        """Return the blocks a request lacks for its next step, or at admission, for all it will ever need."""
        has = len(self.req_to_blocks.get(request_id, ()))
        if apply_admission_cap and not has:
            self.allocations[request_id] = self._new_allocation(request_id, num_tokens, num_local_computed_tokens)
        one = self.allocations[request_id]
        if one.is_trimmed:
            return 0
        # of the prompt's blocks that others have computed, those that nobody holds any more count as free until then
        lacks: int = self._get_num_evictable_blocks(new_computed_blocks)
        has += len(new_computed_blocks)
        if apply_admission_cap:
            lacks += max(0, self._blocks_at_admission(one, num_tokens) - has)
            return lacks + self._promised(besides=request_id)
        return lacks + max(0, self._blocks(one, num_tokens) - has)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        """Allocate blocks for the step that is being scheduled, and note its compaction."""
        one = self.allocations[request_id]
        if one.is_trimmed:
            one.length = num_tokens
            return []
        slots = self._blocks(one, num_tokens) * self.block_size
        one.high_water, one.state = one.after(num_tokens)
        new: list[KVCacheBlock] = super().allocate_new_blocks(request_id, slots, slots)
        return new

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Free, once, what a request whose prompt is in and compacted can never need again.

        The steps of `processed_computed_tokens` are over, so nothing in flight reads what is freed.
        """
        one = self.allocations.get(request_id)
        if one is None:
            return
        if num_prompt_tokens is not None and one.state.logical == 0:
            one.state = schedule.Lengths(prompt=num_prompt_tokens)
            if self.requests is None:
                one.budget = schedule.row_budget(self.kv_cache_spec.budget, num_prompt_tokens)
        if one.grows or one.is_trimmed or processed_computed_tokens < one.fill:
            return
        one.is_trimmed, one.length = True, one.state.logical
        blocks, needed = self.req_to_blocks[request_id], self._blocks(one, 0)
        surplus = blocks[needed:]
        del blocks[needed:]
        self.block_pool.free_blocks(reversed(surplus))

    def cache_blocks(self, request: Any, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Share whole blocks of a prompt that no compaction changes; others do not hold the tokens of their hash."""
        if self.kv_cache_spec.shares(request.num_prompt_tokens):
            super().cache_blocks(request, min(num_tokens, request.num_prompt_tokens), *args, **kwargs)

    @classmethod
    def find_longest_cache_hit(
        cls, block_hashes: Any, max_length: int, kv_cache_group_ids: list[int], block_pool: Any,
        kv_cache_spec: BoundedSpec, *args: Any, **kwargs: Any,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:  # fmt: skip
        """Find blocks that hold the beginning of a new prompt, but for the tokens whose queries the method reads.

        `max_length` leaves one token to feed; of a second budget of layers it is what was found for the first.
        """
        own = kv_cache_spec.own_tokens
        shared = max_length + 1 - own if own is not None and kv_cache_spec.shares(max_length + 1) else 0
        found: tuple[tuple[list[KVCacheBlock], ...], int] = super().find_longest_cache_hit(
            block_hashes, max(0, shared), kv_cache_group_ids, block_pool, kv_cache_spec, *args, **kwargs
        )
        return found

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Return all blocks of a request that ends or is preempted."""
        one = self.allocations.pop(request_id, None)
        if one is not None and one.state.logical and self.requests is None:
            self.prompts[request_id] = one.state.prompt
            if len(self.prompts) > _REMEMBERED:
                self.prompts.popitem(last=False)
        blocks: list[KVCacheBlock] = super().pop_blocks_for_free(request_id)
        return blocks

    def end_step(self, fed: Mapping[str, int]) -> tuple[dict[str, int], list[str]]:
        """Note the compactions that a scheduled step's number brings (`PeriodicWindow`); `fed` are its tokens.

        Returns the slots of every request after the step, and which ones its number compacts. Workers are told, and
        count no steps themselves, because they also run warm-up steps.
        """
        policy, self.steps = self.kv_cache_spec.budget, self.steps + bool(fed)
        periodic: list[str] = []
        if isinstance(policy, PeriodicWindow) and fed:
            raw = {
                name: schedule.raw_tokens(one.budget, one.state)
                for name, one in ((name, self.allocations[name]) for name in fed)
                if isinstance(one.budget, ExplicitEventsWindow)
            }
            periodic = schedule.periodic_round(policy, self.steps - 1, raw)
            for name in periodic:
                self.allocations[name].compact(policy.dropped)
        return {name: self.allocations[name].now.physical for name in fed}, periodic

    def tokens_to_compaction(self, request_id: str, computed: int) -> int | None:
        """Return how many more tokens a request is fed until its next compaction; None: it never has one.

        `computed` are its tokens so far, of a waiting request those that others have computed.
        """
        is_running = bool(self.req_to_blocks.get(request_id))
        one = self.allocations[request_id] if is_running else self._new_allocation(request_id, 0, computed)
        state = one.now
        boundary = schedule.next_event(one.budget, state)
        return None if boundary is None else boundary - state.logical

    def held(self, request_id: str) -> schedule.Lengths | None:
        """Return what a request holds that is about to be freed; None: it has had no step."""
        one = self.allocations.get(request_id)
        return None if one is None else one.now

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot in this rank's layers of the group."""
        page: int = self.kv_cache_spec.unpadded_page_size_bytes
        return page * self.layers // int(self.block_size)

    def _new_allocation(self, request_id: str, num_tokens: int, computed: int) -> RequestAllocation:
        longest, budget = self.kv_cache_spec.max_length, self.kv_cache_spec.budget
        if self.requests is None:
            # The prompt of a request seen for the first time is all of it; `remove_skipped_blocks` confirms it.
            state = schedule.Lengths(prompt=self.prompts.get(request_id, num_tokens))
            own = schedule.row_budget(budget, state.prompt)
            return RequestAllocation(budget=own, state=state, fill=num_tokens, whole=longest)
        request = self.requests[request_id]
        prompt, asked = request.num_prompt_tokens, RequestConfig.asked(request.sampling_params)
        return RequestAllocation(
            budget=schedule.row_budget(budget, prompt, asked.seed) if asked.enabled else None,
            state=schedule.Lengths(computed, computed, prompt),
            fill=prompt,
            whole=min(longest, prompt + request.max_tokens - 1),  # the token sampled last is never fed
        )

    def _promised(self, besides: str) -> int:
        """Return the blocks that running requests with full KV will still need."""
        growing = [(name, one) for name, one in self.allocations.items() if one.budget is None and name != besides]
        has = [len(self.req_to_blocks.get(name, ())) for name, _ in growing]
        return sum(
            self.kv_cache_spec.blocks(one.whole) - blocks
            for (_, one), blocks in zip(growing, has, strict=True)
            if blocks
        )

    def _blocks_at_admission(self, one: RequestAllocation, num_tokens: int) -> int:
        spec = self.kv_cache_spec
        if one.budget is None:
            return spec.blocks(one.whole)
        if one.grows:
            return spec.blocks(schedule.bound(one.budget, one.state.prompt, num_tokens, spec.max_chunk))
        return self._blocks(one, num_tokens)

    def _blocks(self, one: RequestAllocation, num_tokens: int) -> int:
        spec = self.kv_cache_spec
        if one.grows:
            return spec.blocks(one.after(num_tokens)[0])
        most = spec.slots_in_decode(one.state.prompt)
        if not one.is_trimmed:
            most = max(most, spec.slots_in_prefill(one.state.prompt, one.fill))
        return spec.blocks(most)
