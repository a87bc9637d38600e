"""BeaconKV: past queries that differ most from each other vote beside the newest ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from reasonkv.methods.base import Observed, Requirements, ScorerMethod
from reasonkv.methods.ops import attend, later_slots, upcast
from reasonkv.methods.options import Count, Size
from reasonkv.view import SlotView


@dataclass(frozen=True)
class BeaconKV(ScorerMethod):
    """Keep what a diverse set of past queries, or the newest ones, attend to (2026, "BeaconKV", arXiv 2609.04971).

    Every query head stores `beacons` past queries as they were before RoPE. When as many new ones have come, both are
    thinned to `beacons` again by farthest-point sampling on the cosine: first the query least like the others on
    average, then always the one farthest from those chosen. At a compaction the beacons are rotated to the newest
    position and the newest queries keep theirs. A slot's score is the maximum of the softmaxed attention over all
    of these queries and over the query heads of the group.

    The paper chooses the first beacons from the whole prompt. Here they are thinned at every multiple of `beacons`
    tokens, prompt included, so that they do not depend on how tokens are divided into forwards.

    Args:
        beacons: past queries stored per query head, and as many that wait to be compared.
        window: newest queries that vote beside the beacons.
        recent: newest tokens that are always kept.
    """

    beacons: Size = 16
    window: Size = 16
    recent: Count = 32

    @property
    def needs(self) -> Requirements:
        return Requirements(queries=self.window, recent=self.recent, rotary=True, observes=True)

    def new_row_state(self, rows: int, query_heads: int, head_dim: int, device: torch.device) -> dict[str, Tensor]:
        shape = (rows, query_heads, self.beacons, head_dim)
        return {name: torch.zeros(shape, device=device) for name in ("beacons", "waiting")}

    def observe(self, state: dict[str, Tensor], seen: Observed) -> None:
        """Let queries wait at their token index modulo `beacons`; when all places are taken, choose beacons anew."""
        assert seen.rotary is not None
        n, valid_Bq = self.beacons, seen.valid_Bq
        turn_Bq = seen.positions_Bq.div(n, rounding_mode="floor")
        first_B1 = turn_Bq.where(valid_Bq, torch.iinfo(torch.int64).max).amin(1, keepdim=True)
        turns = int((turn_Bq - first_B1).where(valid_Bq, -1).max()) + 1  # a row without tokens has none
        for turn in range(turns):
            row, column = (valid_Bq & (turn_Bq - first_B1 == turn)).nonzero(as_tuple=True)
            position = seen.positions_Bq[row, column]
            queries_mqD = upcast(seen.queries_BHqqD[row, :, column])
            state["waiting"][row, :, position % n] = seen.rotary.unrotate(queries_mqD, position[:, None]).float()
            is_last = position % n == n - 1
            row, position = row[is_last], position[is_last]
            if row.numel():
                waiting_mqnD = state["waiting"][row]
                chosen_mqnD = farthest(torch.cat([state["beacons"][row], waiting_mqnD], dim=2), n)
                is_first_m111 = (position < n)[:, None, None, None]
                state["beacons"][row] = torch.where(is_first_m111, waiting_mqnD, chosen_mqnD)

    def score(self, view: SlotView) -> Tensor:
        assert view.rotary is not None and view.queries_BHqTD is not None and view.query_positions_BT is not None
        newest_BqTD = upcast(view.queries_BHqTD)
        now_B1n = (view.length_B - 1)[:, None, None].expand(-1, 1, self.beacons)
        beacons_BqnD = view.rotary.rotate(view.row_state["beacons"].to(newest_BqTD.dtype), now_B1n)
        # Before there are beacons a sequence's newest query stands in for them.
        has_beacons_B111 = (view.length_B >= self.beacons)[:, None, None, None]
        beacons_BqnD = torch.where(has_beacons_B111, beacons_BqnD, newest_BqTD[:, :, -1:])
        queries_BqtD = torch.cat([beacons_BqnD, newest_BqTD], dim=2)
        positions_Bt = torch.cat([now_B1n[:, 0], view.query_positions_BT], dim=1)
        return attend(
            torch.unflatten(queries_BqtD, 1, (view.keys_BHND.shape[1], -1)),
            view.keys_BHND,
            view.scaling,
            lambda _, attention_rgtN: attention_rgtN.amax((1, 2)),
            later_BHTt=later_slots(view, positions_Bt),
        )


def farthest(points_XnD: Tensor, count: int) -> Tensor:
    """Return `count` of n points by farthest-point sampling on the cosine, for many sets at once: [..., count, D].

    First the point with the least mean similarity to all, then always the one whose similarity to the nearest chosen
    point is least. Of equals the first; a point that is not finite comes last.
    """
    unit_XnD = functional.normalize(points_XnD, dim=-1)
    cosine_Xnn = (unit_XnD @ unit_XnD.mT).nan_to_num(nan=2.0)  # more alike than anything
    n = cosine_Xnn.shape[-1]
    chosen_X1 = cosine_Xnn.mean(-1).argmin(-1, keepdim=True)
    chosen, nearest_Xn = [chosen_X1], torch.full_like(cosine_Xnn[..., 0], -2.0)
    taken_Xn = torch.zeros_like(nearest_Xn)
    for _ in range(count - 1):
        to_chosen_X1n = cosine_Xnn.gather(-2, chosen_X1[..., None].expand(*chosen_X1.shape, n))
        nearest_Xn = nearest_Xn.maximum(to_chosen_X1n.squeeze(-2))
        taken_Xn = taken_Xn.scatter(-1, chosen_X1, 4.0)  # above every similarity
        chosen_X1 = (nearest_Xn + taken_Xn).argmin(-1, keepdim=True)
        chosen.append(chosen_X1)
    index_Xc = torch.cat(chosen, dim=-1)
    return points_XnD.gather(-2, index_Xc[..., None].expand(*index_Xc.shape, points_XnD.shape[-1]))
