"""Selection methods: every slot is kept, and each query reads a few pages of them.

They evict nothing. The budget's `tokens` are slots *read* per decoded token, with `prompt="on_top"` as many more as the
prompt has tokens: what an evicting method may hold, and so read, at the same budget. A page is `page_size` consecutive
tokens, the first of them at a multiple of `page_size`. It is summarised once, when it is full; the page of a query's
own token is always read. So what a query reads depends on the tokens before it alone.

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
from reasonkv.methods.ops import forced_first, largest
from reasonkv.methods.options import Count, Size
from reasonkv.plan import Plan, PlanError
from reasonkv.rotary import Rotary
from reasonkv.view import SlotView

Parameters = Mapping[str, Tensor]
"""What a method brings along for one layer, by name."""


class Prepared(NamedTuple):
    """What a selection method works with on one model: tokens of a page, and the layers' parameters or None."""

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
        positions_Bq: int64, their token indices; of padding, anything.
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
        """The page of each query's token, int64; all pages before it are full."""
        return self.positions_Bq // self.page_size

    def queries_BHgqD(self) -> Tensor:
        """Return the queries by KV head and query head of its group."""
        return torch.unflatten(self.queries_BHqqD, 1, (next(iter(self.state.values())).shape[1], -1))


@dataclass(frozen=True)
class SelectionMethod(Method):
    """A method that keeps every slot and chooses what each query reads. Subclasses implement `summarise` and `score`.

    Args:
        first: first pages of a sequence that are always read.
        last: newest pages that are always read; 1 is the page of the query's own token.
        dense: first layers that read everything.
    """

    first: Count = 0
    last: Size = 1
    dense: Count = 0

    @property
    def needs(self) -> Requirements:
        return Requirements(selects=True)

    @abstractmethod
    def prepare(self, model: PreTrainedModel) -> Prepared:
        """Return the size of pages, and the layers' parameters on the model's device; called once per cache."""

    @abstractmethod
    def summarise(self, pages: FullPages) -> dict[str, Tensor]:
        """Return what is stored of pages, by name: [n, H, ...] each; its bytes count as held, and as read per query."""

    @abstractmethod
    def score(self, view: PageView) -> Tensor:
        """Return scores of full pages, higher = read: float32 [B, H, q, P], or [B, Hq, q, P] for query heads alone.

        Entries of pages that are not full when the query comes are ignored, and so must not change any other entry.
        """

    def select(self, view: PageView, pages_B: Sequence[int]) -> Tensor:
        """Choose among the pages before each query's own: bool [B, H or Hq, q, P].

        Args:
            view: one layer's queries and pages.
            pages_B: pages each row reads per head, the query's own included; at least `first + last`.

        Raises:
            PlanError: a score is NaN.
        """
        number_P = torch.arange(view.pages, device=view.queries_BHqqD.device)
        own_Bq1 = view.own_Bq[..., None]
        before_B1qP = (number_P < own_Bq1)[:, None]
        always_B1qP = before_B1qP & ((number_P < self.first) | (number_P > own_Bq1 - self.last))[:, None]
        return best_pages(self.score(view), [pages - 1 for pages in pages_B], before_B1qP, always_B1qP)

    def plan(self, view: SlotView, keep: int) -> Plan:
        """Return all slots, whatever `keep` says: nothing is ever evicted."""
        B, H, N = view.positions_BHN.shape
        return Plan(torch.arange(N, device=view.positions_BHN.device).expand(B, H, N))


def best_pages(scores_BHqP: Tensor, pages_B: Sequence[int], allowed_B1qP: Tensor, forced_B1qP: Tensor) -> Tensor:
    """Return the allowed pages with the highest scores, bool; of equals the newer.

    Args:
        scores_BHqP: scores; those of pages that are not allowed are ignored.
        pages_B: how many in each row, at least the forced ones and at most those there are.
        allowed_B1qP: bool, pages there are.
        forced_B1qP: bool, allowed pages that are chosen whatever their score.

    Raises:
        PlanError: the score of an allowed page is NaN.
    """
    # An accelerator would have to be waited for at every step, so only a CPU is asked; elsewhere a NaN chooses nothing.
    if scores_BHqP.device.type == "cpu" and bool((scores_BHqP.isnan() & allowed_B1qP).any()):
        raise PlanError("A page's score is NaN, so the pages have no order.")
    P = scores_BHqP.shape[-1]
    if min(pages_B) >= P:
        return allowed_B1qP.expand(scores_BHqP.shape)
    count_B111 = torch.tensor(pages_B, device=scores_BHqP.device).clamp(max=P)[:, None, None, None]
    scores = forced_first(scores_BHqP.clamp(min=torch.finfo(scores_BHqP.dtype).min), forced_B1qP)
    return largest(scores.masked_fill(~allowed_B1qP, float("-inf")), count_B111, max(pages_B)) & allowed_B1qP
