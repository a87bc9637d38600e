"""The base of every error that this package raises on purpose, and the error of budgets."""

from __future__ import annotations


class ReasonKVError(Exception):
    """A mistake in what was asked for; the message is one sentence that says what to change."""


class BudgetError(ReasonKVError, ValueError):
    """A budget that cannot be carried out; the message says which numbers clash and what to change."""
