"""What a bounded cache may hold: the budget, its validation, and its bytes.

Everything here is integers. `tokens` counts *slots per KV head and layer*; what else is held on top of it (the
prompt, the interval between two events) is spelled out by the fields, so that two results can be compared at equal
physical length.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

PromptPolicy = Literal["count", "keep", "on_top"]
Trigger = Literal["occupancy", "grid"]
TriggerCounts = Literal["all", "decode"]
CutPrompt = Literal["prefill", "first_event"]


class BudgetError(ValueError):
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

    def to_dict(self) -> dict[str, Any]:
        """Every field, for records and manifests."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Budget:
        """The inverse of `to_dict`; unknown fields are an error, so that an old record is never misread."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(data) - known)
        if unknown:
            raise BudgetError(f"Unknown budget fields: {', '.join(unknown)}.")
        return cls(**data)


def slot_bytes(key_dim: int, value_dim: int, element_size: int, state_bytes: int = 0) -> int:
    """Bytes of one slot of one KV head: key, value, and the state a method keeps beside them.

    Args:
        key_dim: width of a key.
        value_dim: width of a value.
        element_size: bytes per element of keys and values.
        state_bytes: bytes of bookkeeping per slot (positions, counts, method state).

    """
    return (key_dim + value_dim) * element_size + state_bytes
