"""What is asked of devices: requests of a length, and how the devices share a model. Nothing here imports torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

from reasonkv.errors import ReasonKVError

_LONGEST = 2**24  # every compaction of a request is counted


class CapacityError(ReasonKVError, ValueError):
    """A load that no device can carry, or an unknown device; the message is one sentence."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is asked of the devices.

    Args:
        requests: Requests in all.
        length: Tokens of a request, its prompt among them; 32k is 32,768.
        prompt: Tokens of its prompt; 1k is 1,024.
        tensor_parallel: Devices that share every layer.
        pipeline_parallel: Stages of layers, one after the other.
        data_parallel: Copies of the whole, behind one router.
        reserve: Share of the memory that neither weights nor cache take: activations, graphs, other processes.
    """

    requests: int = 256
    length: str = "32k"
    prompt: str = "1k"
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    data_parallel: int = 1
    reserve: float = 0.1

    def __post_init__(self) -> None:
        for name in ("requests", "tensor_parallel", "pipeline_parallel", "data_parallel"):
            if getattr(self, name) < 1:
                raise CapacityError(f"{name} must be a whole number of at least 1, not {getattr(self, name)}.")
        if not 0 <= self.reserve < 1:
            raise CapacityError(f"reserve must be a share of the memory, at least 0 and below 1, not {self.reserve}.")
        if not amount(self.prompt, "prompt") < amount(self.length, "length"):
            raise CapacityError(
                f"A request of {self.length} tokens cannot have a prompt of {self.prompt}; lower prompt."
            )


def amount(text: str, name: str) -> int:
    """Return the whole number that "32768", "32k" or "1m" says; k is 1,024.

    Raises:
        CapacityError: it is none, or out of range.
    """
    found = re.fullmatch(r"(\d{1,9})([km]?)", text.strip().lower())
    tokens = int(found[1]) * {"": 1, "k": 2**10, "m": 2**20}[found[2]] if found else 0
    if not 1 <= tokens <= _LONGEST:
        raise CapacityError(f"{name} must be 1 to 16m tokens, a whole number such as 32768 or 32k, not {text[:40]!r}.")
    return tokens
