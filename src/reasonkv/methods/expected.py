"""Expected attention: what queries drawn from the distribution of past ones would attend to at the next positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from reasonkv.methods.base import OF_VARIANT, Observed, Requirements, ScorerMethod
from reasonkv.methods.moments import add_queries, expected_logits, mean_rotation, moments_of, rotated
from reasonkv.methods.ops import upcast
from reasonkv.methods.options import Count, Size
from reasonkv.view import SlotView

_TOKENS_AT_ONCE = 256  # of one forward's queries in float64
_STEPS_AT_ONCE = 8  # one step's queries cost as many operations as eight


@dataclass(frozen=True)
class ExpectedAttention(ScorerMethod):
    """Keep what future queries are expected to attend to, weighed by the value (Devoto et al., 2025, "Expected
    Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution", arXiv 2510.00636).

    1. Queries before RoPE are taken as normal with the mean mu and covariance S of those seen.
    2. Both are rotated by A, the mean rotation over the `future` positions that come next.
    3. Expected attention of a slot: softmax over slots of log E exp(q.k / sqrt D) = A mu.k / sqrt D + k.A S A'k / 2D.
    4. Times the norm of the value; mean over the query heads of a KV head.

    Args:
        variant: "corrected" - statistics of every query since the start, and the true next positions; "kvpress" - the
            same with the whole covariance, and the first `sinks` tokens are kept and stay outside the softmax (the
            authors' code); "cask" - statistics of the newest `window` queries without the first `sinks` of them, and
            the next position is the number of kept slots (the baseline in CASK's code).
        covariance: "bands" - within each rotary pair (dimensions without RoPE: their variances); "full" - all pairs
            of dimensions; "none" - the mean alone. Unless given: "bands" of "corrected", "full" of the others.
        future: positions averaged over.
        value_norm: multiply by the norm of the value.
        epsilon: added to the expected attention before the norm multiplies it, so that large values are kept.
        sinks: first tokens whose queries do not count, because they are unlike all others; see the variants.
        window: newest queries of "cask".
    """

    variants: ClassVar[dict[str, dict[str, object]]] = {
        "corrected": {"covariance": "bands"},
        "kvpress": {"covariance": "full"},
        "cask": {"covariance": "full"},
    }

    variant: Literal["corrected", "kvpress", "cask"] = "corrected"
    covariance: Literal["bands", "full", "none"] = OF_VARIANT
    future: Size = 512
    value_norm: bool = True
    epsilon: Annotated[float, Ge(0)] = 0.0
    sinks: Count = 4
    window: Size = 8

    @property
    def needs(self) -> Requirements:
        if self.variant == "cask":
            return Requirements(queries=self.window, recent=self.window, rotary=True)
        return Requirements(observes=True, observe_steps=_STEPS_AT_ONCE, rotary=True)

    def new_row_state(self, rows: int, query_heads: int, head_dim: int, device: torch.device) -> dict[str, Tensor]:
        """Return sums over queries, float64 (see the class)."""
        shapes: dict[str, tuple[int, ...]] = {"sum": (head_dim,)}
        if self.covariance == "full":
            shapes["products"] = (head_dim, head_dim)
        elif self.covariance == "bands":
            shapes |= {"squares": (head_dim,), "cross": (head_dim // 2,)}
        sums = {name: (rows, query_heads, *shape) for name, shape in shapes.items()} | {"seen": (rows,)}
        return {name: torch.zeros(shape, dtype=torch.float64, device=device) for name, shape in sums.items()}

    def observe(self, state: dict[str, Tensor], seen: Observed) -> None:
        """Add the queries of one forward; those of padding and of the first `sinks` tokens do not count."""
        assert seen.rotary is not None
        for queries_BqtD, positions_Bt, valid_Bt in zip(
            torch.split(seen.queries_BHqqD, _TOKENS_AT_ONCE, 2),
            torch.split(seen.positions_Bq, _TOKENS_AT_ONCE, 1),
            torch.split(seen.valid_Bq, _TOKENS_AT_ONCE, 1),
            strict=True,
        ):
            add_queries(state, queries_BqtD, positions_Bt, valid_Bt & (positions_Bt >= self.sinks), seen.rotary)

    def score(self, view: SlotView) -> Tensor:
        """Return scores by steps 2 to 4."""
        assert view.rotary is not None
        B, H, N = view.positions_BHN.shape
        is_cask = self.variant == "cask"
        sums = self._window_sums(view) if is_cask else view.row_state
        start_B = torch.full_like(view.length_B, N) if is_cask else view.length_B
        moments = rotated(moments_of(sums, view.rotary), mean_rotation(view.rotary, start_B, self.future))
        keys_BHND = view.rotary.canonical(view.keys_BHND)
        logits_BHgN = expected_logits(keys_BHND, moments, view.scaling).view(B, H, -1, N)
        if (mass_BHN := view.state.get("log_mass")) is not None:  # stored by a method that scores with this one
            logits_BHgN = logits_BHgN + mass_BHN[:, :, None]
        is_sink_BHN = view.positions_BHN < (0 if self.variant == "corrected" else self.sinks)
        scores_BHN = logits_BHgN.masked_fill(is_sink_BHN[:, :, None], float("-inf")).softmax(-1).mean(2)
        if self.value_norm:
            scores_BHN = (scores_BHN + self.epsilon) * upcast(view.values_BHND).norm(dim=-1)
        scores_BHN = scores_BHN.masked_fill(is_sink_BHN, 0.0)
        return torch.where(is_sink_BHN, scores_BHN.amax(-1, keepdim=True) + 1.0, scores_BHN)

    def _window_sums(self, view: SlotView) -> dict[str, Tensor]:
        assert view.queries_BHqTD is not None and view.query_positions_BT is not None and view.rotary is not None
        B, Hq, T, D = view.queries_BHqTD.shape
        sums = self.new_row_state(B, Hq, D, view.queries_BHqTD.device)
        first = self.sinks if self.sinks < T else 0
        positions_Bt = view.query_positions_BT[:, first:]
        is_counted_Bt = torch.ones_like(positions_Bt, dtype=torch.bool)
        add_queries(sums, view.queries_BHqTD[:, :, first:], positions_Bt, is_counted_Bt, view.rotary)
        return sums
