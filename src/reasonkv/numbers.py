"""Numbers that a user gives: checked, and made plain Python."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Real
from operator import index
from typing import Any

from reasonkv.errors import BudgetError


def whole_number(value: Any, name: str, least: int | None = None) -> int:
    """Return a whole number as an int (NumPy's integers are taken, too), or raise."""
    bound = "" if least is None else f" of at least {least}"
    is_share = name == "tokens" and isinstance(value, float) and 0 < value < 1
    hint = f" (for a share of the length give keep={float(value)!r})" if is_share else ""
    try:
        found = index(value)
    except TypeError:
        found = None
    if found is None or isinstance(value, bool) or (least is not None and found < least):
        raise BudgetError(f"{name} must be a whole number{bound}, not {value!r}{hint}.")
    return found


def whole_numbers(value: Any, name: str) -> list[int] | None:
    """Return one whole number or several as a list, or raise; None stays None."""
    several = isinstance(value, Iterable) and not isinstance(value, str)
    return None if value is None else [whole_number(one, name) for one in (value if several else [value])]


def share_of_one(value: Any, name: str) -> float:
    """Return a number strictly between 0 and 1 as a float, or raise."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) < 1:
        raise BudgetError(f"{name} must be a number between 0 and 1, not {value!r}.")
    return float(value)
