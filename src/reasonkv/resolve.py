"""What every runtime checks before it starts: the budget of a method, the budgets of rows, and the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

from transformers import PreTrainedConfig, PreTrainedModel

from reasonkv.budget import Budget, BudgetError, ExplicitEventsWindow, PeriodicWindow, Window
from reasonkv.errors import ReasonKVError
from reasonkv.layers import BOUNDED, STOCK, cache_layers, hides_nothing, is_indexed, is_latent, text_config
from reasonkv.methods import Method, get_method

TESTED = (
    "llama", "qwen2", "qwen3", "qwen3_moe", "mistral", "phi3", "gemma2", "gemma3", "gemma3_text", "gemma3n_text",
    "gemma4_text", "gpt_oss", "glm4", "cohere", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "minicpm3",
    "longcat_flash", "mistral4", "youtu", "axk1", "qwen2_5_vl_text", "qwen3_vl_text", "qwen3_next", "qwen3_5_text",
    "nemotron_h", "granitemoehybrid", "jamba", "zamba2", "falcon_h1", "bamba", "lfm2", "olmo_hybrid", "kimi_linear",
    "deepseek_v32", "glm_moe_dsa", "hy_v4", "minimax",
)  # fmt: skip
"""Model types whose every layer is compared with full attention over the kept slots in the tests."""


_OWN_CACHE = ("reformer", "rwkv", "xlnet", "xlstm")
"""Model types that take no cache but a class of their own file."""


_OWN_ATTENTION = (
    "big_bird", "codegen", "falcon", "gpt_neox_japanese", "gptj", "megatron-bert", "mvp", "rembert", "roformer",
    "trocr", "xglm",
)  # fmt: skip
"""Model types that attend by code of their own, under a mask that transformers makes; compared in the matrix."""
_REASONS = {
    "diffllama": "weighs the values of one KV head by the keys of another, but each head keeps other tokens",
    "inkling_text": "adds a bias by distance to the logits of all tokens, dropped ones included",
    "bloom": "uses ALiBi, which it adds itself for the whole text, and dropped slots have no place in it",
    "mpt": "uses ALiBi, which it adds itself by the index of a slot, and that is no distance once slots are dropped",
    "gpt_neo": "hides tokens by the index of their slots in its local layers, and dropped slots move the others",
    "prophetnet": "feeds one token a forward and attends in several streams at once",
    "cpmant": "needs the whole text at every step, and adds biases for all of it",
    "xlm": "takes no past_key_values, but a cache by another name",
    "git": "attends to text by code of its own, behind tokens of an image",
    "jetmoe": "repeats its KV heads before attention, which then does not know whose slots it reads",
}
"""By model type, why a compressed cache cannot serve it."""


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
    if budget.layer_shares and needs.selects:
        raise BudgetError(f"{name} reads equally many slots in every layer; leave out layer_shares.")
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


def context_length(model: PreTrainedModel) -> int | None:
    """Return the most positions the model was made for, or None if its configuration does not say."""
    limit = getattr(text_config(model.config), "max_position_embeddings", None)
    return None if limit is None else int(limit)


def check_model(model: PreTrainedModel | PreTrainedConfig, method: Method | None = None) -> list[str]:
    """Reasons why a compressed cache cannot serve this model, one sentence each; empty when it can.

    Args:
        model: the model, or its configuration.
        method: the method, if what it needs of the model is to be checked, too.
    """
    config = model if isinstance(model, PreTrainedConfig) else getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        return [f"Only models of transformers can be served; give the model itself, not {model!r:.80}."]
    decoder = text_config(config)
    kind = getattr(decoder, "model_type", type(decoder).__name__)
    problems = []
    if getattr(config, "is_encoder_decoder", False):
        return [f"{kind} is an encoder-decoder; only its decoder alone, loaded as a causal model, can be bounded."]
    if is_latent(decoder) and method is not None and (method.needs.merges or method.needs.selects):
        what = "merges keys and values by weights of their own" if method.needs.merges else "selects per KV head"
        problems.append(
            f"{kind} uses latent attention, which stores keys and values of all heads in one vector, but {method.name} "
            f"{what}; choose a method that evicts, such as snapkv."
        )
    if kind in _REASONS:
        return [f"{kind} {_REASONS[kind]}; use a stock cache."]
    if kind in _OWN_CACHE:
        return [f"{kind} takes no cache but a class of its own, so nothing can be bounded; use a stock cache."]
    problems += _layer_problems(config, kind) or _indexer_problems(config, kind, method)
    if getattr(decoder, "alibi", False):
        problems.append(f"{kind} {_REASONS['bloom']}; use a stock cache.")
    if getattr(decoder, "use_bidirectional_attention", False) not in (False, None, "vision"):
        problems.append(f"{kind} attends in both directions; a cache can only be compressed under causal attention.")
    if isinstance(model, PreTrainedModel) and attends_by_itself(model):
        problems += _own_attention_problems(type(model).__name__, kind, method)
    return problems


def attends_by_itself(model: PreTrainedModel) -> bool:
    """Return whether a model does not call attention through AttentionInterface, so that its queries are not seen."""
    return not decoder_of(model)._can_set_attn_implementation()


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model inside a model that attends to the text; itself where none is named (ModernBERT's is a head)."""
    found = model.get_decoder()
    return found if isinstance(found, PreTrainedModel) else model


