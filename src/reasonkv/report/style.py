"""Colour, marker and dash of every method: one assignment for every figure, so that a method looks the same everywhere.

A name of the catalogue has its style once and for all. Names it does not know take the next free one in the order
they are given; no hash is involved, so the same figure looks the same on every machine. Variants of one method
(`rkv`, `rkv:variant=vase`) share its colour and differ in marker and dash.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

FULL_COLOUR, FULL_DASH = "#666666", (6.0, 3.0)
"""Full KV is a line across the panel, not a method with marks."""


@dataclass(frozen=True)
class Style:
    """How a method is drawn."""

    colour: str
    marker: str  # o s ^ D v P X or *
    dash: tuple[float, ...] = ()  # lengths of dashes and gaps in line widths, in turn; empty for a solid line


# Okabe and Ito's palette without its yellow, which is too pale on white, and two that stay apart from it
_COLOURS = ("#E69F00", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#8A6D00", "#6B4C9A")
_MARKERS = ("s", "^", "D", "v", "P", "X", "o", "*")
_DASHES = ((), (5.0, 2.0), (1.2, 1.6), (7.0, 2.0, 1.2, 2.0), (3.0, 1.2))

_NAMES = (
    "streaming", "snapkv", "rkv", "keydiff", "knorm", "oracle", "triattention", "cask",
    "vase-attnv", "vase-dkv", "kara", "h2o", "tova", "curdkv", "chunkkv", "lagkv", "defensivekv", "beaconkv",
    "random-attention", "quest", "seer", "pyramidkv", "adakv", "importance", "forecast",
    "gkv", "lazyeviction", "raas", "cake", "keyformer", "nacl", "scissorhands", "sagekv", "rpc", "inertiakv",
    "ams", "d2o",
)  # fmt: skip
"""In the order of their places; a new name comes last."""


def _place(index: int) -> Style:
    """The style at a place: colours go round first; a second round has other markers and another dash."""
    turn, colour = divmod(index, len(_COLOURS))
    return Style(_COLOURS[colour], _MARKERS[(colour + turn) % len(_MARKERS)], _DASHES[turn % len(_DASHES)])


FIXED = {name: _place(index) for index, name in enumerate(_NAMES)} | {
    "random": Style("#000000", "o", (2.5, 1.8)),
    "expected": Style(_COLOURS[3], "s", _DASHES[1]),
}


def styles(methods: Sequence[str]) -> dict[str, Style]:
    """Return a style for every label; no two share colour and marker as long as there are some left."""
    names = list(dict.fromkeys(_name(label) for label in methods))
    others = [name for name in names if name not in FIXED]
    bases = {name: FIXED[name] if name in FIXED else _place(len(_NAMES) + others.index(name)) for name in names}
    found: dict[str, Style] = {}
    for label in dict.fromkeys(methods):
        base = bases[_name(label)]
        taken = [*found.values(), *(one for name, one in bases.items() if name != _name(label))]
        looks = {(one.colour, one.marker) for one in taken}
        free = [one for one in _variants(base) if one not in taken]
        found[label] = next((one for one in free if (one.colour, one.marker) not in looks), (free or [base])[0])
    return found


def _name(label: str) -> str:
    return label.partition(":")[0]


def _variants(base: Style) -> Iterable[Style]:
    """The style itself, then others of its colour."""
    yield base
    start = _MARKERS.index(base.marker)
    for turn in range(1, len(_MARKERS) * len(_DASHES)):
        marker = _MARKERS[(start + turn) % len(_MARKERS)]
        yield Style(base.colour, marker, _DASHES[(turn + turn // len(_MARKERS)) % len(_DASHES)])
