"""What one layer stores beside keys and values, and the one function that shows it to a method.

A store has one line per row: a batch row in transformers, a request's place in vLLM. Of a row's slots, those that a
compaction left (`compacted_slots`) have their token indices, counts and state stored. Later slots hold consecutive
tokens up to the newest one, so decoding writes nothing here but its query.

Legend: R rows, b rows of one plan, H KV heads, Hq query heads, N slots, K stored slots, T ring length, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from reasonkv.budget import Budget
from reasonkv.compaction import merge_counts, merge_state
from reasonkv.methods.base import Method, Observed, Requirements, SlotState
from reasonkv.plan import Plan, PlanError
from reasonkv.protection import protected_slots
from reasonkv.schedule import Lengths
from reasonkv.view import SlotView

View = TypeVar("View", bound=SlotView)


@dataclass(kw_only=True)
class CompactionGroup:
    """Sequences compacted by one plan: they hold equally many slots, keep equally many, and see as many queries."""

    rows: Sequence[int]  # their rows in the store
    batch_rows: Sequence[int]  # their rows in the batch, which the method is shown
    held: int  # slots of each before the compaction
    keep: int  # slots of each after it
    budgets: Sequence[Budget]  # what each of them follows
    before: Sequence[Lengths]  # before the forward
    after: Sequence[Lengths]  # after it and its compaction
    compacted_slots: Sequence[int]  # slots of each that an earlier compaction left
    events: Sequence[int]  # compactions of each so far
    seeds: Sequence[int]  # row seeds
    # half-open ranges of token indices that count as prompt; the first of each begins at 0
    prompt_spans: Sequence[Sequence[tuple[int, int]]]
    _numbers: dict[torch.device, tuple[Tensor, ...]] = field(default_factory=dict)

    def numbers(self, device: torch.device) -> tuple[Tensor, ...]:
        """Return rows, lengths, compacted slots, events, seeds and prompt lengths, int64 [b] each; made once."""
        if device not in self._numbers:
            lengths, prompts = [one.logical for one in self.after], [one.prompt for one in self.before]
            lists = [list(self.rows), lengths, list(self.compacted_slots), list(self.events), list(self.seeds), prompts]
            self._numbers[device] = torch.tensor(lists, device=device).unbind(0)
        return self._numbers[device]

    def is_prompt(self, index_BHN: Tensor) -> Tensor:
        """Return which slots hold a token of the prompt, bool [b, H, N]."""
        ends = torch.tensor([spans[0][1] for spans in self.prompt_spans], device=index_BHN.device)
        marked = index_BHN < ends[:, None, None]
        for number, spans in enumerate(self.prompt_spans):
            for start, end in spans[1:]:  # later turns that were reopened as prompt
                marked[number] |= (index_BHN[number] >= start) & (index_BHN[number] < end)
        return marked


class SlotStore:
    """Token indices, counts, method state, recent queries and observed state of one layer.

    Args:
        rows: lines of the store.
        heads: KV heads.
        dtype, device: of the keys.
        needs: what the method asks for.
        capacity: slots a row can ever keep, where known: what is stored is then allocated once.
    """

    def __init__(
        self, rows: int, heads: int, dtype: torch.dtype, device: torch.device, needs: Requirements, capacity: int = 0
    ) -> None:
        self.rows, self.heads, self.dtype, self.device, self.needs = rows, heads, dtype, device, needs
        self.capacity = capacity
        self.ring: Tensor | None = None  # [R, T, Hq, D]; token t is stored at t % T
        self.token_index: Tensor | None = None  # int32 [R, H, K]
        self.counts: Tensor | None = None  # int32 [R, H, K]
        self.state: dict[str, Tensor] = {}  # [R, H, K] each; 0 beyond a row's compacted slots
        self.row_state: dict[str, Tensor] = {}  # what the method observes, [R, ...] each
        self._fresh: dict[str, Tensor] = {}  # the same of one new row

    @property
    def bytes(self) -> int:
        """Bytes of everything stored here."""
        stored = [self.ring, self.token_index, self.counts, *self.state.values(), *self.row_state.values()]
        return sum(tensor.nbytes for tensor in stored if tensor is not None)

    def prepare(self, method: Method, query_heads: int, head_dim: int, observed_dim: int | None = None) -> None:
        """Allocate the ring of queries and what the method observes, if it asks for them and they are missing.

        Args:
            method: the method.
            query_heads: Hq.
            head_dim: of the queries in the ring.
            observed_dim: of the queries that the method observes, where it differs.
        """
        if self.needs.queries and self.ring is None:
            shape = (self.rows, self.needs.queries, query_heads, head_dim)
            self.ring = torch.zeros(shape, dtype=self.dtype, device=self.device)
        if self.needs.observes and not self.row_state:
            D = observed_dim or head_dim
            self.row_state = method.new_row_state(self.rows, query_heads, D, self.device)
            self._fresh = method.new_row_state(1, query_heads, D, self.device)

    def start(self, row: int) -> None:
        """Give a row to a new sequence; stored slots count only once a compaction has written them."""
        for name, stored in self.row_state.items():
            stored[row] = self._fresh[name][0]

    def observe(self, method: Method, row_b: Tensor | None, seen: Observed) -> None:
        """Let the method take in queries of some rows; None: of all, in order.

        Raises:
            PlanError: it changes the shape of a row's state, a defect of the method.
        """
        if row_b is None:
            method.observe(self.row_state, seen)
            return
        state = {name: stored[row_b] for name, stored in self.row_state.items()}
        method.observe(state, seen)
        for name, stored in self.row_state.items():
            if state[name].shape[1:] != stored.shape[1:]:
                raise PlanError(f"{method.name} must not change the shape of its row state {name!r} in this runtime.")
            stored[row_b] = state[name]

    def remember_queries(self, queries_nHqD: Tensor, line_n: Tensor) -> None:
        """Store rotated queries at row * T + token % T; only a line that nobody reads may occur twice."""
        assert self.ring is not None
        self.ring.flatten(0, 1).index_copy_(0, line_n, queries_nHqD)

    def token_indices(self, row_b: Tensor, held: int, length_b: Tensor, compacted_b: Tensor) -> Tensor:
        """Return the token index of every slot, int64 [b, H, held]."""
        consecutive = (length_b[:, None, None] - held) + torch.arange(held, device=self.device)
        return self._stored_or(self.token_index, consecutive.expand(-1, self.heads, -1), row_b, compacted_b)

    def source_counts(self, row_b: Tensor, held: int, compacted_b: Tensor) -> Tensor:
        """Return how many source tokens every slot stands for, int32 [b, H, held]."""
        ones = torch.ones(1, dtype=torch.int32, device=self.device).expand(len(row_b), self.heads, held)
        return self._stored_or(self.counts, ones, row_b, compacted_b)

    def slot_state(self, row_b: Tensor, index_BHN: Tensor, compacted_b: Tensor) -> dict[str, Tensor]:
        """Return the method's state of every slot by name, [b, H, N] each."""
        found = {}
        for name, declared in self.needs.stored_state.items():
            if declared.initial == "position":
                fresh = index_BHN.to(self.dtype_of(declared))
            else:
                fresh = torch.full_like(index_BHN, declared.initial, dtype=self.dtype_of(declared))
            found[name] = self._stored_or(self.state.get(name), fresh, row_b, compacted_b)
        return found

    def write_compacted(self, row_b: Tensor, plan: Plan, view: SlotView) -> None:
        """Store token indices, counts and state of the slots that a compaction left."""
        kept = plan.kept_BHK
        self.token_index = self._write(self.token_index, row_b, view.positions_BHN.gather(2, kept), torch.int32)
        if self.needs.merges:
            counts = view.counts_BHN
            counts = merge_counts(counts, plan.merge, kept.shape[2]) if plan.merge else counts.gather(2, kept)
            self.counts = self._write(self.counts, row_b, counts, torch.int32)
        for name, declared in self.needs.stored_state.items():
            given = plan.new_state.get(name)
            new = merge_state(view.state[name], plan, declared.merge) if given is None else given
            self.state[name] = self._write(self.state.get(name), row_b, new, self.dtype_of(declared))

    def select_rows(self, index: Tensor) -> None:
        """Reorder, repeat or drop rows."""
        self.rows = len(index)
        for name in ("ring", "token_index", "counts"):
            tensor = getattr(self, name)
            setattr(self, name, None if tensor is None else tensor.index_select(0, index.to(tensor.device)))
        for named in (self.state, self.row_state):
            named.update({name: tensor.index_select(0, index.to(tensor.device)) for name, tensor in named.items()})

    def dtype_of(self, declared: SlotState) -> torch.dtype:
        """Return a state's dtype: as declared, but float64 instead of float32 beside float64 keys."""
        wide = self.dtype == torch.float64 and declared.dtype == torch.float32
        return torch.float64 if wide else declared.dtype

    def _write(self, stored: Tensor | None, row_b: Tensor, new_bHK: Tensor, dtype: torch.dtype) -> Tensor:
        K = new_bHK.shape[2]
        if stored is None or stored.shape[2] < K:
            # a budget in tokens keeps the same K at every compaction; otherwise K grows with the text
            slots = max(K, self.capacity if stored is None else 3 * stored.shape[2] // 2)
            grown = torch.zeros(self.rows, self.heads, slots, dtype=dtype, device=self.device)
            if stored is not None:
                grown[:, :, : stored.shape[2]] = stored
            stored = grown
        if stored.shape[2] > K:
            stored[row_b, :, K:] = 0  # attention reads log mass without a mask, so clear the tail
        stored[:, :, :K].index_copy_(0, row_b, new_bHK.to(dtype))
        return stored

    def _stored_or(self, stored: Tensor | None, fresh_bHN: Tensor, row_b: Tensor, compacted_b: Tensor) -> Tensor:
        out = fresh_bHN.clone(memory_format=torch.contiguous_format)
        if stored is not None:
            upto = min(out.shape[2], stored.shape[2])
            is_old = torch.arange(upto, device=self.device) < compacted_b[:, None, None]
            old = stored[:, :, :upto].index_select(0, row_b).to(out.dtype)
            out[:, :, :upto] = torch.where(is_old, old, out[:, :, :upto])
        return out


def newest_queries(ring_RTHqD: Tensor, row_b: Tensor, length_b: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the newest queries of some rows, oldest first.

    Whole heads are copied, in the order that attention reads them: on CPU four times as fast as an index per token.

    Args:
        ring_RTHqD: contiguous; a row's token t stands at t % T. Tokens come before heads, because every decode step
            writes one token of every row: one line of memory instead of Hq.
        row_b: int64, rows of the ring.
        length_b: int64, tokens each of them has seen, at least `count`.
        count: queries to return, at most T.

    Returns:
        Queries [b, Hq, count, D] and their token indices, int64 [b, count].
    """
    _, T, Hq, D = ring_RTHqD.shape
    token_bn = length_b[:, None] - count + torch.arange(count, device=ring_RTHqD.device)
    line_bn = row_b[:, None] * T + token_bn % T
    head_bHqn = line_bn[:, None] * Hq + torch.arange(Hq, device=ring_RTHqD.device)[:, None]
    return ring_RTHqD.view(-1, D).index_select(0, head_bHqn.flatten()).view(*head_bHqn.shape, D), token_bn


def make_view(kind: type[View], store: SlotStore, group: CompactionGroup, **runtime: Any) -> View:
    """Return what a method may look at when a group is compacted in one layer.

    Args:
        kind: `SlotView`, or a subclass that reads keys and values when they are first looked at.
        store: the layer's.
        group: the sequences; their forward has been attended.
        runtime: the fields of the view that only the runtime knows: keys and values, scaling, seed, layer, ...
    """
    row_b, length_b, compacted_b, event_b, seed_b, prompt_b = group.numbers(store.device)
    needs, held = store.needs, group.held
    index = store.token_indices(row_b, held, length_b, compacted_b)
    is_prompt = group.is_prompt(index)
    queries = query_positions = None
    if store.ring is not None:
        count = min(store.ring.shape[1], *(one.logical for one in group.after))
        queries, query_positions = newest_queries(store.ring, row_b, length_b, count)
    return kind(
        positions_BHN=index,
        counts_BHN=store.source_counts(row_b, held, compacted_b),
        is_prompt_BHN=is_prompt,
        is_protected_BHN=protected_slots(index, is_prompt, group.budgets, group.before, group.after, needs.recent),
        queries_BHqTD=queries,
        query_positions_BT=query_positions,
        state=store.slot_state(row_b, index, compacted_b),
        length_B=length_b,
        event_B=event_b,
        row_seed_B=seed_b,
        rows=tuple(group.batch_rows),
        prompt_length_B=prompt_b,
        row_state={name: stored[row_b] for name, stored in store.row_state.items()},
        **runtime,
    )


def make_plans(method: Method, views: Sequence[SlotView], keep: int) -> list[Plan]:
    """Return a method's plans for one group, one per layer, all of them checked.

    Raises:
        PlanError: a plan that cannot be carried out, a defect of the method.
    """
    with torch.autocast(views[0].positions_BHN.device.type, enabled=False):  # scores are float32 whoever calls
        plans = method.plan_layers(views, keep)
    for view, plan in zip(views, plans, strict=True):
        B, H, N = view.positions_BHN.shape
        plan.check((B, H, N), keep, view.is_protected_BHN)
        if plan.merge is not None and not method.needs.merges:
            raise PlanError(f"{method.name} merges slots without declaring Requirements(merges=True).")
        unknown = sorted(set(plan.new_state) - set(method.needs.stored_state))
        if unknown:
            raise PlanError(f"{method.name} rewrites {', '.join(unknown)} without declaring it in its Requirements.")
    return plans
