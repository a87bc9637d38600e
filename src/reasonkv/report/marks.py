"""Colour, marker and dash of every method, for the script that draws figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Okabe and Ito's palette, then others that stay apart from it
_COLOURS = ("#E69F00", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#8A6D00", "#6B4C9A")
_MARKERS = ("s", "^", "D", "v", "P", "X", "o", "*")
_RANDOM = {"colour": "#000000", "marker": "o", "dash": "5 3"}


def marks(methods: Sequence[str]) -> list[dict[str, Any]]:
    """One {label, colour, marker, dash} per method, in their order; random is the same everywhere.

    Args:
        methods: labels of bounded methods.
    """
    others = [one for one in methods if one != "random"]
    return [
        {
            "label": one,
            **(
                _RANDOM
                if one == "random"
                else {
                    "colour": _COLOURS[others.index(one) % len(_COLOURS)],
                    "marker": _MARKERS[others.index(one) % len(_MARKERS)],
                    "dash": "",
                }
            ),
        }
        for one in methods
    ]