def reads_mask(model: PreTrainedModel) -> bool:
    """Return whether a model itself reads the mask of a forward: its indexer does, or attention of its own."""
    return is_indexed(model.config) or attends_by_itself(model)


def _own_attention_problems(name: str, kind: str, method: Method | None) -> list[str]:
    if kind not in _OWN_ATTENTION:
        return [f"{name} does not call attention through AttentionInterface."]
    if method is None:
        return []
    needs = method.needs
    wants = {
        "queries": needs.queries or needs.observes or needs.future or needs.calibration,
        "a weight for each slot": needs.merges or needs.log_mass,
        "a choice for each query": needs.selects,
    }
    missing = [what for what, is_wanted in wants.items() if is_wanted]
    if not missing:
        return []
    return [
        f"{name} attends by code of its own, not through AttentionInterface, and {method.name} needs {missing[0]}; "
        "choose a method that reads keys alone, such as keydiff."
    ]


def _layer_problems(config: PreTrainedConfig, kind: str) -> list[str]:
    try:
        layers = [type(layer) for layer in cache_layers(config)]
    except KeyError as error:
        return [f"{kind} has layers of type {error.args[0]}, which this version of transformers has no cache for."]
    except AttributeError:  # Blt: patches of bytes beside the bytes
        return [f"{kind} has parts with caches of their own, which its configuration does not describe."]
    unknown = sorted({layer.__name__ for layer in layers} - {layer.__name__ for layer in (*BOUNDED, *STOCK)})
    if unknown:
        return [f"{kind} keeps more than keys and values of its tokens ({', '.join(unknown)}); use a stock cache."]
    if set(layers) & set(BOUNDED):
        return []
    if hides_nothing(config):
        return [f"The sliding window of {kind} is as long as its context; load the model with sliding_window=None."]
    return [f"No layer of {kind} grows with the text: all slide or carry a state; use a stock cache."]


def _indexer_problems(config: PreTrainedConfig, kind: str, method: Method | None) -> list[str]:
    if not is_indexed(config):
        return []
    if not is_latent(text_config(config)):
        return [
            f"The indexer of {kind} chooses blocks of tokens for all KV heads at once, but each head keeps other "
            "tokens; use a stock cache."
        ]
    if method is not None and method.needs.future:
        return [f"{method.name} reads attention to all tokens, but layers of {kind} attend to what an indexer chose."]
    return []
