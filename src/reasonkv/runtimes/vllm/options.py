"""What one request may set, in `extra_args` (over HTTP: `vllm_xargs`) under "reasonkv".

The front end asks here to refuse a wrong request, the worker to plan by a right one. Nothing here imports vLLM.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

from reasonkv.methods import Method, MethodError, with_options
from reasonkv.runtimes.vllm.config import KEY, ServingError, typed

LARGEST = 10_000
"""Bound on the numbers among a request's options, its inverse on small ones. Any client may send them; a compaction
that takes minutes, or scores that overflow, would be felt by every request of the engine."""


@dataclass(frozen=True)
class RequestConfig:
    """What one request sets."""

    seed: int = 0  # row seed of stochastic methods: several samples of one prompt evict different slots
    enabled: bool = True  # False keeps the request's full KV; for engines that schedule by `SCHEDULER`
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)  # of the engine's method; see `method_of`

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", MappingProxyType(dict(self.options)))

    @classmethod
    def of(cls, extra_args: Mapping[str, Any] | None) -> RequestConfig:
        """Read a request's `extra_args`; the value may be JSON text, because `vllm_xargs` takes no objects.

        Raises a ServingError for an unknown field or a wrong value.
        """
        asked = given = (extra_args or {}).get(KEY)
        if asked is None:
            return cls()
        if isinstance(asked, str):
            try:
                asked = json.loads(asked)
            except (ValueError, RecursionError):  # no JSON, or a number or nesting that Python refuses to read
                asked = None
        if not isinstance(asked, Mapping):
            raise ServingError(f'A request\'s reasonkv must be an object such as {{"seed": 1}}, not {given!r}.')
        fixed = sorted(set(asked) & {"method", "tokens", "keep", "interval", "window"})
        if fixed:
            raise ServingError(
                f"{', '.join(fixed)} cannot be set by a request, because blocks are reserved by the engine's; "
                "set it in --additional-config."
            )
        known = [one.name for one in fields(cls)]
        unknown = sorted(str(name) for name in asked if name not in known)
        if unknown:
            raise ServingError(
                f"Unknown reasonkv options of a request: {', '.join(unknown)}; known: {', '.join(known)}."
            )
        seed, enabled, options = (
            typed(asked, name, default, "A request's reasonkv")
            for name, default in (("seed", 0), ("enabled", True), ("options", {}))
        )
        if not -(2**63) <= seed < 2**63:
            raise ServingError(f"A request's reasonkv seed must be a whole number of at most 64 bits, not {seed!r}.")
        return cls(seed, enabled, options)

    @classmethod
    def asked(cls, sampling_params: Any) -> RequestConfig:
        """Return what a request set; the defaults where its options are wrong."""
        try:
            return cls.of(getattr(sampling_params, "extra_args", None))
        except ServingError:
            return cls()


def method_of(engine_method: Method, options: Mapping[str, Any]) -> Method:
    """Return the engine's method with a request's options in place of its own; without options, the very same object.

    Equal options give equal methods, so requests can be grouped by method. Raises a ServingError for a wrong option or
    value, or for an option that decides what the engine collects for all requests.
    """
    if not options:
        return engine_method
    name, needs = engine_method.name, engine_method.needs

    def changes_needs(key: str) -> bool:
        try:
            return with_options(engine_method, {key: options[key]}).needs != needs
        except MethodError:  # it makes sense only beside another option
            return True

    try:
        made = with_options(engine_method, options)
    except MethodError as error:
        raise ServingError(str(error)) from None
    for key, value in options.items():
        if isinstance(value, (int, float)) and value and not 1 / LARGEST <= abs(value) <= LARGEST:
            raise ServingError(
                f"{name}: a request's {key} must be 0 or between {1 / LARGEST} and {LARGEST} in size, not {value!r}."
            )
    deciding: list[str] = []
    if needs.observes or made.needs != needs:
        deciding = [key for key in options if not needs.observes and changes_needs(key)] or list(options)
    if deciding:
        raise ServingError(
            f"{', '.join(sorted(deciding))} of {name} cannot be set by a request, because what the engine collects for "
            "all requests depends on it; set it in --additional-config."
        )
    return made
