"""How outputs are written: sampling, what ends an output, and how the traces of a replay are made."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, Self

from reasonkv.errors import ReasonKVError

_RANGES = (
    ("temperature", 0.0, sys.float_info.max, True),
    ("top_p", 0.0, 1.0, False),
    ("min_p", 0.0, 1.0, True),
    ("repetition_penalty", 0.0, sys.float_info.max, False),
)
"""Fields of `Sampling` with their least and largest values, and whether the least is allowed."""


class JobError(ReasonKVError, ValueError):
    """A job whose fields contradict each other or are out of range; the message is one sentence."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn, and what ends an output before its limit.

    Args:
        temperature: 0 is greedy. Unless given, 0.
        top_p: Nucleus: share of probability that may be drawn from, above 0 and at most 1. Unless given, 0.95.
        top_k: Draw from so many most likely tokens. Unless given, from all.
        min_p: Leave out tokens that are less likely than this share of the most likely one, from 0 to 1.
        repetition_penalty: Divide the positive logits of tokens that the prompt or the output holds by this number,
            and multiply negative ones. Unless given, 1.
        stop: Text that ends an output and is cut off; give the option again for another one.
        think_budget: Most tokens of thinking; then the text that ends thinking is forced.
        preset: published - what is not given comes from the model's authors, or from the file of the task.

    Raises:
        JobError: out of range.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop: tuple[str, ...] = ()
    think_budget: int | None = None
    preset: Literal["published"] | None = None

    USUAL: ClassVar[Mapping[str, float]] = {"temperature": 0.0, "top_p": 0.95}

    def __post_init__(self) -> None:
        stop: Any = self.stop
        object.__setattr__(self, "stop", (stop,) if isinstance(stop, str) else tuple(stop))
        if self.preset is None:
            for name, value in self.USUAL.items():
                if getattr(self, name) is None:
                    object.__setattr__(self, name, value)
        check_choice("preset", self.preset, (None, "published"))
        for name, low, high, includes_low in _RANGES:
            value = getattr(self, name)
            if (value is not None and not (low <= value if includes_low else low < value)) or not (value or 0) <= high:
                above = "at least" if includes_low else "above"
                most = "" if high == sys.float_info.max else f" and at most {high:g}"
                raise JobError(f"{name} must be a number {'of ' * includes_low}{above} {low:g}{most}, not {value!r}.")
        for name in ("top_k", "think_budget"):
            if getattr(self, name) is not None:
                check_least(name, getattr(self, name))
        if "" in self.stop:
            raise JobError("A stop text must have at least one character.")

    @property
    def draws(self) -> bool:
        """Whether tokens are drawn at random."""
        return self.preset is not None or bool(self.temperature)

    def filled(self, published: Mapping[str, float]) -> Self:
        """Return these settings with what is not given taken from published values."""
        given = {name: value for name, value in published.items() if getattr(self, name) is None}
        return replace(self, preset=None, **given)  # type: ignore[arg-type]

    def stopping(self, texts: Sequence[str]) -> Self:
        """Return these settings with further stop texts, such as a task's own."""
        return replace(self, stop=tuple(dict.fromkeys((*self.stop, *texts)))) if texts else self

    def to_dict(self) -> dict[str, Any]:
        """Return what manifests say: fields without a default, and those that are set."""
        given = {one.name: getattr(self, one.name) for one in fields(self)}
        return {
            one.name: list(given[one.name]) if one.name == "stop" else given[one.name]
            for one in fields(self)
            if one.name in self.USUAL or given[one.name] != one.default
        }


@dataclass(frozen=True, kw_only=True)
class TraceSettings(Sampling):
    """How the traces of a replay are made; a results folder belongs to these settings.

    Args:
        source: greedy or sampled generation by full KV, the task's own reference text, or a file with prompts and
            outputs of any engine (FILE.jsonl), which are replayed instead of a task.
        max_new_tokens: Most output tokens of a trace that is written here.
        temperature: Of sampled traces, above 0. Unless given, 0.6.

    Raises:
        JobError: out of range.
    """

    source: str = "greedy"
    max_new_tokens: int = 2048

    USUAL: ClassVar[Mapping[str, float]] = {"temperature": 0.6, "top_p": 0.95}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.is_file:
            known = ("greedy", "sampled", "reference", "or a file such as FILE.jsonl")
            check_choice("traces", self.source, known)
        check_least("max_new_tokens", self.max_new_tokens)
        if self.temperature == 0:
            raise JobError("A sampled trace needs a temperature above 0; for greedy traces choose source='greedy'.")
        if self.preset and self.source != "sampled":
            raise JobError("Published sampling is for sampled traces; choose source='sampled' (--traces sampled).")

    @property
    def is_file(self) -> bool:
        """Whether the traces come from a file."""
        return "." in self.source or "/" in self.source

    def to_dict(self) -> dict[str, Any]:
        """Return what manifests say."""
        return super().to_dict() | {"source": self.source, "max_new_tokens": self.max_new_tokens}

    @property
    def sampling(self) -> Sampling:
        """How `decode_batch` draws the tokens of a trace."""
        own = {one.name: getattr(self, one.name) for one in fields(Sampling)}
        return Sampling(**own if self.source == "sampled" else own | {"temperature": 0.0})


def check_least(name: str, value: int, most: int = 2**31 - 1) -> None:
    """Raise unless a value is a whole number from 1 to `most`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise JobError(f"{name} must be a whole number of at least 1, not {value!r}.")
    if value > most:
        raise JobError(f"{name} must be at most {most:,}.")


def check_choice(name: str, value: str | None, allowed: Sequence[str | None]) -> None:
    """Raise unless a value is one of those allowed."""
    if value not in allowed:
        raise JobError(f"{name} must be one of {', '.join(filter(None, allowed))}, not {value!r}.")
