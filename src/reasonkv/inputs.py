"""Read what others may have written: JSON and YAML of known types, and one sentence for whatever is wrong.

Everything read from a file is checked here or by a pydantic model before it is used: numbers are finite and fit 53
bits, texts are valid Unicode, nesting is shallow.
"""

from __future__ import annotations

import json
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, TypeVar

from annotated_types import Ge, Le
from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json

from reasonkv.errors import ReasonKVError
from reasonkv.files import finite
from reasonkv.numbers import LARGEST, misfit

Whole = Annotated[int, Ge(-LARGEST), Le(LARGEST)]
Count = Annotated[int, Ge(0), Le(LARGEST)]
Number = Annotated[float, Ge(-1e30), Le(1e30)]  # squares and sums of such numbers are still finite
Amount = Annotated[float, Ge(0), Le(1e30)]
Share = Annotated[float, Ge(0), Le(1)]
_MOST_VALUES, _LONGEST, _DEEPEST = 100_000, 200_000, 50
T = TypeVar("T")


def read_json(path: Path, kind: type[T] | TypeAdapter[T], what: str, error: type[ReasonKVError], advice: str) -> T:
    """Return a JSON file as a pydantic model or another type, without conversions such as from "1" to 1.

    Args:
        path: the file.
        kind: of its content.
        what: it should be, in words, as in "a manifest".
        error: raised where it is not.
        advice: what to do then, as in "delete it".
    """
    try:
        data = finite(path).read_bytes()
        json.dumps(from_json(data), allow_nan=False)  # a type such as Any would take NaN
        return parse_json(data, kind)
    except OSError as cause:
        why = cause.strerror or str(cause)
    except ValidationError as cause:
        why = reason(cause)
    except ValueError as cause:
        why = str(cause)[:200]
    raise error(f"{path} cannot be read as {what} ({why}); {advice}.")


def parse_json(data: bytes | str, kind: type[T] | TypeAdapter[T]) -> T:
    """Return JSON as a pydantic model or another type.

    Raises:
        ValidationError: it is something else.
    """
    adapter: TypeAdapter[T] = kind if isinstance(kind, TypeAdapter) else _adapter(kind)  # type: ignore[arg-type]
    return adapter.validate_json(data, strict=True)


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def reason(error: ValidationError) -> str:
    """Return the first mistake that pydantic found, in words."""
    first = error.errors(include_input=False, include_url=False)[0]
    words = first["msg"].removeprefix("Value error, ").rstrip(".")[:200]
    words = words[:1].lower() + words[1:]
    return f"field {'.'.join(map(str, first['loc']))[:100]!r} is wrong ({words})" if first["loc"] else words


def parse_yaml(text: str) -> Any:
    """Return YAML as plain values.

    Raises:
        ValueError: it is no YAML, refers to itself, is too deep or too long, or holds a number or text that is not
            allowed (see above); the message is one line.
    """
    import yaml

    steps = accumulate((one in "[{") - (one in "]}") for one in text)
    if len(text) > _LONGEST or max(steps, default=0) > _DEEPEST:  # the library takes minutes for 10,000 open brackets
        raise ValueError(f"it has more than {_LONGEST:,} characters, or more than {_DEEPEST} open brackets")
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())[:200]) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    left = _MOST_VALUES

    def check(value: Any, depth: int) -> None:  # without memory of what was seen, so that aliases count each time
        nonlocal left
        left -= 1
        if left < 0 or depth > _DEEPEST:
            raise ValueError(f"it holds more than {_MOST_VALUES:,} values, or more than {_DEEPEST} levels")
        if isinstance(value, dict):
            for key, one in value.items():
                if not isinstance(key, str):
                    raise ValueError(f"the key {str(key)[:40]!r} is no text")
                check(key, depth)
                check(one, depth + 1)
        elif isinstance(value, list):
            for one in value:
                check(one, depth + 1)
        elif (wrong := misfit(value)) is not None:
            raise ValueError(wrong)

    check(found, 0)
    return found
