"""What every runtime checks before it starts: the budget of a method, the budgets of rows, and the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from reasonkv.budget import Budget, BudgetError, ExplicitEventsWindow, PeriodicWindow, Window
from reasonkv.errors import ReasonKVError
from reasonkv.methods import Method, get_method

TESTED = ("llama", "qwen2", "qwen3", "qwen3_moe", "mistral", "phi3", "gemma3", "gemma3_text", "gpt_oss")
"""Model types whose every layer is compared with full attention over the kept slots in the tests."""


class UnsupportedModelError(ReasonKVError, ValueError):
    """A model, setting or use that a compressed cache would get wrong; the message is one sentence."""


def resolve_budget(method: Method, budget: Budget | int | None) -> tuple[Method, Budget | None]:
    """Return a method as it runs under a budget, and the budget; None exactly for methods that keep everything.

    A default window of newest tokens shrinks with a small budget; one that was set stays and must fit.

    Raises:
        BudgetError: a budget that is missing, not wanted, or too small for what is protected.

    """
    name = method.name
    if not method.bounded:
        if budget is not None:
            raise BudgetError(f"{name} keeps everything and takes no budget; leave it out or choose a method.")
        return method, None
    if budget is None:
        raise BudgetError(f"{name} needs a budget, such as tokens=512 or keep=0.25.")
    budget = budget if isinstance(budget, Budget) else Budget(tokens=budget)
    method = _shrink_window(method, budget)
    needs = method.needs
    if budget.keep is None:
        budget.check_protected(recent=needs.recent)
    elif needs.selects or needs.layer_budgets:
        what = "reads a fixed number of slots" if needs.selects else "divides tokens among layers"
        raise BudgetError(f"{name} {what}, so it cannot keep a share of the length; give it tokens.")
    else:  # a share keeps at least what is protected
        budget = replace(budget, recent=max(budget.recent, needs.recent))
    return method.for_budget(budget), budget


def _shrink_window(method: Method, budget: Budget) -> Method:
    own = method.needs.recent
    if isinstance(budget, Window) or budget.tokens is None or sum(budget.protected(own)) <= budget.tokens:
        return method
    room = max(1, budget.protected()[1])
    usual = method.defaults()
    for one in fields(method):
        if one.name in ("window", "recent") and getattr(method, one.name) == usual[one.name] == own:
            return replace(method, **{one.name: room})
        if one.name == "base" and getattr(method, "base") == one.default:  # noqa: B009 - only wrappers have one
            base = _shrink_window(get_method(str(one.default)), budget)
            return replace(method, base=base.spec().replace(",", ";"))  # type: ignore[call-arg]
    return method


def check_window(budget: Budget | None, *, reopen_prompt: bool, listed: bool) -> None:
    """Check what only some kinds of budget can do.

    Raises:
        BudgetError: listed events for a budget that decides for itself, or a prompt in the middle of the windows.

    """
    if isinstance(budget, (ExplicitEventsWindow, PeriodicWindow)):
        raise BudgetError("A cache lists its rows' events itself; give it a Window and window_events.")
    if listed and not isinstance(budget, Window):
        raise BudgetError("window_events are for a Window; a Budget decides by itself when it compacts.")
    if reopen_prompt and isinstance(budget, Window):
        raise BudgetError("The prompt of a Window ends before its first window; leave reopen_prompt out.")


def row_budgets(budget: Budget | None, events: Sequence[tuple[int, int]] | None, batch: int) -> Sequence[Budget | None]:
    """Return every row's budget: the same for all, unless (row, logical length) of every event is given.

    Raises:
        BudgetError: an event of a row that is not in the batch, or two events of a row too close.

    """
    if events is None or budget is None:
        return [budget] * batch
    rows: list[list[int]] = [[] for _ in range(batch)]
    for row, length in events:
        if not 0 <= row < batch:
            raise BudgetError(f"window_events names row {row} of a batch of {batch} rows.")
        rows[row].append(length)
    assert isinstance(budget, Window)
    return [
        ExplicitEventsWindow(budget.size, budget.buffer, budget.retention, events=tuple(sorted(own))) for own in rows
    ]


def broadcast_per_prompt(values: Sequence[int] | None, batch: int, name: str) -> Sequence[int] | None:
    """Return one value per row; `generate` expands a prompt to several rows, so a prompt's value is repeated.

    Raises:
        BudgetError: values that do not divide the batch.

    """
    if values is None:
        return None
    if not values or batch % len(values):
        raise BudgetError(f"{name} has {len(values)} entries for a batch of {batch} rows.")
    return [value for value in values for _ in range(batch // len(values))]


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The decoder's own configuration (multi-modal models nest it)."""
    return config.get_text_config(decoder=True)


