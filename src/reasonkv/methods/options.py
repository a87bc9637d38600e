"""Options of a method: read from its annotations once per class, checked and parsed in one place.

An option is a dataclass field with an annotated type: `window: Annotated[int, Ge(1)] = 64`,
`pooling: Literal["avg", "max"] = "avg"`.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from numbers import Integral, Real
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le

from reasonkv.errors import ReasonKVError


class MethodError(ReasonKVError, ValueError):
    """An unknown method or option, or a value that an option does not allow."""


@dataclass(frozen=True)
class Odd:
    """Marks an option that must be an odd number of slots."""


Count = Annotated[int, Ge(0)]
Size = Annotated[int, Ge(1)]
Kernel = Annotated[int, Ge(1), Odd()]
"""Slots pooled together."""
Share = Annotated[float, Ge(0), Le(1)]

_KINDS = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a text"}


@dataclass(frozen=True)
class Option:
    """One option of a method.

    Args:
        name: of the field.
        kind: bool, int, float or str; object for a type that is not checked.
        choices: the values allowed, or () for every value of the kind within the bounds.
        bounds: `Ge`, `Gt`, `Le` and `Odd`, all of which hold.
        optional: None is allowed.
    """

    name: str
    kind: type
    choices: tuple[Any, ...] = ()
    bounds: tuple[Any, ...] = ()
    optional: bool = False

    @property
    def allowed(self) -> str:
        """What values are allowed, to follow "must be"."""
        if self.choices:
            return listed([str(one) for one in self.choices])
        if any(isinstance(one, Odd) for one in self.bounds):
            return "an odd number of slots"
        least = [one.ge for one in self.bounds if isinstance(one, Ge)]
        most = [one.le for one in self.bounds if isinstance(one, Le)]
        if least and most:
            return f"between {least[0]} and {most[0]}"
        parts = [f"at least {one}" for one in least] + [f"at most {one}" for one in most]
        parts += [f"above {one.gt}" for one in self.bounds if isinstance(one, Gt)]
        return " and ".join(parts) or _KINDS.get(self.kind, "a value")

    def check(self, method: str, value: Any) -> Any:
        """Return the value in the option's own type (a numpy integer as int, a whole number as float).

        Raises:
            MethodError: wrong type, or not allowed.
        """
        if self.kind is object or (value is None and self.optional):
            return value
        if self.choices:
            if value not in self.choices:
                raise MethodError(f"{method}: {self.name} must be {self.allowed}, not {value!r}.")
            return value
        is_bool = isinstance(value, bool)
        fits = {bool: is_bool, str: isinstance(value, str)}.get(self.kind)
        if fits is None:
            number = Integral if self.kind is int else Real
            fits = isinstance(value, number) and not is_bool and _is_finite(value)
        if not fits:
            raise MethodError(f"{method}: {self.name} must be {_KINDS[self.kind]}, not {value!r}.")
        value = self.kind(value)
        if not all(_holds(bound, value) for bound in self.bounds):
            raise MethodError(f"{method}: {self.name} must be {self.allowed}, not {value!r}.")
        return value

    def parse(self, method: str, text: str) -> Any:
        """Return the value that a text such as "64" or "true" stands for, unchecked but for its type.

        Raises:
            MethodError: the text is no value of this type.
        """
        try:
            if self.kind is bool:
                return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
            return self.kind(text) if self.kind in (int, float) else text
        except (KeyError, ValueError):
            raise MethodError(f"{method}: {self.name} must be {_KINDS[self.kind]}, not {text!r}.") from None


def listed(words: Sequence[str]) -> str:
    """Join words: "a", "a or b", "a, b or c"."""
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


@cache
def options_of(cls: type) -> dict[str, Option]:
    """The options of a method class by name, in the order of its fields."""
    hints = get_type_hints(cls, include_extras=True)
    return {one.name: _option(one.name, hints[one.name]) for one in fields(cls)}


def _option(name: str, hint: Any) -> Option:
    bounds: tuple[Any, ...] = ()
    if get_origin(hint) is Annotated:
        hint, *marks = get_args(hint)
        bounds = tuple(marks)
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    optional = types.NoneType in parts
    parts = tuple(part for part in parts if part is not types.NoneType)
    if all(get_origin(part) is Literal for part in parts):
        return Option(name, str, tuple(value for part in parts for value in get_args(part)), (), optional)
    if len(parts) == 1 and get_origin(parts[0]) is Annotated:
        inner = _option(name, parts[0])
        return Option(name, inner.kind, inner.choices, inner.bounds, optional)
    kind = parts[0] if len(parts) == 1 and parts[0] in _KINDS else object
    return Option(name, kind, (), bounds, optional)


def _is_finite(value: Any) -> bool:
    return bool(abs(value) <= sys.float_info.max)  # math.isfinite raises for integers beyond a float


def _holds(bound: Any, value: Any) -> bool:
    match bound:
        case Ge(least):
            return bool(value >= least)
        case Gt(least):
            return bool(value > least)
        case Le(most):
            return bool(value <= most)
        case Odd():
            return bool(value % 2 == 1)
    return True
