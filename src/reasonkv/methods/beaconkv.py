"""BeaconKV: past queries that differ most from each other vote beside the newest ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from reasonkv.methods.base import Observed, Requirements, ScorerMethod
from reasonkv.methods.ops import attention_blocks, upcast
from reasonkv.methods.options import Count, Size
from reasonkv.view import SlotView


@dataclass(frozen=True)
class BeaconKV(ScorerMethod):
    """Keep what a diverse set of past queries, or the newest ones, attend to (2026, "BeaconKV", arXiv 2609.04971).

    Every query head holds `beacons` past queries as they were before RoPE. When as many new ones have come, both are
    thinned to `beacons` again by farthest-point sampling on the cosine: first the query least like the others on
    average, then always the one farthest from those chosen. At an event the beacons are rotated to the newest
    position and the newest queries keep theirs. A slot's score is the maximum of the softmaxed attention over all
    of these queries and over the query heads of the group.

    The paper chooses the first beacons from the whole prompt and stops choosing near the cap, where it collects the
    newest queries instead. Here beacons are thinned at every multiple of `beacons` tokens, prompt included, so that
    they do not depend on the pieces tokens come in, and the newest queries stand in a ring of their own; some may be
    in both. The paper shrinks to 7/8 of the cap at an event: a budget with an interval of a seventh of its tokens.

    Args:
        beacons: past queries held per query head, and as many that wait to be compared.
        window: newest queries that vote beside the beacons.
        recent: newest tokens that always stay.

    """

    name: ClassVar[str] = "beaconkv"
    title: ClassVar[str] = "Largest attention of diverse past queries and the newest"
    paper: ClassVar[str] = "BeaconKV, arXiv 2609.04971"

    beacons: Size = 16
    window: Size = 16
    recent: Count = 32

    @property
    def needs(self) -> Requirements:
        """The newest queries in a ring, and every query once."""
        return Requirements(queries=self.window, recent=self.recent, rotary=True, observes=True)

    def new_row_state(self, rows: int, query_heads: int, head_dim: int, device: torch.device) -> dict[str, Tensor]:
        """Beacons and the queries since they were chosen, before RoPE, float32 [rows, Hq, beacons, D] each."""
        shape = (rows, query_heads, self.beacons, head_dim)
        return {name: torch.zeros(shape, device=device) for name in ("beacons", "waiting")}

    def observe(self, state: dict[str, Tensor], seen: Observed) -> None:
        """Let queries wait at their token index modulo `beacons`; when all places are taken, choose beacons anew."""
        n, valid_Bq = self.beacons, seen.valid_Bq
        turn_Bq = seen.positions_Bq.div(n, rounding_mode="floor")
        far = torch.iinfo(torch.int64).max
        first_B1 = turn_Bq.where(valid_Bq, far).amin(1, keepdim=True)
        turns = int((turn_Bq - first_B1).where(valid_Bq, -1).max()) + 1  # a row without tokens has none
        for turn in range(turns):
            here_Bq = valid_Bq & (turn_Bq - first_B1 == turn)
            row, column = here_Bq.nonzero(as_tuple=True)
            position = seen.positions_Bq[row, column]
            queries_mqD = upcast(seen.queries_BHqqD[row, :, column])
            state["waiting"][row, :, position % n] = seen.rotary.unrotate(queries_mqD, position[:, None]).float()
            complete = position % n == n - 1
            row, position = row[complete], position[complete]
            if row.numel() == 0:
                continue
            waiting_mqnD = state["waiting"][row]
            chosen_mqnD = farthest(torch.cat([state["beacons"][row], waiting_mqnD], dim=2), n)
            is_first_m = position < n
            state["beacons"][row] = torch.where(is_first_m[:, None, None, None], waiting_mqnD, chosen_mqnD)

    def score(self, view: SlotView) -> Tensor:
        """Maximum attention of beacons and newest queries, softmaxed over all slots, [B, H, N]."""
        assert view.rotary is not None and view.queries_BHqTD is not None and view.query_positions_BT is not None
        beacons_BqnD = view.row_state["beacons"].to(upcast(view.keys_BHND[:0]).dtype)
        now_B1n = (view.length_B - 1)[:, None, None].expand(-1, 1, self.beacons)
        beacons_BqnD = view.rotary.rotate(beacons_BqnD, now_B1n)
        # Before there are beacons a row's newest query stands in for them.
        has_B111 = (view.length_B >= self.beacons)[:, None, None, None]
        beacons_BqnD = torch.where(has_B111, beacons_BqnD, upcast(view.queries_BHqTD[:, :, -1:]))
        queries_BqtD = torch.cat([beacons_BqnD, upcast(view.queries_BHqTD)], dim=2)
        positions_Bt = torch.cat([now_B1n[:, 0], view.query_positions_BT], dim=1)
        return largest_attention(view, queries_BqtD, positions_Bt)


def farthest(points_XnD: Tensor, count: int) -> Tensor:
    """Farthest-point sampling on the cosine among n points, for many sets at once.

    First the point with the least mean similarity to all, then always the one whose similarity to the nearest chosen
    point is least. Of equals the first; a point that is not finite comes last.

    Args:
        points_XnD: sets of points, [..., n, D].
        count: points to choose, at most n.

    Returns:
        [..., count, D], in the order of the choice.

    """
    unit_XnD = functional.normalize(points_XnD, dim=-1)
    cosine_Xnn = (unit_XnD @ unit_XnD.mT).nan_to_num(nan=2.0)  # more alike than anything
    chosen_X1 = cosine_Xnn.mean(-1).argmin(-1, keepdim=True)
    chosen, nearest_Xn = [chosen_X1], torch.full_like(cosine_Xnn[..., 0], -2.0)
    taken_Xn = torch.zeros_like(nearest_Xn)
    for _ in range(count - 1):
        nearest_Xn = nearest_Xn.maximum(_line(cosine_Xnn, chosen_X1))
        taken_Xn = taken_Xn.scatter(-1, chosen_X1, 4.0)  # above every similarity
        chosen_X1 = (nearest_Xn + taken_Xn).argmin(-1, keepdim=True)
        chosen.append(chosen_X1)
    index_Xc = torch.cat(chosen, dim=-1)
    return points_XnD.gather(-2, index_Xc[..., None].expand(*index_Xc.shape, points_XnD.shape[-1]))


def largest_attention(view: SlotView, queries_BqtD: Tensor, positions_Bt: Tensor) -> Tensor:
    """Attention to every slot: softmax over all slots, causal, then the maximum over queries and the group.

    Args:
        view: one layer's slots.
        queries_BqtD: rotated queries of all query heads.
        positions_Bt: int64, where they stand.

    Returns:
        float32 (float64 for float64 keys) [B, H, N].

    """
    B, H, N, D = view.keys_BHND.shape
    queries_RgtD = queries_BqtD.reshape(B * H, -1, queries_BqtD.shape[2], D)
    # Slots ascend to the row's newest token: only as many of the newest as there are queries can come after one.
    newest_BHn = view.positions_BHN[..., max(0, N - positions_Bt.shape[1]) :]
    later_Rtn = (newest_BHn[:, :, None] > positions_Bt[:, None, :, None]).flatten(0, 1)
    largest_RN = torch.empty(B * H, N, dtype=queries_BqtD.dtype, device=queries_BqtD.device)
    keys_RND = view.keys_BHND.flatten(0, 1)
    for block, attention_RgtN in attention_blocks(queries_RgtD, keys_RND, view.scaling, later_Rtn):
        torch.amax(attention_RgtN, (1, 2), out=largest_RN[block])
    return largest_RN.view(B, H, N)


def _line(cosine_Xnn: Tensor, index_X1: Tensor) -> Tensor:
    """Row `index` of each matrix."""
    n = cosine_Xnn.shape[-1]
    return cosine_Xnn.gather(-2, index_X1[..., None].expand(*index_X1.shape, n)).squeeze(-2)
