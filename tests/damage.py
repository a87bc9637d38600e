"""Ways to damage a file: every field of a JSON-like value, of a safetensors file and of a pickle, by hostile values."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save
from torch import Tensor

DEEP = json.loads("[" * 150 + "]" * 150)
HOSTILE = (
    None, True, False, 0, -1, 1, 2, 3, 64, 2**31, 2**63, 10**30, 0.5, -0.0, 1e300, float("nan"), float("inf"), "", "x", "64",
    "full", "rkv", "</script>", "../../x", "\ud800", "a\0b", "x" * 5000, [], [1], ["x"], [[1]], [None], {}, {"x": 1},
    {"tokens": "x"}, {"size": 8}, {"retention": 0.5}, {"events": 1}, DEEP,
)  # fmt: skip
TEXTS = ("", "x", "-1", "0", "1", "3", "99999999999", "9" * 5000, "nan", "1e999", "true", "1.5", "²", "program")
Path = tuple[Any, ...]


def places(value: Any, at: Path = ()) -> Iterator[Path]:
    """Yield the path of every field, at any depth."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield (*at, key)
        yield from places(one, (*at, key))


def changed(value: Any, path: Path, new: Any = None, *, delete: bool = False) -> Any:
    """Return a copy with one field replaced or deleted."""
    found = copy.deepcopy(value)
    owner = found
    for key in path[:-1]:
        owner = owner[key]
    if delete:
        del owner[path[-1]]
    else:
        owner[path[-1]] = new
    return found


@st.composite
def damaged_value(draw: st.DrawFn, value: Any) -> Any:
    """One or two fields replaced, deleted or swapped with another field's value; or the whole replaced."""
    for _ in range(draw(st.integers(1, 2))):
        known = list(places(value))
        if not known or draw(st.integers(0, 30)) == 0:
            return draw(st.sampled_from(HOSTILE))
        path = draw(st.sampled_from(known))
        value = changed(value, path, draw(st.sampled_from(HOSTILE)), delete=draw(st.integers(0, 6)) == 0)
    return value


@st.composite
def damaged_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """A file that was cut, or of which some bytes are others."""
    if draw(st.booleans()):
        return data[: draw(st.integers(0, len(data) - 1))]
    at = draw(st.integers(0, len(data) - 1))
    return data[:at] + draw(st.binary(min_size=1, max_size=8)) + data[at + 1 :]


def _damaged(tensor: Tensor, how: int) -> Tensor:
    ways = (
        lambda: tensor[:0], lambda: tensor.double(), lambda: tensor.flatten(), lambda: tensor[None],
        lambda: tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor.fill_(-1),
        lambda: tensor.fill_(min(3e38, torch.finfo(tensor.dtype).max)) if tensor.is_floating_point() else tensor.fill_(2**30),
        lambda: tensor.long(), lambda: tensor[..., :-1], lambda: tensor[:-1], lambda: torch.zeros(()),
        lambda: tensor.bool(),
    )  # fmt: skip
    return ways[how % len(ways)]().contiguous().clone()


@st.composite
def damaged_tensors(draw: st.DrawFn, data: bytes, tensors: dict[str, Tensor], header: dict[str, str] | None) -> bytes:
    """A safetensors file with a wrong header, tensors of other shapes, types, names or numbers, or damaged bytes."""
    kind = draw(st.sampled_from(("bytes", "header", "tensor", "tensor")))
    if kind == "bytes":
        return draw(damaged_bytes(data))
    tensors = {name: one.clone() for name, one in tensors.items()}
    if kind == "header" and header:
        header = dict(header)
        name = draw(st.sampled_from(sorted(header)))
        if draw(st.integers(0, 4)) == 0:
            del header[name]
        else:
            header[name] = draw(st.sampled_from(TEXTS))
    else:
        name = draw(st.sampled_from(sorted(tensors)))
        how = draw(st.integers(0, 13))
        found = tensors.pop(name)
        if how < 12:
            tensors[name] = _damaged(found, how)
        elif how == 12:
            tensors[draw(st.sampled_from(("999999999.query", "x", "-1.key", "0.output")))] = found
    return save(tensors, header)


def read_header(path: Any) -> dict[str, str]:
    """Return the texts in the header of a safetensors file."""
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return dict(header.get("__metadata__", {}))


def tensors_of(path: Any) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file."""
    return dict(load_file(path))
