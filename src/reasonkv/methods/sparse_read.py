"""Selection methods: every slot stays, and each query reads a few pages of them.

They evict nothing, so they make no plan: bytes held are full KV's (and a little more, the pages' summaries), and the
budget's `tokens` are slots *read* per decoded token, with `prompt="on_top"` as many more as the prompt has tokens: what
an evicting method may hold, and so read, at the same budget. A page is `page_size` consecutive tokens of a row, the
first of them at a multiple of `page_size`. It is summarised once, when it is full; the page that a query's own token
stands in is always read. So what a query reads depends on the tokens before it alone, not on the pieces they were fed
in.

Legend: B rows, H KV heads, g query heads per KV head, Hq = H x g, q query tokens, P full pages, c tokens of a page,
D head_dim, n pages summarised together.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from reasonkv.methods.base import Method, Requirements
from reasonkv.methods.options import Count, Size
from reasonkv.plan import Plan, PlanError
from reasonkv.rotary import Rotary
from reasonkv.view import SlotView

Parameters = Mapping[str, Tensor]
"""What a method brings along for one layer, by name."""


class Prepared(NamedTuple):
    """What a selection method works with on one model.

    Args:
        page_size: tokens of a page.
        layers: parameters of every layer of the model, or None for a method without any.

    """

    page_size: int
    layers: Sequence[Parameters] | None = None


@dataclass(frozen=True)
class FullPages:
    """Pages that have just become full, of any rows.

    Args:
        keys_nHcD: their rotated keys.
        first_n: int64, token index of each page's first token.
        parameters: of the layer, or None.
        rotary: how the keys were rotated; None unless the method's `Requirements` ask for it.

    """

    keys_nHcD: Tensor
    first_n: Tensor
    parameters: Parameters | None = None
    rotary: Rotary | None = None


@dataclass(frozen=True)
class PageView:
    """What a method may look at when it chooses, for one layer.

    Args:
        state: the summaries of full pages, [B, H, P, ...] each; of pages a row has not filled yet, zeros.
        queries_BHqqD: rotated queries of all query heads.
        positions_Bq: int64, their token indices; of padding, whatever stands there.
        page_size: tokens of a page.
        parameters: of the layer, or None.
        rotary: how queries and keys were rotated; None unless the method's `Requirements` ask for it.

    """

    state: Mapping[str, Tensor]
    queries_BHqqD: Tensor
    positions_Bq: Tensor
    page_size: int
    parameters: Parameters | None = None
    rotary: Rotary | None = None

    @property
    def pages(self) -> int:
        """Full pages P of the longest row."""
        return next(iter(self.state.values())).shape[2]

    @property
    def own_Bq(self) -> Tensor:
        """The page that each query's token stands in, int64; all pages before it are full."""
        return self.positions_Bq // self.page_size

    def queries_BHgqD(self) -> Tensor:
        """The queries by KV head and query head of its group."""
        B, Hq, q, D = self.queries_BHqqD.shape
        H = next(iter(self.state.values())).shape[1]
        return self.queries_BHqqD.view(B, H, Hq // H, q, D)


@dataclass(frozen=True)
class SelectionMethod(Method):
    """A method that keeps every slot and chooses what each query reads. Subclasses implement `summarise` and `score`.

    Args:
        first: first pages of a row that are always read.
        last: newest pages that are always read; 1 is the page of the query's own token.
        dense: first layers that read everything.

    """

    first: Count = 0
    last: Size = 1
    dense: Count = 0

    @property
    def needs(self) -> Requirements:
        """That queries read a part of the slots."""
        return Requirements(selects=True)

    @abstractmethod
    def prepare(self, model: PreTrainedModel) -> Prepared:
        """The size of pages, and the layers' parameters on the model's device; called once per cache."""

    @abstractmethod
    def summarise(self, pages: FullPages) -> dict[str, Tensor]:
        """What is stored of pages, by name: [n, H, ...] each; its bytes count as held, and as read by every query."""

    @abstractmethod
    def score(self, view: PageView) -> Tensor:
        """Scores of full pages, higher = read: float32 [B, H, q, P], or [B, Hq, q, P] if query heads choose alone.

        Entries of pages that are not full when the query comes are ignored, and so must not change any other entry.
        """

    def select(self, view: PageView, pages_B: Sequence[int]) -> Tensor:
        """Choose among the pages before each query's own.

        Args:
            view: one layer's queries and pages.
            pages_B: pages each row reads per head, the query's own included; at least `first + last`.

        Returns:
            bool [B, H or Hq, q, P]; a query's own page, which is read in any case, is left out.

        Raises:
            PlanError: a score is NaN.

        """
        number_P = torch.arange(view.pages, device=view.queries_BHqqD.device)
        own_Bq1 = view.own_Bq[..., None]
        before_B1qP = (number_P < own_Bq1)[:, None]
        always_B1qP = before_B1qP & ((number_P < self.first) | (number_P > own_Bq1 - self.last))[:, None]
        return best_pages(self.score(view), [pages - 1 for pages in pages_B], before_B1qP, always_B1qP)

    def plan(self, view: SlotView, keep: int) -> Plan:
        """All slots, whatever `keep` says: nothing is ever dropped, so no event asks."""
        B, H, N = view.positions_BHN.shape
        return Plan(torch.arange(N, device=view.positions_BHN.device).expand(B, H, N))


def best_pages(scores_BHqP: Tensor, pages_B: Sequence[int], allowed_B1qP: Tensor, forced_B1qP: Tensor) -> Tensor:
    """As many allowed pages with the highest scores as a row reads, or all where there are fewer; of equals the newer.

    Args:
        scores_BHqP: scores; what stands at pages that are not allowed is ignored.
        pages_B: how many in each row, at least the forced ones.
        allowed_B1qP: bool, pages there are.
        forced_B1qP: bool, allowed pages that are chosen whatever their score.

    Returns:
        bool, in the shape of the scores.

    Raises:
        PlanError: the score of an allowed page is NaN.

    """
    least, most = torch.finfo(scores_BHqP.dtype).min, torch.finfo(scores_BHqP.dtype).max
    # an accelerator would have to be waited for at every step, so only a CPU is asked; elsewhere a NaN chooses nothing
    if scores_BHqP.device.type == "cpu" and bool((scores_BHqP.isnan() & allowed_B1qP).any()):
        raise PlanError("A page's score is NaN, so the pages have no order.")
    P = scores_BHqP.shape[-1]
    if min(pages_B) >= P:
        return allowed_B1qP.expand(scores_BHqP.shape)
    if max(pages_B) == 0:
        return torch.zeros_like(scores_BHqP, dtype=torch.bool)
    scores = scores_BHqP.clamp(least, most).masked_fill(forced_B1qP, float("inf"))
    scores = scores.masked_fill(~allowed_B1qP, float("-inf"))
    # everything above the smallest chosen score, and as many of its equals as there is room for, newest first
    count_B111 = torch.tensor(pages_B, device=scores.device).clamp(max=P)[:, None, None, None]
    best = scores.topk(min(max(pages_B), P), dim=-1).values
    cut = best.gather(-1, (count_B111 - 1).clamp(min=0).expand(*scores.shape[:-1], 1))
    above, equal = scores > cut, scores == cut
    room = count_B111 - above.sum(-1, keepdim=True)
    rank = equal.flip(-1).cumsum(-1).flip(-1)
    return (above | (equal & (rank <= room))) & allowed_B1qP
