"""Blocks of requests under a budget, in the scheduler.

A request's whole bound is reserved when it is admitted, so that it is never preempted for want of blocks. Once its
prompt is in and cut, the blocks that the rest of it can never need are freed, once: the worker's block table only
appends, so no block may be added after one was freed. Under a `Window`, which has no bound but its length, blocks are
added as they are needed and none is freed before the end.

A request that opts out holds a block for every so many tokens, as in a stock engine; those it does not hold yet are
promised to it, so that nobody else is admitted to them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

from reasonkv import schedule
from reasonkv.budget import Budget, ExplicitEventsWindow, PeriodicWindow, Window
from reasonkv.runtimes.vllm.config import RequestConfig
from reasonkv.runtimes.vllm.spec import BoundedSpec

_REMEMBERED = 4096  # prompts of requests that gave their blocks back; enough for all that can be waiting preempted


@dataclass(kw_only=True)
class Holding:
    """What one request may hold.

    Args:
        budget: None for a request that keeps full KV; it has the events so far, where the engine's steps decide them.
        state: after the step that was scheduled last; of a request that was trimmed, as it was then.
        fill: tokens that are fed in pieces of any length: the prompt, or after a preemption all it had, unless its
            pieces end at events.
        whole: most tokens it will ever have in the cache, known where our scheduler is.
        high_water: most slots it held at once so far.
        trimmed: the blocks it cannot need any more were freed; from then on it is fed one token a step.
        length: tokens after the step that was scheduled last, noted once it is trimmed.

    """

    budget: Budget | None
    state: schedule.Lengths
    fill: int
    whole: int
    high_water: int = 0
    trimmed: bool = False
    length: int = 0
    _known: tuple[tuple[int, schedule.Lengths], tuple[int, schedule.Lengths]] | None = field(default=None, repr=False)

    @property
    def now(self) -> schedule.Lengths:
        """Its state after the step that was scheduled last."""
        return schedule.one_by_one(self.budget, self.state, self.length)

    def after(self, num_tokens: int) -> tuple[int, schedule.Lengths]:
        """The high water and the state after a step that ends at so many tokens; asked for several times a step."""
        asked = (num_tokens, self.state)
        if self._known is None or self._known[0] != asked:
            fed = max(0, num_tokens - self.state.logical)
            high_water = max(self.high_water, self.state.physical + fed)
            self._known = asked, (high_water, schedule.step(self.budget, self.state, fed)[0])
        return self._known[1]

    def move(self, num_tokens: int) -> None:
        """A step that ends at so many tokens has been scheduled."""
        self.high_water, self.state = self.after(num_tokens)

    def cut(self, dropped: int) -> None:
        """The engine's step had an event listed at the end of what it fed."""
        assert isinstance(self.budget, ExplicitEventsWindow)
        self.budget = schedule.listed(self.budget, self.state.logical)
        self.state = self.state._replace(physical=self.state.physical - dropped)

    @property
    def prompt(self) -> int:
        """Tokens of its prompt."""
        return self.state.prompt


