"""The command that makes results again, rebuilt from the arguments in their manifest."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

_NAMED = ("task", "methods", "mean_slots", "limit", "samples", "seed", "max_new_tokens")
_SIZES = ("retention", "keep", "tokens")
"""Fields of a budget's size; a window has tokens, too, which follow from its retention."""
_OTHER_NAMES = {"tokens": "--budgets", "preset": "--sampling"}
"""Flags that are not called as their field."""
_USUAL = {"temperature": 0.6, "top_p": 0.95}
"""What traces have where nothing was said; it plays no part unless they were sampled."""


def command(manifest: Mapping[str, Any]) -> str:
    """Return one line for a shell; the run it starts has the manifest's own identity.

    Args:
        manifest: of a results folder of `replay`, `evaluate` or `demo`; one of `tune` is that of its probes.
    """
    name, arguments = str(manifest["command"]), manifest.get("arguments", {})
    if name == "demo":
        return _line(name, {key: arguments.get(key) for key in ("limit", "seed")})
    budgets, traces = arguments.get("budgets") or [], arguments.get("traces") or {}
    given = {"model": manifest.get("model", {}).get("name", "testbed")} | {key: arguments.get(key) for key in _NAMED}
    if not arguments.get("mean_slots"):
        size = next((size for size in _SIZES if any(one.get(size) is not None for one in budgets)), "tokens")
        given[size] = [one[size] for one in budgets]
    rule = budgets[0] if budgets else {}
    if "size" in rule:  # the other fields of a window follow from these
        rule = {"window": rule["size"], "window_buffer": rule["buffer"]}
    given |= {"prompt_policy" if key == "prompt" else key: value for key, value in rule.items() if key not in _SIZES}
    if traces:
        given |= {"max_new_tokens": traces.get("max_new_tokens"), "traces": traces.get("source")}
        drawn = _USUAL | {key: value for key, value in traces.items() if key not in {"source", "max_new_tokens"}}
        given |= drawn if given["traces"] == "sampled" or drawn != _USUAL else {}
    if "given" in arguments:  # traces of a file bring their own task
        given["task"] = None
    given |= (arguments.get("sampling") or {}) | {"diagnostics": arguments.get("diagnostics")}
    return _line(name, {**given, **arguments.get("options", {}), "dtype": arguments.get("dtype"), "out": "results"})


def _line(command: str, given: Mapping[str, Any]) -> str:
    """Fields without a value, and those with an empty list, are left to their defaults."""
    words = ["reasonkv", command]
    for name, value in given.items():
        flag = _OTHER_NAMES.get(name, "--" + name.replace("_", "-"))
        if value is True:
            words.append(flag)
        elif name == "stop":  # a text may hold a comma
            words += [word for text in value for word in (flag, text)]
        elif value is not None and value != []:
            words += [flag, ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    return shlex.join(words)
