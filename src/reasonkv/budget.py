"""What a bounded cache may hold: integers alone.

`tokens` counts slots per KV head and layer. What is held on top of it (the prompt, the interval between two
compactions) is spelled out by the fields, so that two results can be compared at equal physical length. `keep` is a
share of the logical length instead, and `Window` the budget of sliding-window compression.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from fractions import Fraction
from functools import cached_property
from typing import Any, get_args

from reasonkv.budget_fields import BudgetFields as BudgetFields
from reasonkv.budget_fields import CutPrompt as CutPrompt
from reasonkv.budget_fields import PromptPolicy as PromptPolicy
from reasonkv.budget_fields import Trigger as Trigger
from reasonkv.budget_fields import TriggerCounts as TriggerCounts
from reasonkv.errors import BudgetError as BudgetError
from reasonkv.numbers import layer_shares, share_of_one, whole_number, whole_numbers

_CHOICES = {"prompt": PromptPolicy, "trigger": Trigger, "trigger_counts": TriggerCounts, "cut_prompt": CutPrompt}
_LEAST = {"tokens": 1, "interval": 1, "sinks": 0, "recent": 0, "prefill_chunk": 1, "stagger": 1, "early": 0}
_OMITTED = {"keep": None, "stagger": 1, "early": 0, "layer_shares": ""}  # written only where they are something else
_SINKS, _RECENT = 4, 64  # defaults, which shrink where they do not fit


@dataclass(frozen=True)
class Budget:
    """Slots kept by a compaction, per layer and KV head, and when compactions run.

    Args:
        tokens: slots kept, beside the prompt's with `prompt="on_top"`.
        interval: tokens between two compactions; the cache swings between `tokens` and `tokens + interval`.
        sinks: first tokens that are never evicted (attention sinks; Xiao et al., 2024, section 3).
        recent: newest tokens that are never evicted. The defaults of both shrink where `tokens` cannot hold them: to
            half of `tokens` and at most an eighth.
        prompt: "on_top" - prompt tokens are never evicted and not counted; "count" - they are evicted like others and
            are inside `tokens`; "keep" - never evicted and inside `tokens`.
        trigger: "occupancy" - compact as soon as `tokens + interval` slots are held; "grid" - compact when the logical
            length is a multiple of `interval` and at least `tokens` slots are held (the papers' rule).
        trigger_counts: what the grid trigger counts as held: "all" slots, or the slots beyond the prompt's length
            ("decode").
        cut_prompt: "prefill" - a prompt longer than the budget is compacted as soon as it is whole; "first_event" - not
            before the first token after it.
        prefill_chunk: also compact inside the prompt, at multiples of this logical length, so that the peak during a
            long prefill is bounded, too (the prompt must be fed in chunks that end there).
        keep: instead of `tokens`, the share of the logical length that is kept, between 0 and 1. The share counts what
            `tokens` would count: with `prompt="on_top"` the tokens after the prompt. It is rounded down, at least
            `sinks + recent` slots are kept, and the cache grows with the text.
        stagger: compact in so many turns, spread over the interval, so that no decode step waits for all: layers take
            turns in transformers, requests in vLLM. 1: all at once, as papers do.
        early: tokens by which the first compaction after the prompt comes early; what `stagger` gives each turn.
        layer_shares: what each bounded layer gets of the slots that are not protected, relative to the others: numbers,
            a text such as "0.5/1.5", or "calibrated", those of the model's calibration (`reasonkv calibrate
            --layer-shares`). They count in thousandths, and the layers' budgets sum to as many tokens as without.

    Raises:
        BudgetError: fields of the wrong type, or that contradict each other.
    """

    tokens: int | None = None
    interval: int = 128
    sinks: int = _SINKS
    recent: int = _RECENT
    prompt: PromptPolicy = "on_top"
    trigger: Trigger = "occupancy"
    trigger_counts: TriggerCounts = "all"
    cut_prompt: CutPrompt = "prefill"
    prefill_chunk: int | None = None
    keep: float | None = None
    stagger: int = 1
    early: int = 0
    layer_shares: str | Sequence[float] = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layer_shares", layer_shares(self.layer_shares))
        if (self.tokens is None) == (self.keep is None):
            raise BudgetError("A budget needs either tokens, such as tokens=512, or a share, such as keep=0.25.")
        if self.keep is not None:
            object.__setattr__(self, "keep", share_of_one(self.keep, "keep"))
        for name, least in _LEAST.items():
            if getattr(self, name) is not None or name not in ("tokens", "prefill_chunk"):
                object.__setattr__(self, name, whole_number(getattr(self, name), name, least))
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if value not in get_args(allowed):
                raise BudgetError(f"{name} must be one of {', '.join(get_args(allowed))}, not {value!r}.")
        if self.prefill_chunk is not None and self.cut_prompt == "first_event":
            raise BudgetError("prefill_chunk compacts inside the prompt, so it needs cut_prompt='prefill'.")
        if self.trigger_counts == "decode" and self.trigger != "grid":
            raise BudgetError("trigger_counts='decode' belongs to trigger='grid'.")
        if self.stagger > self.interval or self.early >= self.interval or (self.stagger > 1 and self.early):
            raise BudgetError(
                f"stagger must be at most the interval of {self.interval}, early less than it, and only one is given."
            )
        if self.layer_shares and self.tokens is None:
            raise BudgetError("layer_shares divides a number of tokens among layers, so it needs tokens, not keep.")
        self.check_protected()

    def protected(self, recent: int = 0) -> tuple[int, int]:
        """Return how many first and how many newest slots no compaction evicts.

        Args:
            recent: newest slots the method itself always keeps; the larger of it and the budget's counts, once.
        """
        if self.tokens is None or self.sinks + max(self.recent, recent) <= self.tokens:
            return self.sinks, max(self.recent, recent)
        sinks = min(_SINKS, self.tokens // 8) if self.sinks == _SINKS else self.sinks
        return sinks, max(self.tokens // 2 if self.recent == _RECENT else self.recent, recent)

    def check_protected(self, *, recent: int = 0, prompt_length: int | None = None) -> None:
        """Check that what is never evicted fits, with a method's own window and a prompt's length.

        Args:
            recent: as in `protected`.
            prompt_length: tokens of the longest prompt, or None while it is not known.

        Raises:
            BudgetError: protected slots exceed `tokens`.
        """
        if self.tokens is None:
            return  # a share keeps at least what is protected
        sinks, recent = self.protected(recent)
        if sinks + recent > self.tokens:
            raise BudgetError(
                f"A budget of {self.tokens} tokens cannot hold {sinks} sinks and {recent} recent tokens; "
                f"raise tokens to at least {sinks + recent}, or lower sinks, recent or the method's window."
            )
        if self.prompt == "keep" and prompt_length is not None and prompt_length + recent >= self.tokens:
            raise BudgetError(
                f"prompt='keep' holds the whole prompt inside the budget, but a prompt of {prompt_length} tokens and "
                f"{recent} recent ones leave no room in {self.tokens} tokens; raise tokens above "
                f"{prompt_length + recent}, or use prompt='count' or 'on_top'."
            )

    @property
    def is_bounded(self) -> bool:
        """Physical length has a bound that does not depend on the logical length."""
        return self.keep is None

    @cached_property
    def ratio(self) -> Fraction:
        """`keep` as the fraction it was written as, so that slots are counted in integers: 0.1 is 1/10."""
        return Fraction(repr(self.keep))

    @property
    def label(self) -> str:
        """What tells this budget from others of a run: tokens, or the share."""
        return f"{self.tokens}" if self.keep is None else f"{100 * self.keep:g} %"

    def describe(self) -> str:
        """Return the budget in words."""
        kept = f"{self.tokens} tokens" if self.keep is None else f"{self.label} of the tokens"
        return kept + {"count": "", "keep": " with the prompt", "on_top": " and the prompt"}[self.prompt]

    def to_dict(self) -> dict[str, Any]:
        """Return every field, for records and manifests; `keep` and `stagger` only where they are given."""
        return {name: value for name, value in asdict(self).items() if _OMITTED.get(name, ...) != value}

    @classmethod
    def from_fields(cls, budget: Budget | int | None, given: Mapping[str, Any]) -> Budget | None:
        """Return a budget that is given whole, as tokens, or by its fields; None if nothing is given.

        Raises:
            BudgetError: it is given twice, or makes no sense.
            TypeError: a field that no budget has.
        """
        known = BudgetFields.__annotations__
        for name in given.keys() - known.keys():
            raise TypeError(f"unexpected keyword {name!r}; a budget takes {', '.join(known)}")
        if isinstance(budget, Budget) and not given:
            return budget
        if isinstance(budget, Budget) or (budget is not None and "tokens" in given):
            raise BudgetError(f"The budget is given twice; leave it out, or leave out {', '.join(given)}.")
        if budget is not None:
            return cls(**{"tokens": budget, **given})
        return cls(**given) if given else None

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Budget:
        """Return the inverse of `to_dict`, for a `Window` too; unknown fields are an error, so no record is misread.

        Raises:
            BudgetError: unknown fields, or derived ones that contradict the others.
        """
        kind: type[Budget] = Budget
        for field_name, one in (("retention", Window), ("events", ExplicitEventsWindow), ("period", PeriodicWindow)):
            kind = one if field_name in data else kind
        own = fields(kind)
        unknown = sorted(set(data) - {one.name for one in own})
        if unknown:
            raise BudgetError(f"Unknown budget fields: {', '.join(unknown)}.")
        made = kind(**{one.name: data[one.name] for one in own if one.init and one.name in data})
        derived = {one.name: getattr(made, one.name) for one in own if not one.init}
        wrong = [name for name, value in derived.items() if data.get(name, value) != value]
        if wrong:
            raise BudgetError(f"The fields {', '.join(wrong)} of a window follow from the others, but differ here.")
        return made


@dataclass(frozen=True)
class Window(Budget):
    """The budget of sliding-window compression: every window of decoded tokens is compacted once, and then frozen.

    The schedule of Kara (arXiv 2607.01237). The prompt is never evicted. As soon as `size + buffer` decoded tokens are
    uncompressed, the oldest `size` of them keep `round(retention * size)` slots, which no later compaction touches; the
    newest `buffer` stay raw. So physical length has no cap: it grows by `tokens` slots for every `size` tokens. A
    forward that completes several windows compacts them together at its end, to as many slots as one by one.

    Every slot outside the window is protected, so any method can choose inside it.

    Args:
        size: tokens of a window. The published grid is 256, 384 and 512.
        buffer: newest tokens that stay raw. The published grid is 32 and 64.
        retention: share of a window's slots that stay. Published: 0.2 to 0.6.

    The other fields are what a budget's readers expect, and follow from these three: `tokens` slots stay of every
    window, windows come every `interval = size` tokens, `recent = buffer` tokens are never dropped, `prompt` is on top,
    `sinks` is 0.

    Raises:
        BudgetError: fields that contradict each other.
    """

    tokens: int = field(init=False, default=0)
    interval: int = field(init=False, default=0)
    sinks: int = field(init=False, default=0)
    recent: int = field(init=False, default=0)
    prompt: PromptPolicy = field(init=False, default="on_top")
    trigger: Trigger = field(init=False, default="occupancy")
    trigger_counts: TriggerCounts = field(init=False, default="all")
    cut_prompt: CutPrompt = field(init=False, default="prefill")
    prefill_chunk: int | None = field(init=False, default=None)
    keep: float | None = field(init=False, default=None)
    stagger: int = field(init=False, default=1)
    early: int = field(init=False, default=0)
    layer_shares: str | Sequence[float] = field(init=False, default="")
    size: int = 512
    buffer: int = 64
    retention: float = 0.3

    def __post_init__(self) -> None:
        for name, least in (("size", 2), ("buffer", 0)):
            object.__setattr__(self, name, whole_number(getattr(self, name), f"A window's {name}", least))
        object.__setattr__(self, "retention", share_of_one(self.retention, "A window's retention"))
        kept = round(self.retention * self.size)
        if not 1 <= kept < self.size:
            raise BudgetError(
                f"A retention of {self.retention:g} keeps {kept} of a window of {self.size} slots; "
                f"at least 1 must stay and at least 1 must go."
            )
        for name, value in (("tokens", kept), ("interval", self.size), ("recent", self.buffer)):
            object.__setattr__(self, name, value)  # derived fields of a frozen dataclass

    def check_protected(self, *, recent: int = 0, prompt_length: int | None = None) -> None:
        """Check that the newest slots a method always keeps lie in the buffer; the prompt is protected in any case.

        Raises:
            BudgetError: the buffer is too small.
        """
        if recent > self.buffer:
            raise BudgetError(
                f"This method always keeps its newest {recent} slots, but the window's buffer holds {self.buffer}; "
                f"raise the buffer to at least {recent}."
            )

    @property
    def is_bounded(self) -> bool:
        """Physical length grows with the text."""
        return False

    @property
    def label(self) -> str:
        """Slots kept of each window."""
        return f"{self.tokens} of every {self.size}"

    def describe(self) -> str:
        """Return the budget in words."""
        return f"{self.label} tokens"

    @property
    def dropped(self) -> int:
        """Slots that an event drops of every window."""
        return self.size - self.tokens


@dataclass(frozen=True)
class ExplicitEventsWindow(Window):
    """A window whose compactions somebody else decides, such as a scheduler that compacts a few rows at a time.

    One at logical length e compacts the `size` tokens before the newest `buffer`; the rest stays raw for ever. The
    forward that reaches e must end there.

    Args:
        events: logical lengths of one row's events, ascending and at least `size` apart.

    Raises:
        BudgetError: fields that contradict each other.
    """

    events: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "events", tuple(whole_numbers(self.events, "An event") or ()))  # a record gives a list
        if any(later - earlier < self.size for earlier, later in zip(self.events, self.events[1:], strict=False)):
            raise BudgetError(f"Two events of a row must be at least a window of {self.size} tokens apart.")


@dataclass(frozen=True)
class PeriodicWindow(Window):
    """A window compacted by an engine's steps: the periodic policy of KvLLM (arXiv 2607.01237).

    Every `period` steps, up to `most` of the rows that hold a window beyond their buffer are compacted, those with most
    uncompressed tokens first (`reasonkv.schedule.periodic_round`). When a row's turn comes depends on the others.

    Args:
        period: steps between two rounds, more than `size`, so that nothing is compressed twice.
        most: rows of a round.

    Raises:
        BudgetError: fields that contradict each other.
    """

    period: int = 1024
    most: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("period", "most"):
            object.__setattr__(self, name, whole_number(getattr(self, name), f"A periodic window's {name}"))
        if self.period <= self.size or self.most < 1:
            raise BudgetError(
                f"A period must be longer than a window of {self.size} and compress at least 1 row, "
                f"not {self.period} steps and {self.most} rows."
            )

    def row(self) -> ExplicitEventsWindow:
        """One row's budget, before it has had an event."""
        return ExplicitEventsWindow(self.size, self.buffer, self.retention)
