"""The catalogue: built-in methods by name, and methods of other packages through the entry points `reasonkv.methods`.

Plain data that imports no torch, so that listing and completing names is fast.
"""

from __future__ import annotations

import difflib
from importlib.metadata import EntryPoint, entry_points
from typing import NamedTuple

from reasonkv.methods.options import MethodError


class Entry(NamedTuple):
    """One built-in method.

    Args:
        path: where its class is, "module:class".
        title: one line.
        paper: citation with its arXiv number, or "-".
        vllm: "yes", "no", or the option that lets vLLM run it, such as "mass=none".

    """

    path: str
    title: str
    paper: str
    vllm: str = "yes"


_HOME = "reasonkv.methods."
CATALOGUE = {
    "full": Entry(_HOME + "full:FullKV", "Every slot is kept; memory grows with the sequence", "-", "no"),
    "streaming": Entry(
        _HOME + "streaming:StreamingLLM", "Sinks and the newest tokens", "StreamingLLM, arXiv 2309.17453"
    ),
    "random": Entry(
        _HOME + "random:RandomEviction", "A uniformly random set per KV head", "Random Attention, arXiv 2609.03430"
    ),
    "knorm": Entry(_HOME + "knorm:Knorm", "The smallest key norms", "L2-norm strategy, arXiv 2406.11430"),
    "keydiff": Entry(_HOME + "keydiff:KeyDiff", "Keys that differ most from the mean key", "KeyDiff, arXiv 2504.15364"),
    "snapkv": Entry(_HOME + "snapkv:SnapKV", "Pooled attention of the newest queries", "SnapKV, arXiv 2404.14469"),
    "rkv": Entry(
        _HOME + "rkv:RKV", "Attention of the newest queries minus redundancy of keys", "R-KV, arXiv 2505.24133"
    ),
    "triattention": Entry(
        _HOME + "triattention:TriAttention",
        "Expected score under the mean query, from calibration",
        "TriAttention, arXiv 2604.04921",
    ),
    "expected": Entry(
        _HOME + "expected:ExpectedAttention",
        "Expected attention of future queries, times the value's norm",
        "Expected Attention, arXiv 2510.00636",
    ),
    "cask": Entry(
        _HOME + "cask:CASK",
        "Protected core by expected score, the rest folded into neighbours",
        "CASK, github.com/Skyline-23/CASK",
        "mass=none",
    ),
    "vase-attnv": Entry(
        _HOME + "vase_attnv:VaseAttnV", "The largest value ranges, and a sample by attention", "VaSE, arXiv 2606.03928"
    ),
    "vase-dkv": Entry(
        _HOME + "vase_dkv:VaseDKV",
        "Product of key and value norms under a random projection",
        "VaSE, arXiv 2606.03928",
    ),
    "kara": Entry(_HOME + "kara:Kara", "Chunks that a window attends to, in both directions", "Kara, arXiv 2607.01237"),
    "h2o": Entry(
        _HOME + "h2o:H2O",
        "Attention accumulated since a slot was written, and the newest",
        "H2O, arXiv 2306.14048",
        "no",
    ),
    "tova": Entry(_HOME + "tova:TOVA", "Attention of the newest query, one set per layer", "TOVA, arXiv 2401.06104"),
    "curdkv": Entry(
        _HOME + "curdkv:CurDKV",
        "Squared norms of key and value, relative to the neighbours",
        "CurDKV, arXiv 2509.15038",
    ),
    "chunkkv": Entry(
        _HOME + "chunkkv:ChunkKV",
        "Chunks of consecutive tokens, by the mean of another score",
        "ChunkKV, arXiv 2502.00299",
    ),
    "pyramidkv": Entry(
        _HOME + "pyramidkv:PyramidKV",
        "SnapKV with more slots in lower layers than in higher ones",
        "PyramidKV, arXiv 2406.02069",
        "no",
    ),
    "adakv": Entry(
        _HOME + "adakv:AdaKV",
        "One budget for all heads of a layer, shared by another method's scores",
        "Ada-KV, arXiv 2407.11550",
        "stretch=1.0",
    ),
    "lagkv": Entry(
        _HOME + "lagkv:LagKV",
        "Spread over channels, relative to the tokens that follow",
        "LagKV, arXiv 2504.04704",
    ),
    "defensivekv": Entry(
        _HOME + "defensivekv:DefensiveKV",
        "Largest attention of any recent query, times the value's output norm",
        "DefensiveKV, arXiv 2510.13334",
        "output_norm=false",
    ),
    "beaconkv": Entry(
        _HOME + "beaconkv:BeaconKV",
        "Largest attention of diverse past queries and the newest",
        "BeaconKV, arXiv 2609.04971",
    ),
    "random-attention": Entry(
        _HOME + "random_attention:RandomAttention",
        "The prompt, and a uniformly random set per KV head",
        "Random Attention, arXiv 2609.03430",
    ),
    "quest": Entry(
        _HOME + "quest:Quest",
        "Keeps all, reads the pages with the highest bound of q.k",
        "Quest, arXiv 2406.10774",
        "no",
    ),
    "seer": Entry(
        _HOME + "seer:SeerAttention",
        "Keeps all, reads the pages a trained gate expects to matter",
        "SeerAttention-R, arXiv 2506.08889",
        "no",
    ),
    "oracle": Entry(_HOME + "oracle:Oracle", "True future attention (a reference line)", "-", "no"),
}


def method_names() -> list[str]:
    """Return the names of the built-in methods, then of those that installed packages add."""
    return [*CATALOGUE, *sorted(installed())]


def installed() -> dict[str, EntryPoint]:
    """Return the entry points of methods of other packages by name."""
    return {point.name: point for point in entry_points(group="reasonkv.methods") if point.name not in CATALOGUE}


def known_name(name: str) -> str:
    """Return the name a method is registered under; "SnapKV", "snap_kv" and the class's name are understood.

    Raises:
        MethodError: no such method; the message names the nearest.

    """
    if name in CATALOGUE:
        return name
    spelled = {_plain(entry.path.split(":")[1]): known for known, entry in CATALOGUE.items()}
    spelled |= {_plain(known): known for known in CATALOGUE}
    found = spelled.get(_plain(name))
    if found is not None:
        return found
    added = installed()
    found = name if name in added else {_plain(known): known for known in added}.get(_plain(name))
    if found is None:
        raise MethodError(unknown("method", name, [*CATALOGUE, *sorted(added)]))
    return found


def unknown(kind: str, name: str, known: list[str]) -> str:
    """Return the sentence for a name that does not exist, with the nearest one that does."""
    nearest = difflib.get_close_matches(name.lower(), known, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else "."
    options = f" Known: {', '.join(known)}." if known else " It takes none."
    return f"Unknown {kind} {name!r}{hint}{options}"


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())
