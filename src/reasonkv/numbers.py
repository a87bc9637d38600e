"""Numbers and texts that a user gives: checked, and made plain Python."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from numbers import Real
from operator import index
from typing import Any, Literal, get_args

from reasonkv.errors import BudgetError

KVDtype = Literal["int8", "int4", "int2", "turbo4", "turbo2"]
"""What kept slots are stored in, unless in the model's dtype; the number says how many bits."""
LARGEST = 2**53
"""Above it, whole numbers are no longer exact as floats: in JSON elsewhere, in tables, in figures."""
TOO_MANY = 2**31
"""Amounts, which have a least value, are counted in 32 bits by tensors of indices; seeds have 64."""

CALIBRATED = "calibrated"
"""In place of layers' shares: those that the model's calibration holds."""
_LEAST_SHARE = 1e-3  # shares are counted in thousandths


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
    if found >= TOO_MANY and least is not None:
        raise BudgetError(f"{name} must be below 2^31, not a number of {found.bit_length()} bits.")
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


def layer_shares(value: Any) -> str:
    """Return layers' shares as a text such as "0.5/1.5", from one or from numbers, or raise; "": none."""
    if isinstance(value, str) and value == CALIBRATED:
        return CALIBRATED
    try:
        parts = value.split("/") if isinstance(value, str) and value else list(value)
        found = [math.nan if isinstance(one, (bool, bytes)) else float(one) for one in parts]
    except (TypeError, ValueError):
        found = [math.nan]
    if not all(_LEAST_SHARE <= one < TOO_MANY for one in found):
        raise BudgetError(
            f"layer_shares must be numbers of at least {_LEAST_SHARE:g}, one per layer, as in 0.5/1.5, or the word "
            f"{CALIBRATED}, not {str(value)[:60]!r}."
        )
    return "/".join(f"{one:.6g}" for one in found)


def shares_in_groups(shares: str, groups: int) -> str:
    """Return layers' shares, each replaced by the mean of its group of layers.

    Groups are of layers of like shares. Their sizes differ by one layer at most.

    Args:
        shares: numbers, as `layer_shares` returns them.
        groups: how many; one for every layer leaves the shares as they are.
    """
    each = [float(one) for one in shares.split("/")]
    groups = min(groups, len(each))
    by_share = sorted(range(len(each)), key=lambda at: each[at])
    cuts = [len(each) * group // groups for group in range(groups + 1)]
    for start, end in pairwise(cuts):
        layers = by_share[start:end]
        mean = sum(each[at] for at in layers) / len(layers)
        each = [round(mean, 3) if at in layers else one for at, one in enumerate(each)]
    return layer_shares(each)


def divide(total: int, weights: Sequence[int]) -> list[int]:
    """Return shares in proportion to weights, equal ones for equal weights, whose sum is at most the total.

    Integers throughout, so every machine divides alike: what rounding down leaves goes to the largest remainders. The
    sum misses the total by less than the largest number of equal weights: by nothing where no two are equal.
    """
    whole, count = sum(weights), Counter(weights)
    share = {weight: total * weight // whole for weight in count}
    left = total - sum(share[weight] for weight in weights)
    for weight in sorted(count, key=lambda one: -(total * one % whole)):  # of equal remainders, what comes first
        if count[weight] <= left:
            share[weight] += 1
            left -= count[weight]
    return [share[weight] for weight in weights]


def kv_dtype(value: Any) -> KVDtype | None:
    """Return what kept slots are stored in, or raise; None, the model's own dtype, stays None."""
    names: tuple[KVDtype, ...] = get_args(KVDtype)
    if value is not None and value not in names:
        listed = f"{', '.join(names[:-1])} or {names[-1]}"
        raise BudgetError(f"dtype must be {listed}, or None for the model's own, not {value!r}.")
    return next((name for name in names if name == value), None)


def misfit(value: Any) -> str | None:
    """Return what is wrong with a number or a text, in words; None where nothing is."""
    if isinstance(value, int) and abs(value) > LARGEST:
        return f"{str(value)[:20] if value.bit_length() < 1000 else 'a number'} is beyond 2^53"
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value} is no finite number"
    if isinstance(value, str):
        if "\0" in value:
            return "a text holds the character NUL"
        try:
            value.encode()
        except UnicodeEncodeError:
            return f"{ascii(value)[:60]} is no valid Unicode"
    if value is not None and not isinstance(value, (int, float, str)):
        return f"{str(value)[:40]!r} is no number and no text; put it in quotes"
    return None
