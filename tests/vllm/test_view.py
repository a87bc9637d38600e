"""Views whose keys and values are read when somebody looks."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from slot_views import make_view
from torch import Tensor

from reasonkv.methods import get_method
from reasonkv.runtimes.vllm.compactions import PagedView
from reasonkv.view import SlotView

CONTENTS = {"keys": torch.randn(2, 2, 40, 8), "values": torch.randn(2, 2, 40, 8)}


def paged(asked: list[str]) -> PagedView:
    """A view of 40 slots that notes what is read."""

    def read(kind: str) -> Tensor:
        asked.append(kind)
        return CONTENTS[kind]

    whole = make_view(CONTENTS["keys"], torch.randn(2, 4, 8, 8), recent=8)
    given = {one.name: getattr(whole, one.name) for one in fields(SlotView)}
    return PagedView(**(given | {"keys_BHND": None, "values_BHND": None}), read=read)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [("random", []), ("streaming", []), ("keydiff", ["keys"]), ("snapkv:window=8", ["keys"]),
     ("vase-dkv:window=8", ["keys", "values"])],
)  # fmt: skip
def test_a_method_reads_what_it_looks_at_and_nothing_else(spec: str, expected: list[str]) -> None:
    asked: list[str] = []
    view = paged(asked)
    plan = get_method(spec).plan(view, 20)
    assert sorted(asked) == expected and [kind for kind in CONTENTS if view.was_read(kind)] == expected
    whole = replace(view)  # which looks at everything
    assert sorted(asked) == ["keys", "values"]
    assert whole.keys_BHND is CONTENTS["keys"] and whole.values_BHND is CONTENTS["values"]
    assert torch.equal(get_method(spec).plan(whole, 20).kept_BHK, plan.kept_BHK)


def test_a_view_has_no_other_fields_than_its_own() -> None:
    with pytest.raises(AttributeError, match="unknown"):
        _ = paged([]).unknown
