"""The catalogue: every method by name, with others' methods found through the entry point group `reasonkv.methods`."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, get_type_hints

from reasonkv.methods.base import (
    Method,
    MethodError,
    Observed,
    Requirements,
    ScorerMethod,
    SlotState,
    refuse_future,
)

__all__ = [
    "Method",
    "MethodError",
    "Observed",
    "Requirements",
    "ScorerMethod",
    "SlotState",
    "catalogue",
    "get_method",
    "method_names",
    "refuse_future",
    "with_options",
]

CATALOGUE = {
    "full": "reasonkv.methods.full:FullKV",
    "streaming": "reasonkv.methods.streaming:StreamingLLM",
    "random": "reasonkv.methods.random:RandomEviction",
    "knorm": "reasonkv.methods.knorm:Knorm",
    "keydiff": "reasonkv.methods.keydiff:KeyDiff",
    "snapkv": "reasonkv.methods.snapkv:SnapKV",
    "rkv": "reasonkv.methods.rkv:RKV",
    "triattention": "reasonkv.methods.triattention:TriAttention",
    "expected": "reasonkv.methods.expected:ExpectedAttention",
    "cask": "reasonkv.methods.cask:CASK",
    "vase-attnv": "reasonkv.methods.vase_attnv:VaseAttnV",
    "vase-dkv": "reasonkv.methods.vase_dkv:VaseDKV",
    "kara": "reasonkv.methods.kara:Kara",
    "h2o": "reasonkv.methods.h2o:H2O",
    "tova": "reasonkv.methods.tova:TOVA",
    "curdkv": "reasonkv.methods.curdkv:CurDKV",
    "chunkkv": "reasonkv.methods.chunkkv:ChunkKV",
    "pyramidkv": "reasonkv.methods.pyramidkv:PyramidKV",
    "adakv": "reasonkv.methods.adakv:AdaKV",
    "lagkv": "reasonkv.methods.lagkv:LagKV",
    "defensivekv": "reasonkv.methods.defensivekv:DefensiveKV",
    "beaconkv": "reasonkv.methods.beaconkv:BeaconKV",
    "random-attention": "reasonkv.methods.random_attention:RandomAttention",
    "quest": "reasonkv.methods.quest:Quest",
    "seer": "reasonkv.methods.seer:SeerAttention",
    "oracle": "reasonkv.methods.oracle:Oracle",
}
ENTRY_POINT_GROUP = "reasonkv.methods"


def method_names() -> list[str]:
    """Names of the built-in methods, then of those that installed packages add."""
    added = sorted(point.name for point in entry_points(group=ENTRY_POINT_GROUP) if point.name not in CATALOGUE)
    return [*CATALOGUE, *added]


def method_class(name: str) -> type[Method]:
    """The class behind a name.

    Raises:
        MethodError: no such method (the message names the nearest), or an entry point that is not a Method.

    """
    if name in CATALOGUE:
        module, attribute = CATALOGUE[name].split(":")
        found = getattr(import_module(module), attribute)
    else:
        points = [point for point in entry_points(group=ENTRY_POINT_GROUP) if point.name == name]
        if not points:
            raise MethodError(_unknown("method", name, method_names()))
        found = points[0].load()
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise MethodError(f"The entry point {name!r} does not name a reasonkv Method class.")
    if getattr(found, "name", None) != name:
        raise MethodError(
            f"The entry point {name!r} gives a method that calls itself {getattr(found, 'name', None)!r}; "
            f"give both the same name."
        )
    return found


def get_method(spec: str | Method) -> Method:
    """A method from `name` or `name:key=value,key=value`; a Method passes through.

    Raises:
        MethodError: unknown name, unknown option, or a value of the wrong kind, in one sentence.

    """
    if isinstance(spec, Method):
        return spec
    name, _, text = spec.partition(":")
    cls = method_class(name.strip())
    hints = get_type_hints(cls)
    options: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = item.partition("=")
        if not equals:
            raise MethodError(f"Write options of {name} as key=value, not {item!r}.")
        if key not in {f.name for f in fields(cls)}:
            raise MethodError(_unknown(f"option of {name}", key, [f.name for f in fields(cls)]))
        options[key] = _parse(name, key, value, hints[key])
    try:
        return cls(**options)
    except MethodError:
        raise
    except (TypeError, ValueError) as error:
        raise MethodError(f"{name}: {error}") from None


def with_options(method: Method, options: Mapping[str, Any]) -> Method:
    """A method with some options replaced by values of their own types, as JSON has them; the others stay as they are.

    Raises:
        MethodError: as `get_method`.

    """
    name, hints = method.name, get_type_hints(type(method))
    known, values = [f.name for f in fields(method)], {}
    for key, value in options.items():
        if key not in known:
            raise MethodError(_unknown(f"option of {name}", str(key), known))
        if not _fits(value, hints[key]):
            raise MethodError(f"{name}: {key} takes {_kind(hints[key])}, not {value!r}.")
        values[key] = float(value) if hints[key] is float else value
    try:
        return replace(method, **values)
    except MethodError:
        raise
    except (TypeError, ValueError) as error:
        raise MethodError(f"{name}: {error}") from None


def catalogue() -> Iterator[type[Method]]:
    """Every method class, built-in ones first."""
    for name in method_names():
        yield method_class(name)


def _parse(name: str, key: str, value: str, hint: Any) -> Any:
    try:
        if hint is bool:
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[value.lower()]
        if hint is int:
            return int(value)
        if hint is float:
            return float(value)
    except (KeyError, ValueError):
        raise MethodError(f"{name}: {key} takes {_kind(hint)}, not {value!r}.") from None
    return value


def _fits(value: object, hint: Any) -> bool:
    if hint is bool or isinstance(value, bool):
        return hint is bool and isinstance(value, bool)
    if hint is float:  # neither infinite nor nan, which would not equal itself
        return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max
    return isinstance(value, int if hint is int else str)


def _kind(hint: Any) -> str:
    return {bool: "true or false", int: "a whole number", float: "a number"}.get(hint, "a text")


def _unknown(kind: str, name: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else "."
    options = f" Known: {', '.join(known)}." if known else " It takes none."
    return f"Unknown {kind} {name!r}{hint}{options}"
