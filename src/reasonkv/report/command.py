"""The command that makes results again, rebuilt from the arguments in their manifest."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

_PLAIN = {
    "task": "--task",
    "methods": "--methods",
    "mean_slots": "--mean-slots",
    "limit": "--limit",
    "samples": "--samples",
    "seed": "--seed",
    "max_new_tokens": "--max-new-tokens",
}
_RULE = {"prompt": "--prompt-policy"}
"""Flags of a budget's fields that are not called as the field."""
_SIZES = {"tokens": "--budgets", "keep": "--keep", "retention": "--retention"}
"""Flags of a budget's size."""
_USUAL = {"temperature": 0.6, "top_p": 0.95}
"""What traces have where nothing was said; it plays no part unless they were sampled."""


def command(manifest: Mapping[str, Any]) -> str:
    """Return one line for a shell; the run it starts has the manifest's own identity.

    Args:
        manifest: of a results folder of `replay`, `evaluate`, `demo` or `tune`.
    """
    name, arguments = str(manifest["command"]), manifest.get("arguments", {})
    if name == "demo":
        return _line(["reasonkv", name], {"--limit": arguments.get("limit"), "--seed": arguments.get("seed")})
    searched = "rule" in arguments  # a search finds its budgets itself, and says nothing of samples and temperature
    budgets, traces = arguments.get("budgets") or [], arguments.get("traces") or {}
    flags: dict[str, Any] = {"--model": manifest.get("model", {}).get("name", "testbed")}
    flags |= {flag: arguments.get(key) for key, flag in _PLAIN.items() if not (searched and key == "samples")}
    if searched:
        name = "tune"
        flags["--metric"] = "accuracy" if "samples" in arguments else "top1"
    elif not arguments.get("mean_slots"):
        for size, flag in _SIZES.items():
            flags[flag] = [one[size] for one in budgets if one.get(size) is not None]
    rule = arguments["rule"] if searched else budgets[0] if budgets else {}
    if "size" in rule:  # the other fields of a window follow from these
        rule = {"window": rule["size"], "window_buffer": rule["buffer"]}
    flags |= {_RULE.get(key, _flag(key)): value for key, value in rule.items() if key not in _SIZES}
    if traces:
        flags["--max-new-tokens"] = traces.get("max_new_tokens")
        if not searched:
            source = flags["--traces"] = traces.get("source")
            drawn = _USUAL | {key: value for key, value in traces.items() if key not in {"source", "max_new_tokens"}}
            flags |= _drawn(drawn) if source == "sampled" or drawn != _USUAL else {}
    if "given" in arguments:  # traces of a file bring their own task
        flags["--task"] = None
    flags |= _drawn(arguments.get("sampling") or {}) | {"--diagnostics": arguments.get("diagnostics")}
    flags |= {_flag(key): value for key, value in arguments.get("options", {}).items()}
    return _line(["reasonkv", name], {**flags, "--dtype": arguments.get("dtype"), "--out": "results"})


def _drawn(sampling: Mapping[str, Any]) -> dict[str, Any]:
    return {"--sampling" if key == "preset" else _flag(key): value for key, value in sampling.items()}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _line(words: list[str], flags: Mapping[str, Any]) -> str:
    """Flags without a value, and those with an empty list, are left to their defaults."""
    for flag, value in flags.items():
        if value is True:
            words = [*words, flag]
        elif flag == "--stop":  # a text may hold a comma
            words = [*words, *(word for text in value for word in (flag, text))]
        elif value is not None and value != []:
            words = [*words, flag, ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    return shlex.join(words)
