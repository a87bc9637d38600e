"""Processes that hold the heads of a layer between them plan what one plans that holds them all."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from slot_views import random_network, random_view
from torch import Tensor

from reasonkv.calibration import LayerStatistics
from reasonkv.methods import CATALOGUE, Method, Observed, get_method
from reasonkv.plan import Plan
from reasonkv.rotary import Rotary
from reasonkv.runtimes.vllm.config import ServingError, vllm_variant
from reasonkv.view import SlotView

B, H, G, N, D, KEEP, LAYERS = 2, 4, 2, 80, 16, 48, 2
VARIANTS = (
    "random-attention:shared=true", "triattention:mode=global", "triattention:mode=global,noise=true",
    "triattention:mode=per_layer_per_head", "cask:mass=none,per_layer=true", "cask:mass=none,fold=none", "cask:mass=none,fold=neighbours",
    "chunkkv:base=keydiff,reuse=2", "tova:window=4",
)  # fmt: skip


class Threads:
    """Ranks that are threads of this process."""

    def __init__(self, count: int) -> None:
        self.parts: list[Tensor | None] = [None] * count
        self.barrier = threading.Barrier(count, timeout=60)
        self.calls = 0

    def of(self, rank: int) -> Rank:
        return Rank(self, rank)


class Rank:
    def __init__(self, threads: Threads, rank: int) -> None:
        self.threads, self.rank = threads, rank

    def gather(self, x: Tensor) -> Tensor:
        self.threads.parts[self.rank] = x
        self.threads.barrier.wait()
        found = torch.stack([part for part in self.threads.parts if part is not None])
        self.threads.calls += self.rank == 0
        self.threads.barrier.wait()
        return found


def served() -> list[str]:
    found = []
    for name in CATALOGUE:
        try:
            found.append(vllm_variant(get_method(name)).spec())
        except ServingError:
            continue
    return [*found, *VARIANTS]


def whole_views(method: Method) -> list[SlotView]:
    """Layers whose heads are all here, with everything that the method may ask for."""
    needs, rotary = method.needs, Rotary(10_000.0 ** (-torch.arange(D // 2) / (D // 2)))
    views = []
    for layer in range(LAYERS):
        view = random_view(
            B, H, N, D, group=G, queries=16 if needs.queries else 0, key_seed=layer, layer=layer,
            sinks=2, recent=16, prompt=20, seed=5, row_seeds=(0, 3),
        )  # fmt: skip
        state = {
            name: view.positions_BHN.to(one.dtype) if one.initial == "position" else torch.full((B, H, N), one.initial)
            for name, one in needs.stored_state.items()
        }
        draw = torch.Generator().manual_seed(layer)
        mean = torch.randn(H * G, D // 2, dtype=torch.complex64, generator=draw)
        modulus = mean.abs() + torch.rand(H * G, D // 2, generator=draw)
        statistics = LayerStatistics(mean, modulus, mean.abs().square(), forecast=random_network(H, D, layer))
        seen = Observed(
            torch.randn(B, H * G, 40, D, generator=draw), torch.arange(40).expand(B, -1),
            torch.ones(B, 40, dtype=torch.bool), layer=layer, rotary=rotary,
        )  # fmt: skip
        row_state = {}
        if needs.observes:
            row_state = method.new_row_state(B, H * G, D, torch.device("cpu"))
            method.observe(row_state, seen)
        views.append(
            replace(
                view, state=state, rotary=rotary, query_heads=H * G, prompt_length_B=torch.full((B,), 20),
                calibration=statistics, row_state=row_state,
            )
        )  # fmt: skip
    return views


def part_of(view: SlotView, rank: int, ranks: int, threads: Threads) -> SlotView:
    """What one of several processes sees of a layer."""
    heads, queries = slice(rank * H // ranks, (rank + 1) * H // ranks), slice(rank * H * G // ranks, None)
    queries = slice(queries.start, queries.start + H * G // ranks)
    by_head = {name: x[:, heads] for name, x in vars(view).items() if isinstance(x, Tensor) and "_BH" in name}
    by_head.pop("queries_BHqTD", None)
    whole = view.calibration
    assert whole is not None and whole.square_HqF is not None and whole.forecast is not None
    return replace(
        view, **by_head,
        queries_BHqTD=None if view.queries_BHqTD is None else view.queries_BHqTD[:, queries],
        state={name: x[:, heads] for name, x in view.state.items()},
        row_state={name: x if x.ndim == 1 else x[:, queries] for name, x in view.row_state.items()},
        calibration=LayerStatistics(
            whole.mean_HqF[queries], whole.modulus_HqF[queries], whole.square_HqF[queries],
            forecast=whole.forecast.part(heads),
        ),
        query_heads=H * G // ranks, first_head=heads.start, ranks=threads.of(rank),
    )  # fmt: skip


def apart(plan: Callable[[list[SlotView]], list[Plan]], views: list[SlotView], ranks: int) -> tuple[list[Any], int]:
    """Every rank's plans, made at the same time, and how many collectives that took."""
    threads = Threads(ranks)
    parts = [[part_of(view, rank, ranks, threads) for view in views] for rank in range(ranks)]
    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(plan, parts)), threads.calls


