"""Views with all that the methods of the field ask for, and attention one query and one slot at a time."""

from __future__ import annotations

from dataclasses import fields, replace

import torch
from slot_views import make_view
from torch import Tensor

from reasonkv.methods.base import Method, Observed
from reasonkv.rotary import Rotary
from reasonkv.view import SlotView

ROTARY = Rotary(10000.0 ** (-torch.arange(8) / 8))
D, WIDTH = 16, 24


def field_view(
    method: Method,
    N: int = 90,
    lengths: tuple[int, ...] = (90,),
    prompts: tuple[int, ...] = (20,),
    *,
    H: int = 2,
    group: int = 2,
    keep_prompt: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> SlotView:
    """A view with all a method asks for; rows hold N of their tokens: the last 30, and others they kept before.

    Row b is drawn from a seed of its own, so that it can be made alone: `field_view` of its length and prompt.
    """
    needs, rows = method.needs, []
    for b, (length, prompt) in enumerate(zip(lengths, prompts, strict=True)):
        draw = torch.Generator().manual_seed(1000 * seed + length)
        new = min(30, N)
        heads = 1 if needs.scope != "head" else H
        old = torch.rand(heads, length - new, generator=draw).argsort(-1)[:, : N - new].sort(-1).values
        positions = torch.cat([old, torch.arange(length - new, length).expand(heads, -1)], -1).expand(H, N)
        keys, values = torch.randn(2, 1, H, N, D, generator=draw) + torch.randn(2, 1, H, 1, D, generator=draw)
        queries = torch.randn(1, H * group, length, D, generator=draw).to(dtype)
        T = min(needs.queries, length)
        view = make_view(
            keys.to(dtype), queries[:, :, length - T :] if T else None, positions=positions, sinks=2,
            recent=max(4, needs.recent), prompt=prompt, keep_prompt=keep_prompt, event=b, row_seeds=(b,),
        )  # fmt: skip
        state = {}
        for name, declared in needs.slot_state.items():
            assert not isinstance(declared.initial, str)
            old_state = torch.rand(1, H, N, generator=draw)
            if name in ("activated", "stamp"):  # token indices before the last compaction, in no order
                old_state = (old_state * (length - new)).floor()
            state[name] = old_state.masked_fill(positions[None] >= length - new, declared.initial)
        row_state: dict[str, Tensor] = {}
        if needs.observes:
            row_state = method.new_row_state(1, H * group, D, keys.device)
            for start, end in ((0, prompt), (prompt, length - 1), (length - 1, length)):
                observe(method, row_state, queries[:, :, start:end], start)
        rows.append(
            replace(
                view,
                values_BHND=values.to(dtype),
                state=state,
                row_state=row_state,
                prompt_length_B=torch.tensor([prompt]),
            )
        )
    projection = torch.randn(H * group, D, WIDTH, generator=torch.Generator().manual_seed(1))
    joined = {field.name: getattr(rows[0], field.name) for field in fields(SlotView)}
    for name, first in joined.items():
        if isinstance(first, Tensor):
            joined[name] = torch.cat([getattr(row, name) for row in rows])
        elif isinstance(first, dict):
            joined[name] = {key: torch.cat([getattr(row, name)[key] for row in rows]) for key in first}
    joined |= {"rotary": ROTARY, "output_projection_HqDM": projection, "query_heads": H * group}
    return SlotView(**joined)


def observe(method: Method, state: dict[str, Tensor], queries: Tensor, start: int) -> None:
    if queries.shape[2]:
        positions = torch.arange(start, start + queries.shape[2])[None]
        method.observe(state, Observed(queries, positions, positions >= 0, 0, ROTARY))


def attention(view: SlotView, b: int, h: int, queries_TD: Tensor, positions: list[int]) -> list[list[float]]:
    """Softmax attention of queries to the slots of one head, one query and one slot at a time."""
    rows = []
    for query, position in zip(queries_TD.double(), positions, strict=True):
        weights = []
        for key, slot in zip(view.keys_BHND[b, h].double(), view.positions_BHN[b, h].tolist(), strict=True):
            weights.append(float((query @ key * view.scaling).exp()) if slot <= position else 0.0)
        rows.append([weight / sum(weights) for weight in weights])
    return rows


def ring(view: SlotView, b: int, q: int) -> tuple[Tensor, list[int]]:
    """The newest queries of one query head, and their positions."""
    assert view.queries_BHqTD is not None and view.query_positions_BT is not None
    return view.queries_BHqTD[b, q], view.query_positions_BT[b].tolist()


def attended(logits: Tensor, recent: int = 1) -> SlotView:
    """One KV head and query head whose newest T queries have these logits [T, N] but for what comes after them."""
    T, N = logits.shape
    keys, queries = torch.zeros(1, 1, N, D), torch.eye(T, D)[None, None] * D**0.5
    keys[0, 0, :, :T] = logits.T
    return make_view(keys, queries, recent=recent)
