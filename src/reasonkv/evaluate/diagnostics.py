"""What was lost with the tokens a method evicted: measures of a replay, against the attention full KV pays there.

Fidelity says that a kept set was wrong, these say how. They need the trace's own future, so they belong to replay.
"""

from __future__ import annotations

from itertools import pairwise

from reasonkv.evaluate.cask_diagnostics import CaskDiagnostics, trace_means
from reasonkv.evaluate.fates import Fates, PlanRecorder, fates
from reasonkv.evaluate.reference import FullAttention
from reasonkv.plan import Plan
from reasonkv.view import SlotView

LOOKUP = 0.5
"""A token is looked up by a query that pays it more than this part of its attention."""


class Diagnostics:
    """An observer for `CompressedCache` that measures what every row's plans cost; rows must stay where they are."""

    def __init__(self, reference: FullAttention) -> None:
        self._reference = reference
        self._plans, self._cask = PlanRecorder(), CaskDiagnostics(reference)

    def __call__(self, layer: int, rows: list[int], view: SlotView, plan: Plan) -> None:
        """Take one layer's plan, before it is carried out."""
        self._plans(layer, rows, view, plan)
        self._cask(layer, rows, view, plan)

    def measures(self) -> list[dict[str, float]]:
        """Return every row's measures by name, once all is fed; those that do not exist are left out."""
        events = self._cask.events()
        found = []
        for row, tokens in enumerate(self._reference.lengths):
            own = [event for event in events if event.row == row]
            what_became = fates(self._plans.plans, tokens, row=row)
            means = trace_means(own) if own else {}
            known = {name: mean for name, mean in means.items() if mean is not None}
            found.append(lost_attention(self._reference, what_became, row) | known)
        return found


def lost_attention(reference: FullAttention, what_became: Fates, row: int) -> dict[str, float]:
    """Return how much of full KV's attention went to evicted tokens, mean over layers and KV heads.

    The intervals are those from one compaction to the next, the last to the trace's end. A merged token is not evicted.

    Returns:
        "lost_attention": attention that the queries of the intervals pay to tokens evicted by then, as a part of all
        they pay; "lost_lookups": of the older tokens looked up in an interval (`LOOKUP`, mean over the query heads of a
        KV head), counted once per interval, the part evicted by then. Without a compaction neither exists, without a
        lookup not the second.
    """
    edges = [*what_became.lengths_E, reference.lengths[row]]
    paid = lost = 0.0
    looked_up = missed = 0
    for place, layer in enumerate(what_became.layers):
        dropped_HN = what_became.dropped_GHN[place]
        for event, (start, end) in enumerate(pairwise(edges)):
            gone_HN = ((dropped_HN >= 0) & (dropped_HN <= event))[:, :end]
            received_HN = reference.received(layer, row, start, end).cpu()
            paid += float(received_HN.sum())
            lost += float(received_HN[gone_HN].sum())
            lookups_HN = reference.received(layer, row, start, end, "max").cpu()[:, :start] > LOOKUP
            looked_up += int(lookups_HN.sum())
            missed += int((lookups_HN & gone_HN[:, :start]).sum())
    if paid == 0.0:
        return {}
    return {"lost_attention": lost / paid} | ({"lost_lookups": missed / looked_up} if looked_up else {})