def joined(plans: list[Plan]) -> list[Tensor]:
    """Everything the ranks planned for one layer, heads side by side."""
    found = [torch.cat([plan.kept_BHK for plan in plans], 1)]
    folds = [plan.merge for plan in plans if plan.merge is not None]
    assert len(folds) in (0, len(plans))
    if folds:
        found.append(torch.cat([fold.into_BHN for fold in folds], 1))
        found += [torch.cat([fold.key_weights_BHN for fold in folds], 1)]
        found += [torch.cat([fold.value_weights_BHN for fold in folds], 1)]
    return found + [torch.cat([plan.new_state[name] for plan in plans], 1) for name in sorted(plans[0].new_state)]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("spec", served())
def test_ranks_plan_together_what_one_process_plans(spec: str, ranks: int) -> None:
    method = get_method(spec)
    views = whole_views(method)
    whole = method.plan_layers(views, KEEP)
    parts, calls = apart(lambda own: method.plan_layers(own, KEEP), views, ranks)
    for layer, plan in enumerate(whole):
        found, expected = joined([plans[layer] for plans in parts]), joined([plan])
        assert torch.equal(found[0], expected[0]), layer
        for got, wanted in zip(found[1:], expected[1:], strict=True):
            torch.testing.assert_close(got, wanted)
    if method.needs.scope == "head":
        assert calls == 0
    elif spec not in ("triattention", "random-attention:shared=true"):  # heads agree by number, or share a draw
        assert calls > 0


@pytest.mark.parametrize("how", ["sum", "mean", "max"])
def test_a_reduction_over_heads_goes_over_all_ranks(how: Any) -> None:
    (view,) = whole_views(get_method("snapkv"))[:1]
    numbers = view.positions_BHN + torch.arange(H)[:, None] * 1.5

    def over_heads(own: list[SlotView]) -> Tensor:
        part = numbers[:, own[0].first_head :][:, : own[0].keys_BHND.shape[1]]
        return own[0].reduce(part.amax(1) if how == "max" else getattr(part, how)(1), how)

    found, _ = apart(over_heads, [view], 2)  # type: ignore[arg-type]
    expected = numbers.amax(1) if how == "max" else getattr(numbers, how)(1)
    assert all(torch.equal(one, expected) for one in found)
    assert view.reduce(numbers, how) is numbers  # all heads are here


def test_what_belongs_to_heads_is_joined_in_their_order() -> None:
    (view,) = whole_views(get_method("snapkv"))[:1]
    found, _ = apart(lambda own: own[0].all_heads(own[0].keys_BHND, 1), [view], 4)  # type: ignore[arg-type,return-value]
    assert all(torch.equal(one, view.keys_BHND) for one in found)
