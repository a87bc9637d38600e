"""The interface every method implements.

A method is a frozen dataclass: its fields are its options, its docstring cites the paper. It holds no state; what a
generation accumulates is stored in that generation's cache.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from reasonkv.budget import Budget, BudgetError, Window
from reasonkv.methods.catalogue import CATALOGUE, MethodError
from reasonkv.methods.ops import top_k_slots
from reasonkv.methods.options import checked
from reasonkv.numbers import CALIBRATED, divide
from reasonkv.plan import Plan
from reasonkv.rotary import Rotary
from reasonkv.schedule import in_turn
from reasonkv.view import SlotView

OF_VARIANT: Any = None
"""Default of an option whose value depends on the variant; see `Method.variants`."""


@dataclass(frozen=True)
class SlotState:
    """A number stored beside every slot; it moves with its slot and is counted in bytes.

    Args:
        initial: what a new token's slot gets: its token index ("position"), or a constant.
        merge: how the values of merged slots combine; "kept" takes the kept slot's own.
        dtype: of the stored value, 4 bytes wide.
    """

    initial: Literal["position"] | float
    merge: Literal["sum", "max", "min", "kept"] = "kept"
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Requirements:
    """What a method asks of the runtime.

    Args:
        queries: newest rotated queries to keep in a ring, per sequence and query head.
        recent: newest slots the method itself always keeps (the larger of this and the budget's counts, once).
        scope: what one plan covers: "head" - every KV head chooses its own slots; "layer" - all heads of a layer
            share them; "model" - all layers are planned at once, after the last one (`Method.plan_layers`).
        merges: the method merges slots, so counts are stored.
        future: the method reads full KV's attention of tokens still to come (`SlotView.future_attention_BHN`), which
            is known in replay only.
        slot_state: state beside every slot, by name.
        log_mass: plans carry `Plan.log_mass_BHK`, which the runtime adds to a slot's logits from then on.
        token_ids: the view shows every token of a sequence.
        calibration: the view shows the model's query statistics, and its rotary embedding.
        statistics: which of their optional parts the method reads: "square", "horizon" (`LayerStatistics`).
        rotary: the view shows the rotary embedding.
        observes: `Method.observe` is called with the queries of every forward; what it stores is `view.row_state`.
        observe_steps: decode steps whose queries it may be given at once, always before a compaction.
        output_projection: the view shows the layer's output projection.
        whole_prompt: what the method observes of a prompt is right only if the prompt comes in one forward.
        selects: the method keeps every slot and chooses what each query reads (`SelectionMethod`).
        layer_budgets: layers have budgets of their own (`Method.layer_tokens`).
    """

    queries: int = 0
    recent: int = 0
    scope: Literal["head", "layer", "model"] = "head"
    merges: bool = False
    future: bool = False
    slot_state: Mapping[str, SlotState] = field(default_factory=dict)
    log_mass: bool = False
    token_ids: bool = False
    calibration: bool = False
    statistics: frozenset[str] = frozenset()
    rotary: bool = False
    observes: bool = False
    observe_steps: int = 1
    output_projection: bool = False
    whole_prompt: bool = False
    selects: bool = False
    layer_budgets: bool = False

    @property
    def stored_state(self) -> dict[str, SlotState]:
        """All state stored beside slots, the log of a slot's weight in tokens ("log_mass") included."""
        return {**self.slot_state, **({"log_mass": SlotState(0.0)} if self.log_mass else {})}


@dataclass(frozen=True)
class Observed:
    """The queries of one forward of one layer, for `Method.observe`.

    Args:
        queries_BHqqD: rotated queries of all query heads.
        positions_Bq: int64, their token indices; of padding, anything.
        valid_Bq: bool, False at padding.
        layer: index of the layer.
        rotary: how they were rotated; None unless the method's `Requirements` ask for it.
    """

    queries_BHqqD: Tensor
    positions_Bq: Tensor
    valid_Bq: Tensor
    layer: int
    rotary: Rotary | None = None

    @classmethod
    def joined(cls, seen: Sequence[Observed]) -> Observed:
        """Return several forwards of the same rows as one."""
        if len(seen) == 1:
            return seen[0]
        return replace(
            seen[0],
            queries_BHqqD=torch.cat([one.queries_BHqqD for one in seen], dim=2),
            positions_Bq=torch.cat([one.positions_Bq for one in seen], dim=1),
            valid_Bq=torch.cat([one.valid_Bq for one in seen], dim=1),
        )

    def of_rows(self, index: Tensor) -> Observed:
        """Return the same of some rows."""
        names = ("queries_BHqqD", "positions_Bq", "valid_Bq")
        return replace(self, **{name: getattr(self, name).index_select(0, index) for name in names})


@dataclass(frozen=True)
class Method(ABC):
    """Chooses which slots are kept at a compaction. Subclasses implement `plan`.

    Fields are options, checked against their annotations: `window: Annotated[int, Ge(1)] = 64`, `Literal["a", "b"]`
    (`reasonkv.methods.options` has names for common ones). Deliberate differences from the paper are values of one
    option `variant`, the first field. Built-in methods have name, title and paper in the catalogue, others set them.

    Raises:
        MethodError: an option of the wrong type or out of range.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    """One line."""
    paper: ClassVar[str]
    """Citation with its arXiv number, or "-" for a baseline without one."""
    bounded: ClassVar[bool] = True
    """False only for full KV, which takes no budget."""
    variants: ClassVar[Mapping[str, Mapping[str, object]]] = {}
    """By variant, the values of options whose default is `OF_VARIANT`."""

    def __init_subclass__(cls) -> None:
        for name, entry in CATALOGUE.items():
            if entry.path == f"{cls.__module__}:{cls.__name__}":
                cls.name, cls.title, cls.paper = name, entry.title, entry.paper

    def __post_init__(self) -> None:
        of_variant = self._of_variant()
        for name, value in self.options().items():
            value = of_variant.get(name) if value is None else value
            object.__setattr__(self, name, checked(self, name, value))  # the dataclass is frozen
        self.check_options()

    def check_options(self) -> None:  # noqa: B027 - most methods have nothing to check
        """Check options that depend on each other; all are resolved.

        Raises:
            MethodError: options that contradict each other.
        """

    @property
    def needs(self) -> Requirements:
        """What the runtime must provide, given the options."""
        return Requirements()

    @abstractmethod
    def plan(self, view: SlotView, keep: int) -> Plan:
        """Choose the slots that are kept.

        Args:
            view: one layer's slots.
            keep: slots to return per KV head, fewer than the view holds and at least its protected ones.
        """

    def plan_layers(self, views: Sequence[SlotView], keep: int) -> list[Plan]:
        """Plan several layers at once: all that are compressed with `Requirements(scope="model")`, else one.

        Args:
            views: the layers' slots, in the model's order; all have the same sequences, lengths and slot numbers.
            keep: as in `plan`.
        """
        return [self.plan(view, keep) for view in views]

    def new_row_state(self, rows: int, query_heads: int, head_dim: int, device: torch.device) -> dict[str, Tensor]:
        """Return fresh state of one layer for `observe`, by name, [rows, ...] each; its bytes count as held."""
        raise NotImplementedError(f"{self.name} observes but defines no row state.")

    def observe(self, state: dict[str, Tensor], seen: Observed) -> None:
        """Update `state` in place by one forward's queries; the result must not depend on how tokens are divided."""
        raise NotImplementedError(f"{self.name} observes but does not say how.")

    def for_tokenizer(self, tokenizer: Any) -> Self:
        """Return the method with what an option leaves to the tokenizer filled in; records keep the option."""
        return self

    def for_budget(self, budget: Budget) -> Self:
        """Return the method with what an option leaves to the budget filled in; records keep the option.

        Raises:
            BudgetError: a budget the method cannot work with.
        """
        return self

    def layer_tokens(self, budget: Budget, layers: int, prompt: int) -> Sequence[int]:
        """Return the `tokens` of every layer; read only with `Requirements(layer_budgets=True)`.

        Args:
            budget: what the layers have on average.
            layers: compressed layers, in the model's order.
            prompt: tokens of the prompt, 0 while it is not known.
        """
        return [budget.tokens or 0] * layers  # a share of the length never comes here

    def options(self) -> dict[str, object]:
        """Return the options as recorded in results, resolved."""
        return {one.name: getattr(self, one.name) for one in fields(self)}

    def defaults(self) -> dict[str, object]:
        """Return what the options are unless they are given, of this variant."""
        return {one.name: one.default for one in fields(self)} | dict(self._of_variant())

    def spec(self) -> str:
        """Return the shortest text from which `get_method` makes this method: `name` or `name:key=value,...`."""
        usual = self.defaults()
        changed = [f"{key}={value}" for key, value in self.options().items() if value != usual[key]]
        return self.name + (":" + ",".join(changed) if changed else "")

    def _of_variant(self) -> Mapping[str, object]:
        return self.variants.get(getattr(self, "variant", ""), {})


@dataclass(frozen=True)
class ScorerMethod(Method):
    """A method that ranks slots: those with the highest scores are kept. Subclasses implement `score` alone."""

    @abstractmethod
    def score(self, view: SlotView) -> Tensor:
        """Return float32 scores [B, H, N], higher = kept; protected slots are kept whatever their score."""

    def plan(self, view: SlotView, keep: int) -> Plan:
        """Keep the top-k scores and the protected slots; of equal scores the newer slot."""
        return Plan(top_k_slots(self.score(view), keep, forced_BHN=view.is_protected_BHN))


def refuse_future(method: Method) -> None:
    """Check that a method needs no future attention, for runtimes that do not know the whole trace.

    Raises:
        MethodError: it does.
    """
    if method.needs.future:
        raise MethodError(f"{method.name} looks into the future: it works in replay only, where the trace is known.")


def layer_budgets(
    method: Method | None, budget: Budget | None, layers: int, prompt: int | None = None
) -> Sequence[Budget | None]:
    """Return the budget of every compressed layer of one sequence.

    All are the same unless the method divides the tokens or `stagger` gives layers their turns.

    Args:
        method: a method; None stands for any that divides nothing.
        budget: what is divided; None for full KV.
        layers: compressed layers.
        prompt: tokens of the prompt, None while it is not known.

    Raises:
        BudgetError: a share that cannot hold what is protected, or a budget or method whose layers must be alike.
    """
    own = divides(method, budget)
    if budget is None or not (own or budget.stagger > 1):
        return [budget] * layers
    if method is not None and method.needs.scope == "model":
        raise BudgetError(f"{method.name} plans all layers at once, so they cannot have budgets or turns of their own.")
    found = _divided(method, budget, layers, prompt) if own else [budget] * layers
    return [in_turn(one, layer) for layer, one in enumerate(found)]


def divides(method: Method | None, budget: Budget | None) -> bool:
    """Return whether layers have tokens of their own, by the budget's shares or by the method."""
    return budget is not None and (bool(budget.layer_shares) or (method is not None and method.needs.layer_budgets))


def protected_tokens(budget: Budget, recent: int, prompt: int) -> int:
    """Return the tokens that every layer needs for what is protected, and one more beside a kept prompt.

    Args:
        budget: a budget of a number of tokens.
        recent: newest slots the method itself always keeps.
        prompt: tokens of the prompt, 0 while it is not known.
    """
    sinks, recent = budget.protected(recent)
    return max(sinks + recent, prompt + recent + 1 if budget.prompt == "keep" else 0)


def _divided(method: Method | None, budget: Budget, layers: int, prompt: int | None) -> list[Budget]:
    name, own = (method.name, method.needs.recent) if method is not None else ("layer_shares", 0)
    if isinstance(budget, Window):
        raise BudgetError(f"{name} divides tokens among layers, which a Window has none of; give it a Budget.")
    sinks, recent = budget.protected(own)
    least, protected = max(1, sinks + recent), f"{sinks} sinks and {recent} recent tokens"
    if budget.prompt == "keep" and prompt is not None:
        least = protected_tokens(budget, own, prompt)
        protected = f"a prompt of {prompt} tokens, {recent} recent ones and one more"
    if budget.layer_shares:
        if method is not None and method.needs.layer_budgets:
            raise BudgetError(f"{name} divides tokens among layers by itself; leave out layer_shares.")
        name, shares = "layer_shares", _shared(budget, own, layers, prompt or 0)
    elif method is not None:
        shares = list(method.layer_tokens(budget, layers, prompt or 0))
    for layer, tokens in enumerate(shares):
        if tokens < least:
            raise BudgetError(
                f"Of {budget.tokens} tokens, {name} leaves {tokens} to layer {layer + 1} of {layers}, which "
                f"cannot hold {protected}; raise tokens, or divide them more evenly."
            )
    # defaults that shrank with the budget stay what they are in every layer, however many tokens it has
    sinks, recent = budget.protected()
    return [replace(budget, tokens=tokens, sinks=sinks, recent=recent, layer_shares="") for tokens in shares]


def _shared(budget: Budget, recent: int, layers: int, prompt: int) -> list[int]:
    """Return the tokens of every layer by the budget's shares, which divide what is not protected.

    Layers of equal shares have equal budgets: vLLM gives every other budget a block table of its own.
    """
    if budget.layer_shares == CALIBRATED:
        raise BudgetError("The calibration's layer_shares are not known here; give them as numbers.")
    weights = [round(1000 * float(one)) for one in str(budget.layer_shares).split("/")]
    if len(weights) != layers:
        raise BudgetError(f"layer_shares has {len(weights)} numbers, and the model has {layers} bounded layers.")
    assert budget.tokens is not None  # a budget checks it
    common = max(1, protected_tokens(budget, recent, prompt))
    return [common + share for share in divide(layers * (budget.tokens - common), weights)]
