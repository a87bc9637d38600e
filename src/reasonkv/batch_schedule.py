"""Many rows of an engine on their way through their budgets, in arrays: what `schedule.step` says of each."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from reasonkv.budget import Budget
from reasonkv.schedule import Lengths, next_event, step

Integers = NDArray[np.int64]
_NEVER = np.iinfo(np.int64).max


class Event(NamedTuple):
    """One row's event at the end of a forward."""

    row: int  # which one, counted among the forward's
    before: Lengths  # its state before the forward
    held: int  # slots it holds until the event, the forward's among them
    after: Lengths  # its state after the event, which keeps `after.physical`


class BatchSchedule:
    """Many rows on their way through their budgets: of each it says what `step` says.

    Between two events of a row nothing but its length grows. So a forward of all rows is a few array operations, and
    `next_event` is asked once an event instead of once a token.

    Args:
        places: rows there can be at once; each has a place, from 0 on.
    """

    def __init__(self, places: int) -> None:
        self.budgets: list[Budget | None] = [None] * places
        self.prompts = [0] * places
        self._numbers = np.zeros((3, places), dtype=np.int64)
        self._lengths, self._held, self._boundaries = self._numbers
        self._peaks = [0] * places  # before the newest event

    def start(self, place: int, budget: Budget | None, state: Lengths) -> None:
        """A row begins; None is one without bound."""
        self._lengths[place], self._held[place], self.prompts[place] = state
        self._peaks[place] = 0
        self.set_budget(place, budget)

    def set_budget(self, place: int, budget: Budget | None) -> None:
        """From now on a row follows this one."""
        self.budgets[place] = budget
        boundary = next_event(budget, self.state(place))
        self._boundaries[place] = _NEVER if boundary is None else boundary

    def state(self, place: int) -> Lengths:
        """A row now."""
        return Lengths(int(self._lengths[place]), int(self._held[place]), self.prompts[place])

    def peak(self, place: int) -> int:
        """Most slots a row held at once so far, until its events among them."""
        return max(self._peaks[place], int(self._held[place]))

    def lengths(self, places_B: Integers) -> Integers:
        """Logical and physical lengths of some rows, [2, B]."""
        return self._numbers[:2, places_B]

    def advance(self, places_B: Integers, fed_B: Integers) -> list[Event]:
        """Feed so many tokens to each of some rows in one forward.

        Raises:
            BudgetError: as `step`.
        """
        now = self._numbers[:, places_B]
        grown = now[:2] + fed_B
        due = [(row, int(places_B[row])) for row in np.flatnonzero(grown[0] >= now[2]).tolist()]
        events = []
        for row, place in due:
            before = self.state(place)
            after, keep = step(self.budgets[place], before, int(fed_B[row]))
            if keep is not None:
                events.append(Event(row, before, int(grown[1, row]), after))
        self._numbers[:2, places_B] = grown
        for row, _, held, after in events:
            place = places_B[row]
            self._held[place], self._peaks[place] = after.physical, max(self._peaks[place], held)
        for _, place in due:
            self.set_budget(place, self.budgets[place])
        return events
