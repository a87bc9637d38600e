"""Colour, marker and dash of every method, for the script that draws figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reasonkv.report.style import styles

_LINE_WIDTH = 1.6  # dashes are given in line widths, the script counts pixels


def marks(methods: Sequence[str]) -> list[dict[str, Any]]:
    """One {label, colour, marker, dash} per method, in their order, as `style.styles` assigns them.

    Args:
        methods: labels of bounded methods.
    """
    return [
        {
            "label": label,
            "colour": style.colour,
            "marker": style.marker,
            "dash": " ".join(f"{_LINE_WIDTH * length:.3g}" for length in style.dash),
        }
        for label, style in styles(methods).items()
    ]
