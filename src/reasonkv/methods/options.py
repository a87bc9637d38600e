"""Options of a method: dataclass fields whose annotations pydantic checks.

`window: Annotated[int, Ge(1)] = 64`, `pooling: Literal["avg", "max"] = "avg"`; names for common ones are here.
"""

from __future__ import annotations

from dataclasses import fields
from functools import cache
from typing import Annotated, Any, get_type_hints

import numpy as np
from annotated_types import Ge, Le
from pydantic import AfterValidator, ConfigDict, PydanticUserError, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError, SchemaError

from reasonkv.methods.catalogue import MethodError
from reasonkv.numbers import TOO_MANY


def _odd(slots: int) -> int:
    if slots % 2 == 0:
        raise PydanticCustomError("odd", "Input should be an odd number of slots")
    return slots


Count = Annotated[int, Ge(0)]
Size = Annotated[int, Ge(1)]
Kernel = Annotated[int, Ge(1), AfterValidator(_odd)]
"""Slots pooled together."""
Share = Annotated[float, Ge(0), Le(1)]

_MUST_BE = {
    "int": "a whole number", "float": "a finite number", "finite": "a finite number", "bool": "true or false",
    "string": "a text", "greater_than": "above {gt:g}", "greater_than_equal": "at least {ge:g}",
    "less_than_equal": "at most {le:g}", "literal_error": "{expected}",
}  # fmt: skip
"""Our words for pydantic's errors, by their type or its first word."""


@cache
def options_of(cls: type) -> dict[str, TypeAdapter[Any]]:
    """Return what checks the options of a method class, by name, in the order of its fields."""
    hints = get_type_hints(cls, include_extras=True)
    return {one.name: _checker(hints[one.name]) for one in fields(cls)}


def _checker(hint: Any) -> TypeAdapter[Any]:
    try:
        return TypeAdapter(hint, config=ConfigDict(allow_inf_nan=False, arbitrary_types_allowed=True))
    except (PydanticUserError, SchemaError):  # an object that is no option of a command line, taken as it is
        return TypeAdapter(Any)


def checked(method: Any, name: str, value: Any, *, is_text: bool = False) -> Any:
    """Return the value of a method's option as its annotation has it; texts such as "64" and "true" are parsed.

    Args:
        method: a method, or its class.
        name: of the option.
        value: a value of the option's type (numpy's numbers included), or a text.
        is_text: the value is a text, to be parsed.

    Raises:
        MethodError: the value is not allowed.
    """
    cls: Any = method if isinstance(method, type) else type(method)
    option = options_of(cls)[name]
    try:
        if is_text:
            found = option.validate_strings(value)
        else:
            found = option.validate_python(value.item() if isinstance(value, np.generic) else value, strict=True)
        if isinstance(found, int) and abs(found) >= TOO_MANY:
            raise MethodError(f"{cls.name}: {name} must be below 2^31, not a number of {found.bit_length()} bits.")
        return found
    except ValidationError as error:
        found = error.errors()[0]
        words = _MUST_BE.get(found["type"]) or _MUST_BE.get(found["type"].partition("_")[0]) or found["msg"]
        words = words.removeprefix("Input should be ").format(**found.get("ctx", {})).replace("'", "")
        raise MethodError(f"{cls.name}: {name} must be {words}, not {value if is_text else repr(value)}.") from None
