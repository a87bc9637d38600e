"""Where two runtimes may drop different slots or say different tokens: only where a decision was nearly a tie.

A method decides by comparing scores. If moving every score by no more than half of `NEAR` of the scores' range changes
the plan, then two scores that it compared were closer than `NEAR` of that range; if none of the drawn moves changes it, none is taken to be.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import same_choice
import torch
from engines import Run
from torch import Tensor

from reasonkv.methods import Method, ScorerMethod
from reasonkv.methods.cask import CASK
from reasonkv.methods.kara import Kara
from reasonkv.methods.triattention import TriAttention
from reasonkv.methods.vase_attnv import VaseAttnV, sampling_keys
from reasonkv.view import SlotView

NEAR = 1e-5
"""Part of the scores' range within which a decision counts as nearly a tie."""
NEAR_LOGITS = 1e-3
"""The same for the two likeliest tokens, in logits."""
APART = 3e-5
"""What the two engines' keys and values differ by, at most, in float32."""
_DRAWS = 80


def first_apart(mine: list[int], theirs: list[int]) -> int | None:
    """Number of the first token that differs."""
    return next((at for at, (one, two) in enumerate(zip(mine, theirs, strict=True)) if one != two), None)


def check_agreement(mine: Run, theirs: Run, method: Method, asked: list[list[int]], identical: int) -> None:
    """As many requests as asked for agree throughout, and each other one until a decision that was nearly a tie."""
    assert mine.kept.keys() == theirs.kept.keys()
    same = 0
    for request, prompt in enumerate(map(len, asked)):
        keys = [key for key in theirs.kept if key[0] == request]  # layers of other budgets count their own events
        events = [(event, layer) for _, layer, event in sorted(keys, key=lambda key: int(theirs.views[key].length_B))]
        assert events, "a request without an event tests nothing"
        apart = [
            (event, layer)
            for event, layer in events
            if not torch.equal(mine.kept[request, layer, event], theirs.kept[request, layer, event])
        ]
        token = first_apart(mine.tokens[request], theirs.tokens[request])
        if not apart and token is None:
            same += 1
            continue
        event, layer = apart[0] if apart else (0, 0)
        # token t is said by the forward after which prompt + t tokens are in; its own event comes after attention
        if token is not None and (not apart or int(theirs.views[request, layer, event].length_B) >= prompt + token):
            assert theirs.margins[request][token] < NEAR_LOGITS, (request, token)
            continue
        view, other = theirs.views[request, layer, event], mine.views.get((request, layer, event))
        if other is not None:
            assert torch.equal(view.positions_BHN, other.positions_BHN)  # all before it was the same
            assert torch.equal(view.is_protected_BHN, other.is_protected_BHN)
            torch.testing.assert_close(view.keys_BHND, other.keys_BHND, atol=APART, rtol=0)
            torch.testing.assert_close(view.values_BHND, other.values_BHND, atol=APART, rtol=0)
        layers = [theirs.views[request, at, event] for at in range(3)] if method.needs.scope == "model" else [view]
        keep = theirs.kept[request, layer, event].shape[-1]
        assert decides_a_near_tie(method, layers, keep), (request, event, layer)
    assert same >= identical, same


def decides_a_near_tie(method: Method, layers: list[SlotView], keep: int) -> bool:
    """Some two scores that the plan of these layers compared are closer than `NEAR` of the scores' range."""
    plans = method.plan_layers(layers, keep)
    for draw in range(_DRAWS):
        again = nudged(method, draw).plan_layers(layers, keep)
        if any(not torch.equal(one.kept_BHK, two.kept_BHK) for one, two in zip(plans, again, strict=True)):
            return True
    return False


def nudged(method: Method, draw: int) -> Method:
    """The method with all that it compares moved a little, by numbers drawn from -1/2 to 1/2 times `NEAR` x range."""
    kind: Any = type(method)
    generator = torch.Generator().manual_seed(draw)

    def moves(scores: Tensor, is_open: Tensor) -> Tensor:
        """One move per score; the range is that of the open slots' finite scores."""
        counts = is_open & scores.isfinite()
        high = scores.masked_fill(~counts, -torch.inf).amax(-1, keepdim=True)
        low = scores.masked_fill(~counts, torch.inf).amin(-1, keepdim=True)
        spread = torch.where(high > low, high - low, 0.0)
        return (torch.rand(scores.shape, generator=generator, dtype=scores.dtype) - 0.5) * NEAR * spread * counts

    def moved(scores: Tensor, is_open: Tensor) -> Tensor:
        return scores + moves(scores, is_open)

    def slot_scores(self: Any, view: SlotView) -> Tensor:
        return moved(kind.score(self, view), ~view.is_protected_BHN)

    def window_scores(self: Any, view: SlotView, window_BHM: Tensor, filler_BHM: Tensor) -> Tensor:
        return moved(kind.score(self, view, window_BHM, filler_BHM), ~filler_BHM)

    def reduced_scores(self: Any, scores_BHN: Tensor, view: SlotView, keep: int) -> Any:
        is_open = ~view.is_protected_BHN[:, : scores_BHN.shape[1]]
        return kind._choose(self, moved(scores_BHN, is_open), view, keep)

    def magnitudes(self: Any, view: SlotView) -> Tensor:  # before they are rounded: longer and shorter values
        plain_BHn = kind.magnitudes(self, view)
        n = plain_BHn.shape[-1]
        change_BHn = moves(plain_BHn, ~view.is_protected_BHN[..., :n]) / plain_BHn
        values_BHND = view.values_BHND.clone()
        values_BHND[:, :, :n] *= (1 + change_BHn)[..., None]
        return kind.magnitudes(self, replace(view, values_BHND=values_BHND))

    def attention(self: Any, view: SlotView) -> Tensor:  # what is drawn by is its logarithm plus noise
        weights_BHn = kind.attention(self, view)
        n = weights_BHn.shape[-1]
        drawn_BHn = sampling_keys(weights_BHn, view.uniform_BHN()[..., :n])
        return weights_BHn * moves(drawn_BHn, ~view.is_protected_BHN[..., :n]).exp()

    def rows(self: Any, views: Any) -> Any:
        """Moves scores, and vectors whose cosines are compared: so little that cosines move by `NEAR` / 2 at most."""
        found = []
        for row in kind.rows(self, views):
            vectors_ND = torch.from_numpy(row.vectors_ND)
            way_ND = torch.randn(vectors_ND.shape, generator=generator, dtype=vectors_ND.dtype)
            way_ND *= vectors_ND.norm(dim=-1, keepdim=True) / way_ND.norm(dim=-1, keepdim=True)
            every = torch.ones_like(row.scores_MN, dtype=torch.bool)
            vectors = (vectors_ND + NEAR / 4 * way_ND).numpy()
            found.append(row._replace(scores_MN=moved(row.scores_MN, every), vectors_ND=vectors))
        return found

    def plan(self: Any, view: SlotView, keep: int) -> Any:  # of any other method: keys, values and queries are moved
        return kind.plan(self, same_choice.moved(view, generator), keep)

    changes: dict[type, dict[str, Callable[..., Any]]] = {
        ScorerMethod: {"score": slot_scores},
        Kara: {"score": window_scores},
        TriAttention: {"_choose": reduced_scores},
        VaseAttnV: {"magnitudes": magnitudes, "attention": attention},
        CASK: {"rows": rows},
    }
    own = next((functions for base, functions in changes.items() if isinstance(method, base)), {"plan": plan})
    made: Method = object.__new__(type(f"Nudged{kind.__name__}", (kind,), dict(own)))
    made.__dict__.update(vars(method))
    return made
