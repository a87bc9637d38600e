"""Flags of the command line, derived from the dataclasses of the Python API."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_origin, get_type_hints

from cyclopts import Group, Parameter, Token, validators

from reasonkv.budget import Budget, Window
from reasonkv.cli.mistakes import UsageError

if TYPE_CHECKING:
    from reasonkv.models import LoadedModel

FLAT = Parameter(name="*")
"""Marks a dataclass whose fields are flags of the command itself."""
WHAT, BUDGET, MODEL, OUTPUT = (Group.create_ordered(name) for name in ("What to run", "Budget", "Model", "Output"))


def flags(cls: type, group: Group, leave_out: Iterable[str] = (), /, **parameters: Parameter) -> type[Any]:
    """Return a dataclass with the fields, defaults and help of `cls`, whose annotations make flags of them.

    Args:
        cls: a dataclass of the Python API; its docstring's `Args` are the help.
        group: heading of the flags in `--help`.
        leave_out: fields that the command fills in itself.
        parameters: what differs for a field: another name, a converter.
    """
    from docstring_parser import parse_from_object

    words = {one.arg_name: one.description for one in parse_from_object(cls).params}
    hints, made = get_type_hints(cls), []
    for one in fields(cls):
        if one.init and one.name not in leave_out:
            kind = hints[one.name]
            several = LISTED if get_origin(kind) in {Sequence, list, tuple} else None
            parameter = Parameter.combine(Parameter(group=group), several, parameters.get(one.name))
            kept = field(
                default=one.default, default_factory=one.default_factory, metadata={"help": words.get(one.name)}
            )
            made.append((one.name, Annotated[kind, parameter], kept))
    return make_dataclass(f"{cls.__name__}Flags", made, kw_only=True, frozen=True)


def split_specs(text: str) -> list[str]:
    """Split `a,b:key=1,other=2,c` into `a`, `b:key=1,other=2` and `c`: `key=value` belongs to the spec before it."""
    specs: list[str] = []
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        key, equals, _ = part.partition("=")
        if specs and equals and ":" not in key:
            specs[-1] += "," + part
        else:
            specs.append(part)
    return specs


def _listed(kind: Any, tokens: Sequence[Token]) -> tuple[Any, ...]:
    """Convert values separated by commas, each kept once."""
    values = list(dict.fromkeys(one for token in tokens for one in split_specs(token.value)))
    (of,) = [one for one in kind.__args__ if one is not Ellipsis]
    words = {int: "whole numbers separated by commas, as in 128,256", float: "numbers separated by commas"}
    try:
        if values:
            return tuple(of(one.replace("_", "")) if of in words else one for one in values)
    except ValueError:
        pass
    name, text = tokens[0].keyword, ",".join(token.value for token in tokens)
    raise UsageError(f"{name} takes {words.get(of, 'names separated by commas')}, not {text!r}.")


LISTED = Parameter(converter=_listed, n_tokens=1)
