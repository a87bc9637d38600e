"""Methods from texts: `get_method("snapkv:window=16")`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from importlib import import_module
from typing import Any

from reasonkv.methods.base import Method
from reasonkv.methods.catalogue import CATALOGUE, MethodError, installed, known_name, method_names, unknown
from reasonkv.methods.options import checked, options_of


def method_class(name: str) -> type[Method]:
    """Return the class behind a name, in any spelling that `known_name` understands.

    Raises:
        MethodError: no such method (the message names the nearest), or an entry point that is not a Method.
    """
    name = known_name(name)
    if name in CATALOGUE:
        module, _, attribute = CATALOGUE[name].path.partition(":")
        found = getattr(import_module(module), attribute)
    else:
        found = installed()[name].load()
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise MethodError(f"The entry point {name!r} does not name a reasonkv Method class.")
    own = getattr(found, "name", None)
    if own != name:
        raise MethodError(
            f"The entry point {name!r} gives a method that calls itself {own!r}; give both the same name."
        )
    return found


def method_classes() -> Iterator[type[Method]]:
    """Yield every method class, built-in ones first."""
    return map(method_class, method_names())


def get_method(spec: str | Method) -> Method:
    """Return a method from `name` or `name:key=value,key=value`; a Method is returned as it is.

    Raises:
        MethodError: unknown name, unknown option, or a value that is not allowed.
    """
    if isinstance(spec, Method):
        return spec
    if not isinstance(spec, str):
        raise MethodError(f"A method is a name such as 'snapkv' or an object such as SnapKV(window=16), not {spec!r}.")
    name, _, text = spec.partition(":")
    cls = method_class(name.strip())
    given: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = item.partition("=")
        if not equals:
            raise MethodError(f"Write options of {cls.name} as key=value, not {item!r}.")
        _check_known(cls, key)
        given[key] = checked(cls, key, value, is_text=True)
    return _made(cls.name, lambda: cls(**given))


def with_options(method: Method, options: Mapping[str, Any]) -> Method:
    """Return a method with some options replaced by values of their own types, as JSON has them.

    Raises:
        MethodError: as `get_method`.
    """
    for key in options:
        _check_known(type(method), key)
    return _made(method.name, lambda: replace(method, **options))


def _check_known(cls: type[Method], key: str) -> None:
    known = options_of(cls)
    if key not in known:
        raise MethodError(unknown(f"option of {cls.name}", str(key), list(known)))


def _made(name: str, make: Callable[[], Method]) -> Method:
    try:
        return make()
    except MethodError:
        raise
    except (TypeError, ValueError) as error:  # of another package's method
        raise MethodError(f"{name}: {error}") from None
