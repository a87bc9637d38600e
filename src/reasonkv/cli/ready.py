"""A budget that was found, as a line of Python and a command: what to paste."""

from __future__ import annotations

import shlex
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from reasonkv.cli.flags import NAMES
from reasonkv.cli.mistakes import UsageError
from reasonkv.errors import ReasonKVError
from reasonkv.evaluate.job import RULE, BudgetOptions

if TYPE_CHECKING:
    from reasonkv.budget import Budget


def one_budget(options: BudgetOptions) -> Budget:
    """Return the only budget of some options.

    Raises:
        UsageError: there are several, or none.
        BudgetError: fields that contradict each other.
    """
    from reasonkv.evaluate.cells import make_budgets

    found = make_budgets(options)
    if len(found) != 1:
        raise UsageError("Give one budget: --budget TOKENS, --keep SHARE, or --window SIZE with one --retention.")
    return found[0]


def python_line(method: str, budget: BudgetOptions, tokens: int) -> str:
    """Return a `CompressedCache(...)` for a method's spec at a size (of a window, slots kept); or why there is none."""
    from reasonkv.methods import get_method, refuse_future

    chosen = get_method(method)
    try:
        refuse_future(chosen)
    except ReasonKVError as error:
        return f"# {error}"
    usual = type(chosen)().options()
    options = ", ".join(f"{name}={value!r}" for name, value in chosen.options().items() if value != usual[name])
    made = f"{type(chosen).__name__}({options})"
    if budget.window is not None:
        size = f"Window(size={budget.window}, buffer={budget.window_buffer}, retention={tokens / budget.window:g})"
        return f"CompressedCache(model, {made}, {size})"
    rule = "".join(f", {name}={value!r}" for name, value in rule_fields(budget).items())
    return f"CompressedCache(model, {made}, tokens={tokens}{rule})"


def serve_line(model: str, method: str, budget: BudgetOptions, tokens: int) -> str:
    """Return the `reasonkv serve` command for a method's spec at a size; or why vLLM does not run it.

    A size of 0 is the budget's share.
    """
    from reasonkv.methods import get_method
    from reasonkv.runtimes.vllm.config import EngineConfig, vllm_variant

    try:
        served = vllm_variant(get_method(method)).spec()
        if budget.layer_shares:  # which go with fewer rules there
            EngineConfig.parse({"method": served, "tokens": tokens, **rule_fields(budget)})
    except ReasonKVError as error:
        return f"# {error}"
    words = ["reasonkv", "serve", model, "--method", served]
    if budget.window is not None:
        words += ["--window", str(budget.window), "--window-buffer", str(budget.window_buffer)]
        words += ["--retention", f"{tokens / budget.window:g}"]
    else:
        words += ["--budget", str(tokens)] if tokens else ["--keep", f"{budget.keep[0]:g}"]
        for name, value in rule_fields(budget).items():
            words += [NAMES.get(f"BudgetOptions.{name}", (f"--{name.replace('_', '-')}",))[0], str(value)]
    grouped = "  # layers in groups of like shares, which loses a little more" if budget.layer_shares else ""
    return shlex.join(words) + grouped


def rule_fields(budget: BudgetOptions) -> dict[str, Any]:
    """Return the fields of the rule that are not the defaults."""
    usual = {one.name: one.default for one in fields(budget)}
    return {name: getattr(budget, name) for name in RULE if getattr(budget, name) != usual[name]}