def context_length(model: PreTrainedModel) -> int | None:
    """Return the most positions the model was made for, or None if its configuration does not say."""
    limit = getattr(text_config(model.config), "max_position_embeddings", None)
    return None if limit is None else int(limit)


def layer_types(config: PreTrainedConfig) -> list[str]:
    """The attention type of every layer, "full_attention" or "sliding_attention" for supported models."""
    decoder = text_config(config)
    declared = getattr(decoder, "layer_types", None)
    if declared is not None:
        return list(declared)
    sliding = getattr(decoder, "sliding_window", None) is not None and getattr(decoder, "use_sliding_window", True)
    return ["sliding_attention" if sliding else "full_attention"] * decoder.num_hidden_layers


def compressed_layers(config: PreTrainedConfig) -> int:
    """Layers a compressed cache bounds; the others slide and are bounded already."""
    return layer_types(config).count("full_attention")


def check_model(model: PreTrainedModel | PreTrainedConfig) -> list[str]:
    """Reasons why a compressed cache cannot serve this model, one sentence each; empty when it can."""
    config = model if isinstance(model, PreTrainedConfig) else getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        return [f"Only models of transformers can be served; give the model itself, not {model!r:.80}."]
    decoder = text_config(config)
    kind = getattr(decoder, "model_type", type(decoder).__name__)
    problems = []
    if getattr(config, "is_encoder_decoder", False):
        return [f"{kind} is an encoder-decoder; only decoder-only models keep one growing cache to bound."]
    if getattr(decoder, "kv_lora_rank", None):
        problems.append(f"{kind} uses multi-head latent attention, whose cache holds no per-head keys and values.")
    types = layer_types(config)
    unknown = sorted(set(types) - {"full_attention", "sliding_attention"})
    if unknown:
        problems.append(
            f"{kind} has layers of type {', '.join(unknown)}; only full and sliding attention can be served."
        )
    elif "full_attention" not in types:
        problems.append(
            f"All layers of {kind} use sliding-window attention, which is bounded already; use a stock cache."
        )
    if getattr(decoder, "num_kv_shared_layers", 0):
        problems.append(f"{kind} shares keys and values between layers, which per-layer eviction would break.")
    if getattr(decoder, "alibi", False) or kind in {"bloom", "mpt"}:
        problems.append(f"{kind} uses ALiBi, whose distances are lost once slots are dropped.")
    for rope_type in sorted(_rope_types(decoder) & {"dynamic", "longrope"}):
        problems.append(
            f"{kind} uses {rope_type} RoPE scaling, which rotates keys differently as the sequence grows, "
            "so kept keys would no longer match new queries."
        )
    if _has_multimodal_rope(decoder):
        problems.append(f"{kind} uses multi-axis RoPE positions (images, video); only text positions can be served.")
    if getattr(decoder, "use_bidirectional_attention", False):
        problems.append(f"{kind} attends in both directions; a cache can only be compressed under causal attention.")
    if isinstance(model, PreTrainedModel) and not getattr(model, "_supports_attention_backend", False):
        problems.append(f"{type(model).__name__} does not call attention through AttentionInterface.")
    return problems


def _rope_types(config: PreTrainedConfig) -> set[str]:
    found: set[str] = set()

    def visit(node: Any) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                if key in {"rope_type", "type"} and isinstance(value, str):
                    found.add(value)
                visit(value)

    visit(getattr(config, "rope_parameters", None))
    visit(getattr(config, "rope_scaling", None))
    return found


def _has_multimodal_rope(config: PreTrainedConfig) -> bool:
    nodes = [getattr(config, "rope_parameters", None), getattr(config, "rope_scaling", None)]
    return any(isinstance(node, dict) and "mrope_section" in node for node in nodes)
