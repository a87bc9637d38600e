"""What a run tells while it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class Progress(Protocol):
    """Called after every decode step or chunk, and whenever a sequence ends."""

    def __call__(self, what: str, done: int, total: int, /, *, tokens: int = 0, right: float | None = None) -> None:
        """Show what is being done.

        Args:
            what: the task and the method.
            done, total: sequences that are done, and those there are.
            tokens: written or scored so far by this process.
            right: share of right answers among those that are done; None where answers are not graded.
        """


def silent(what: str, done: int, total: int, *, tokens: int = 0, right: float | None = None) -> None:
    """Show no progress."""


@dataclass
class Meter:
    """The progress of one method on one task; fields are the arguments of `show`."""

    show: Progress
    what: str
    total: int
    done: int = 0
    tokens: int = 0
    right: float | None = None

    def add(self, tokens: int) -> None:
        """Count tokens."""
        self.tokens += tokens
        self._show()

    def reach(self, done: int, right: float | None = None) -> None:
        """Set what is done, and the share of right answers in it."""
        self.done, self.right = done, right
        self._show()

    def _show(self) -> None:
        self.show(self.what, self.done, self.total, tokens=self.tokens, right=self.right)
