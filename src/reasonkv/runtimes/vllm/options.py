"""Options of the method that a request may set: those that change how slots are scored, and nothing that is collected.

The front-end asks to refuse what makes no sense, the worker to plan by it; neither needs vLLM for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reasonkv.methods import Method, MethodError, with_options
from reasonkv.runtimes.vllm.config import ServingError

LARGEST = 10_000
"""Bound on the numbers among a request's options, its inverse on small ones. Any client may send them, and an event
that takes minutes, or scores that overflow, would be felt by every request of the engine."""


def method_of(engine_method: Method, options: Mapping[str, Any]) -> Method:
    """The method of a request that sets options: the engine's with these replaced, and all others as they are there.

    Equal options give equal methods, by which requests can be grouped, and no options the engine's own.

    Raises:
        ServingError: an option or value that makes no sense, or that decides what the engine collects for all requests.

    """
    if not options:
        return engine_method
    name = engine_method.name
    try:
        made = with_options(engine_method, options)
    except MethodError as error:
        raise ServingError(str(error)) from None
    for key, value in options.items():
        if isinstance(value, (int, float)) and value and not 1 / LARGEST <= abs(value) <= LARGEST:
            raise ServingError(
                f"{name}: a request's {key} must be 0 or between {1 / LARGEST} and {LARGEST} in size, not {value!r}."
            )
    deciding = sorted(options) if engine_method.needs.observes else _deciding(engine_method, made, options)
    if deciding:
        raise ServingError(
            f"{', '.join(deciding)} of {name} cannot be set by a request, because what the engine collects for all "
            "requests depends on it; set it in --additional-config."
        )
    return made


def _deciding(method: Method, made: Method, options: Mapping[str, Any]) -> list[str]:
    """The options that change what a runtime must provide: those that do alone, or if none does, all."""
    if made.needs == method.needs:
        return []
    alone = []
    for key, value in options.items():
        try:
            changes = with_options(method, {key: value}).needs != method.needs
        except MethodError:  # it makes sense only beside another one
            changes = True
        alone += [key] * changes
    return sorted(alone or options)