class BoundedManager(FullAttentionManager):  # type: ignore[misc]
    """Allocates what `reasonkv.schedule` says, and never a block more."""

    kv_cache_spec: BoundedSpec
    requests: Mapping[str, Any] | None = None
    """vLLM's unfinished requests by id, where our scheduler shows them; otherwise they are known by number alone."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.holdings: dict[str, Holding] = {}
        self.prompts: OrderedDict[str, int] = OrderedDict()
        self.most_blocks = 0  # that a request held at once, for tests and reports
        self.steps = 0  # with at least one token, so far

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        """Blocks this request lacks for its next step, or when it asks to be admitted, for all it will ever need."""
        held = len(self.req_to_blocks.get(request_id, ()))
        if apply_admission_cap and held == 0:
            self.holdings[request_id] = self._open(request_id, num_tokens)
        holding = self.holdings[request_id]
        if holding.trimmed:  # it has all it will ever need
            return 0
        if apply_admission_cap:
            return max(0, self._whole(holding, num_tokens) - held) + self._promised(besides=request_id)
        return max(0, self._blocks(holding, num_tokens) - held)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        """Blocks for the step that is being scheduled, and its events taken note of."""
        holding = self.holdings[request_id]
        if holding.trimmed:  # it has all it will ever need
            holding.length = num_tokens
            return []
        blocks = self._blocks(holding, num_tokens)
        holding.move(num_tokens)
        new: list[KVCacheBlock] = super().allocate_new_blocks(
            request_id, blocks * self.block_size, blocks * self.block_size
        )
        self.most_blocks = max(self.most_blocks, len(self.req_to_blocks[request_id]))
        return new

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Free, once, what a request whose prompt is in and cut can never need again.

        Args:
            request_id: the request.
            processed_computed_tokens: tokens whose steps are over, so that nothing in flight reads what is freed.
            num_prompt_tokens: tokens of its prompt.

        """
        holding = self.holdings.get(request_id)
        if holding is None:
            return
        if num_prompt_tokens is not None and holding.state.logical == 0:
            holding.state = schedule.Lengths(prompt=num_prompt_tokens)
        if holding.budget is None or isinstance(holding.budget, Window):
            return
        if holding.trimmed or processed_computed_tokens < holding.fill:
            return
        holding.trimmed = True
        blocks = self.req_to_blocks[request_id]
        needed = self._blocks(holding, 0)
        surplus = blocks[needed:]
        del blocks[needed:]
        self.block_pool.free_blocks(reversed(surplus))

    def cache_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: a block that events rewrite does not hold the tokens its hash would say."""

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """All blocks of a request that ends or is preempted."""
        holding = self.holdings.pop(request_id, None)
        if holding is not None and holding.state.logical and self.requests is None:
            self.prompts[request_id] = holding.prompt
            if len(self.prompts) > _REMEMBERED:
                self.prompts.popitem(last=False)
        blocks: list[KVCacheBlock] = super().pop_blocks_for_free(request_id)
        return blocks

    def end_step(self, fed: Mapping[str, int]) -> None:
        """A step has been scheduled: the events that fall at its end because of its number (`PeriodicWindow`).

        Args:
            fed: tokens of every request it feeds.

        """
        policy, self.steps = self.kv_cache_spec.budget, self.steps + bool(fed)
        if not isinstance(policy, PeriodicWindow) or not fed:
            return
        rows = {name: self.holdings[name] for name in fed}  # in the scheduler's order, which the worker is told
        raw = {
            name: schedule.raw_tokens(one.budget, one.state)
            for name, one in rows.items()
            if isinstance(one.budget, ExplicitEventsWindow)
        }
        for name in schedule.periodic_round(policy, self.steps - 1, raw):
            rows[name].cut(policy.dropped)

    def tokens_to_event(self, request_id: str) -> int | None:
        """How many more tokens of a request fall into the cache until it has an event; None: it never has one."""
        holding = self.holdings.get(request_id) or self._open(request_id, 0)
        state = holding.now
        boundary = schedule.next_event(holding.budget, state)
        return None if boundary is None else boundary - state.logical

    def _open(self, request_id: str, num_tokens: int) -> Holding:
        longest = self.kv_cache_spec.max_length
        bounded = schedule.row_budget(self.kv_cache_spec.budget)
        if self.requests is None:
            # The prompt of a request seen for the first time is all of it; `remove_skipped_blocks` confirms it.
            prompt = self.prompts.get(request_id, num_tokens)
            state = schedule.Lengths(prompt=prompt)
            return Holding(budget=bounded, state=state, fill=num_tokens, whole=longest)
        request = self.requests[request_id]
        prompt = request.num_prompt_tokens
        budget = None if RequestConfig.wants_full_kv(request.sampling_params) else bounded
        whole = min(longest, prompt + request.max_tokens - 1)  # the token sampled last is never fed
        return Holding(budget=budget, state=schedule.Lengths(prompt=prompt), fill=prompt, whole=whole)

    def _promised(self, besides: str) -> int:
        """Blocks that requests with full KV will still need, and that nobody else may be admitted to."""
        growing = [(name, one) for name, one in self.holdings.items() if one.budget is None and name != besides]
        held = {name: len(self.req_to_blocks.get(name, ())) for name, _ in growing}
        return sum(self._whole(one, one.whole) - held[name] for name, one in growing if held[name])

    def _whole(self, holding: Holding, num_tokens: int) -> int:
        """Blocks to have in sight when a request of so many tokens is admitted."""
        spec = self.kv_cache_spec
        if holding.budget is None:
            return spec.blocks(holding.whole)
        if isinstance(holding.budget, Window):
            return spec.blocks(schedule.bound(holding.budget, holding.prompt, num_tokens, spec.max_piece))
        return self._blocks(holding, num_tokens)

    def _blocks(self, holding: Holding, num_tokens: int) -> int:
        spec = self.kv_cache_spec
        if holding.budget is None or isinstance(holding.budget, Window):
            return spec.blocks(holding.after(num_tokens)[0])
        most = spec.slots_while_decoding(holding.prompt)
        if not holding.trimmed:
            most = max(most, spec.slots_while_filling(holding.prompt, holding.fill))
        return spec.blocks(most)
