"""R-KV: duplicates that are spared, redundancy, its variants, and memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from slot_views import make_view, random_view
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from reasonkv.methods import get_method
from reasonkv.methods.rkv import RKV, mean_cosine, spared_columns
from reasonkv.view import SlotView


def view_for(spec: str, **options: Any) -> SlotView:
    needs = get_method(spec).needs
    return random_view(queries=needs.queries, sinks=4, recent=max(8, needs.recent), **options)


# ---------------------------------------------------------------------------------------------------------------- rkv


def cosine_matrix(unit: Tensor) -> Tensor:
    cosine = unit @ unit.mT
    cosine.diagonal(dim1=1, dim2=2).zero_()
    return cosine


@pytest.mark.parametrize("common", [0.0, 0.6, 1.5])
@pytest.mark.parametrize(("heads", "N"), [(1, 300), (5, 257), (3, 40), (2, 1), (1, 700)])
def test_the_spared_column_is_the_last_one_above_the_threshold(heads: int, N: int, common: float) -> None:
    generator = torch.Generator().manual_seed(N)
    keys = torch.randn(heads, N, 12, generator=generator) + common * torch.randn(heads, 1, 12, generator=generator)
    unit = torch.nn.functional.normalize(keys.double(), dim=-1)
    cosine = cosine_matrix(unit)
    column, value = spared_columns(unit, 0.5)
    expected = torch.where(cosine > 0.5, torch.arange(N), -1).amax(-1).clamp(min=0)
    assert torch.equal(column, expected)
    torch.testing.assert_close(value, cosine.gather(2, expected.unsqueeze(-1)).squeeze(-1), atol=1e-12, rtol=0)
    spared = cosine.scatter(2, expected.unsqueeze(-1), 0.0)
    torch.testing.assert_close(mean_cosine(keys[None].double())[0], spared.mean(1), atol=1e-12, rtol=0)
    nothing_spared = mean_cosine(keys[None].double(), spare="none")[0]
    torch.testing.assert_close(nothing_spared, cosine.mean(1), atol=1e-12, rtol=0)


def test_of_equal_keys_rkv_keeps_the_newest() -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 2, 64, 64, generator=generator)
    copies = list(range(5, 45, 5))
    keys[:, :, copies] = keys[:, :, [5]]
    view = make_view(keys, torch.randn(1, 4, 8, 64, generator=generator), recent=8)
    for head in RKV(weight=0.0).plan(view, 59).kept_BHK[0].tolist():
        dropped = set(range(64)) - set(head)
        assert dropped < set(copies[:-1])


def test_rkv_weighs_importance_against_redundancy() -> None:
    view = view_for("rkv", N=120)
    method = RKV()
    n = 120 - method.window
    importance, redundancy = method.importance(view), method.redundancy(view)
    torch.testing.assert_close(redundancy.sum(-1), torch.ones(1, 2))
    torch.testing.assert_close(RKV(weight=1.0).score(view)[..., :n], importance)
    torch.testing.assert_close(RKV(weight=0.0).score(view)[..., :n], -redundancy[..., :n])


def test_without_sparing_rkvs_redundancy_orders_keys_as_keydiff_does() -> None:
    view = view_for("rkv:variant=vase,window=16", N=150, dtype=torch.float64)
    old = view.keys_BHND[:, :, :134]
    redundancy = mean_cosine(old, spare="none")
    keydiff = get_method("keydiff").score(make_view(old))  # type: ignore[attr-defined]
    assert torch.equal((-redundancy).argsort(-1), keydiff.argsort(-1))


def test_the_forms_have_their_own_defaults() -> None:
    assert RKV().options() == {
        "variant": "paper", "window": 8, "kernel": 7, "weight": 0.1, "threshold": 0.5, "retain": "last"
    }  # fmt: skip
    port = get_method("rkv:variant=vase")
    assert port.options() == RKV().options() | {"variant": "vase", "window": 64, "kernel": 5, "weight": 0.5}
    assert port.needs.queries == port.needs.recent == 64
    assert (RKV().spec(), port.spec(), RKV(variant="vase", window=8).spec()) == (
        "rkv", "rkv:variant=vase", "rkv:variant=vase,window=8"
    )  # fmt: skip


class LargestTensor(TorchDispatchMode):
    """Records the bytes of the largest storage any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("common", [0.0, 1.0])
@pytest.mark.parametrize("spec", ["rkv", "rkv:variant=vase", "snapkv", "keydiff"])
def test_no_matrix_of_slots_by_slots_is_ever_in_memory(spec: str, common: float) -> None:
    N, D, method = 8192, 32, get_method(spec)
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 2, N, D, generator=generator) + common * torch.randn(1, 2, 1, D, generator=generator)
    queries = torch.randn(1, 4, max(1, method.needs.queries), D, generator=generator)
    view = make_view(keys, queries, recent=64)
    with LargestTensor() as largest:
        method.plan(view, 4096).check((1, 2, N), 4096, view.is_protected_BHN)
    assert 0 < largest.bytes <= 8 << 20  # N x N float32 would be 256 MiB per head
