"""The base of every error that this package raises on purpose."""

from __future__ import annotations


class ReasonKVError(Exception):
    """A mistake in what was asked for; the message is one sentence that says what to change."""
