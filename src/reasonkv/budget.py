"""What a bounded cache may hold: the budget, its validation, and its bytes.

Everything here is integers. `tokens` counts *slots per KV head and layer*; what else is held on top of it (the
prompt, the interval between two events) is spelled out by the fields, so that two results can be compared at equal
physical length. `Window` is the budget of sliding-window compression, which bounds a rate and not a length.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from reasonkv.errors import ReasonKVError

PromptPolicy = Literal["count", "keep", "on_top"]
Trigger = Literal["occupancy", "grid"]
TriggerCounts = Literal["all", "decode"]
CutPrompt = Literal["prefill", "first_event"]


class BudgetError(ReasonKVError, ValueError):
    """A budget that cannot be carried out; the message says which numbers clash and what to change."""


@dataclass(frozen=True)
class Budget:
    """Slots that stay after an event, per layer and KV head, and when events fall.

    Args:
        tokens: slots left after an event (plus the prompt's, with `prompt="on_top"`).
        interval: tokens between two events; the cache swings between `tokens` and `tokens + interval`.
        sinks: first tokens of a row that are never dropped (attention sinks; Xiao et al., 2024, section 3).
        recent: newest tokens that are never dropped.
        prompt: "count" - prompt tokens are compressible and inside `tokens`; "keep" - never dropped and inside
            `tokens`; "on_top" - never dropped and not counted.
        trigger: "occupancy" - an event as soon as `tokens + interval` slots are held; "grid" - an event when the
            logical length is a multiple of `interval` and at least `tokens` slots are held (the papers' rule).
        trigger_counts: what the grid trigger counts as held: "all" slots, or the slots beyond the prompt's length
            ("decode").
        cut_prompt: "prefill" - a prompt longer than the budget is cut as soon as it is whole; "first_event" - not
            before the first token after it.
        prefill_chunk: also cut inside the prompt, at multiples of this logical length, so that the peak during a
            long prefill is bounded too (the prompt must be fed in pieces that end there).

    Raises:
        BudgetError: fields that contradict each other.

    """

    tokens: int
    interval: int = 128
    sinks: int = 4
    recent: int = 64
    prompt: PromptPolicy = "count"
    trigger: Trigger = "occupancy"
    trigger_counts: TriggerCounts = "all"
    cut_prompt: CutPrompt = "prefill"
    prefill_chunk: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("tokens", 1), ("interval", 1), ("sinks", 0), ("recent", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise BudgetError(f"{name} must be a whole number of at least {least}, not {value!r}.")
        for name, allowed in (
            ("prompt", PromptPolicy),
            ("trigger", Trigger),
            ("trigger_counts", TriggerCounts),
            ("cut_prompt", CutPrompt),
        ):
            value = getattr(self, name)
            if value not in get_args(allowed):
                raise BudgetError(f"{name} must be one of {', '.join(get_args(allowed))}, not {value!r}.")
        chunk = self.prefill_chunk
        if chunk is not None and (not isinstance(chunk, int) or isinstance(chunk, bool) or chunk < 1):
            raise BudgetError(f"prefill_chunk must be a whole number of at least 1, not {chunk!r}.")
        if chunk is not None and self.cut_prompt == "first_event":
            raise BudgetError("prefill_chunk cuts inside the prompt, so it needs cut_prompt='prefill'.")
        if self.trigger_counts == "decode" and self.trigger != "grid":
            raise BudgetError("trigger_counts='decode' belongs to trigger='grid'.")
        self.check_protected()

    def check_protected(self, *, recent: int = 0, sinks: int = 0, prompt_length: int | None = None) -> None:
        """Check that what may never be dropped fits, with a method's own window and a prompt's length.

        Args:
            recent: newest slots the method itself always keeps; the larger of it and `self.recent` counts, once.
            sinks: the same for first slots.
            prompt_length: tokens of the longest prompt, or None while it is not known.

        Raises:
            BudgetError: protected slots exceed `tokens`.

        """
        recent, sinks = max(recent, self.recent), max(sinks, self.sinks)
        if sinks + recent > self.tokens:
            raise BudgetError(
                f"A budget of {self.tokens} tokens cannot hold {sinks} sinks and {recent} recent tokens; "
                f"raise tokens to at least {sinks + recent}, or lower sinks or recent."
            )
        if self.prompt == "keep" and prompt_length is not None and prompt_length + recent >= self.tokens:
            raise BudgetError(
                f"prompt='keep' holds the whole prompt inside the budget, but a prompt of {prompt_length} tokens and "
                f"{recent} recent ones leave no room in {self.tokens} tokens; raise tokens above "
                f"{prompt_length + recent}, or use prompt='count' or 'on_top'."
            )

    @property
    def label(self) -> str:
        """What a cell is told apart by, for people."""
        return f"{self.tokens}"

    def to_dict(self) -> dict[str, Any]:
        """Every field, for records and manifests."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Budget:
        """The inverse of `to_dict`, for a `Window` too; unknown fields are an error, so no old record is misread.

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
    """The budget of sliding-window compression: every window of decoded tokens is cut once, and then frozen.

    The schedule of Kara (arXiv 2607.01237). The prompt is outside the scheme and never dropped. As soon as
    `size + buffer` decoded tokens are uncompressed, the oldest `size` of them keep `round(retention * size)` slots,
    which no later event touches; the newest `buffer` stay raw. So physical length is not capped: it grows by `tokens`
    slots for every `size` tokens. A forward that completes several windows cuts them together at its end, to as many
    slots as one by one.

    Every slot outside the window is protected at its event, so any method can choose inside it.

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
    size: int = 512
    buffer: int = 64
    retention: float = 0.3

    def __post_init__(self) -> None:
        for name, least in (("size", 2), ("buffer", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise BudgetError(f"A window's {name} must be a whole number of at least {least}, not {value!r}.")
        retention = self.retention
        if not isinstance(retention, (int, float)) or isinstance(retention, bool) or not 0 < retention < 1:
            raise BudgetError(f"A window's retention must lie between 0 and 1, not {retention!r}.")
        kept = round(retention * self.size)
        if not 1 <= kept < self.size:
            raise BudgetError(
                f"A retention of {retention:g} keeps {kept} of a window of {self.size} slots; "
                f"at least 1 must stay and at least 1 must go."
            )
        for name, value in (("tokens", kept), ("interval", self.size), ("recent", self.buffer)):
            object.__setattr__(self, name, value)  # derived fields of a frozen dataclass

    def check_protected(self, *, recent: int = 0, sinks: int = 0, prompt_length: int | None = None) -> None:
        """Check that the newest slots a method always keeps lie in the buffer; the prompt is protected in any case.

        Args:
            recent: newest slots the method itself always keeps.
            sinks: not used; first slots lie in the prompt.
            prompt_length: not used.

        Raises:
            BudgetError: the buffer is too small.

        """
        if recent > self.buffer:
            raise BudgetError(
                f"This method always keeps its newest {recent} slots, but the window's buffer holds {self.buffer}; "
                f"raise the buffer to at least {recent}."
            )

    @property
    def label(self) -> str:
        """Slots kept of each window."""
        return f"{self.tokens} of every {self.size}"

    @property
    def dropped(self) -> int:
        """Slots that an event drops of every window."""
        return self.size - self.tokens


@dataclass(frozen=True)
class ExplicitEventsWindow(Window):
    """A window whose events somebody else decides, such as a scheduler that compresses a few rows every so many steps.

    An event at logical length e cuts the `size` tokens before the newest `buffer`; what lies between two such windows
    stays raw for ever. The forward that reaches e must end there.

    Args:
        events: logical lengths of one row's events, ascending and at least `size` apart.

    Raises:
        BudgetError: fields that contradict each other.

    """

    events: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "events", tuple(self.events))  # a record gives a list
        if any(later - earlier < self.size for earlier, later in zip(self.events, self.events[1:], strict=False)):
            raise BudgetError(f"Two events of a row must be at least a window of {self.size} tokens apart.")


@dataclass(frozen=True)
class PeriodicWindow(Window):
    """A window whose events an engine decides by its steps: the periodic policy of KvLLM (arXiv 2607.01237).

    Every `period` steps, up to `most` of the rows that hold a window beyond their buffer are compressed, those with
    most uncompressed tokens first (`reasonkv.schedule.periodic_round`). No step then has more events than that, but
    when a row's fall depends on the other rows.

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
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise BudgetError(f"A periodic window's {name} must be a whole number, not {value!r}.")
        if self.period <= self.size or self.most < 1:
            raise BudgetError(
                f"A period must be longer than a window of {self.size} and compress at least 1 row, "
                f"not {self.period} steps and {self.most} rows."
            )

    def row(self) -> ExplicitEventsWindow:
        """One row's budget, before it has had an event."""
        return ExplicitEventsWindow(self.size, self.buffer, self.retention)


def slot_bytes(key_dim: int, value_dim: int, element_size: int, state_bytes: int = 0) -> int:
    """Bytes of one slot of one KV head: key, value, and the state a method keeps beside them.

    Args:
        key_dim: width of a key.
        value_dim: width of a value.
        element_size: bytes per element of keys and values.
        state_bytes: bytes of bookkeeping per slot (positions, counts, method state).

    """
    return (key_dim + value_dim) * element_size + state_bytes
