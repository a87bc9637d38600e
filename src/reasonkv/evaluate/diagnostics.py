"""What was lost with the tokens a method evicted: measures of a replay, against the attention full KV pays there.

Fidelity says that a kept set was wrong, these say how. They need the trace's own future, so they belong to replay.

CASK's paper argues with the mass that its core and representatives hold, and with the dispersion of what it merges; its
code computes neither from attention. Here both come from the attention that full KV pays, in the trace, between one
compaction ("event") and the next. docs/methods/cask.md has the formulas.

Legend: H KV heads, L tokens seen, N slots before an event, K after it, n candidates, F rotary pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from reasonkv.calibration.horizon import future_distances
from reasonkv.evaluate.fates import Fates, PlanRecorder, fates
from reasonkv.evaluate.reference import FullAttention
from reasonkv.methods.cask import CaskPlan
from reasonkv.plan import Plan
from reasonkv.rotary import Rotary
from reasonkv.view import SlotView, TraceAttention

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


# -- what CASK merges -------------------------------------------------------------------------------------------------

MEASURES = (
    "evicted_mass", "lost_mass", "lost_mass_absolute", "kappa_dispersion", "kappa_dispersion_relative", "rho_core",
    "rho_rep",
)  # fmt: skip


@dataclass(frozen=True)
class CaskEvent:
    """One event of one row."""

    row: int  # of the batch
    event: int  # number of the row's event, from 0
    length: int  # tokens seen at the event
    until: int  # tokens seen at the next event, or the trace's end; the interval's queries are length .. until - 1
    # as docs/methods/cask.md defines them; None where one does not exist: rho_core without a core, lost masses where a
    # representative is no token's key (means of keys), dispersions without groups
    measures: dict[str, float | None]


@dataclass
class _LayerEvent:
    """One layer's part of an event, kept until its interval is over; chosen slots are bool [N]."""

    length: int
    plan: CaskPlan
    candidates_N: Tensor
    core_N: Tensor
    kept_N: Tensor
    slot_before_L: Tensor
    slot_after_L: Tensor
    positions_K: Tensor
    weights_HK: Tensor | None
    dispersion: tuple[float, float] | None


class CaskDiagnostics:
    """An observer for `CompressedCache` that measures every CASK event; plans of other methods are passed over.

    Rows must stay where they are.

    Args:
        reference: full KV's attention over the very rows that are fed, for instance
            `reasonkv.evaluate.reference.FullAttention.collect(model, rows)`.
    """

    def __init__(self, reference: TraceAttention) -> None:
        self.reference = reference
        self._events: dict[tuple[int, int], dict[int, _LayerEvent]] = {}  # (row, event) -> layer -> its part
        self._slots: dict[tuple[int, int], Tensor] = {}  # (layer, row) -> slot of every token after the last event

    def __call__(self, layer: int, rows: list[int], view: SlotView, plan: Plan) -> None:
        """Take one layer's plan, before it is carried out."""
        if isinstance(plan, CaskPlan):
            for place, row in enumerate(rows):
                event, length = int(view.event_B[place]), int(view.length_B[place])
                found = self._observed((layer, row), place, length, view, plan)
                self._events.setdefault((row, event), {})[layer] = found

    def events(self) -> list[CaskEvent]:
        """Return all events so far, by row and number; the last of each row is measured to its trace's end."""
        return [self._event(row, event) for row, event in sorted(self._events)]

    def _observed(self, key: tuple[int, int], place: int, length: int, view: SlotView, plan: CaskPlan) -> _LayerEvent:
        decided, kept_K = plan.rows[place], plan.kept_BHK[place, 0].cpu()
        target_N = torch.from_numpy(decided.target_N)
        kept_N = target_N == torch.arange(len(target_N))
        into_N = torch.where(target_N >= 0, (kept_N.cumsum(0) - 1)[target_N.clamp(min=0)], -1)
        known_L = self._slots.get(key, torch.empty(0, dtype=torch.int64))
        # an event leaves its slots in front; every later token follows with a slot of its own
        settled = len(into_N) - (length - len(known_L))
        before_L = torch.cat([known_L, torch.arange(settled, len(into_N))])
        after_L = self._slots[key] = torch.where(before_L >= 0, into_N[before_L.clamp(min=0)], -1)
        weights_HK: Tensor | None = torch.ones(1, len(kept_K))  # tokens of its kind a slot stands for in the softmax
        if plan.merge is not None and plan.merge.rotary is not None:
            weights_HK = None
        elif plan.log_mass_BHK is not None:
            weights_HK = plan.log_mass_BHK[place].cpu().exp()
        elif "log_mass" in view.state:
            weights_HK = view.state["log_mass"][place].cpu()[:, kept_K].exp()
        return _LayerEvent(
            length, plan, torch.from_numpy(decided.candidates_N), torch.from_numpy(decided.core_N), kept_N, before_L,
            after_L, view.positions_BHN[place, 0].cpu()[kept_K], weights_HK, _dispersion(view, plan, place, into_N),
        )  # fmt: skip

    def _event(self, row: int, event: int) -> CaskEvent:
        layers = self._events[row, event]
        parts = list(layers.values())
        length, following = parts[0].length, self._events.get((row, event + 1))
        until = self.reference.lengths[row] if following is None else next(iter(following.values())).length
        masses = [self._masses(layer, row, part, until) for layer, part in layers.items()] if until > length else []
        evicted, lost, absolute = (_mean([one[i] for one in masses]) for i in range(3))
        slots = [one[3] for one in masses]
        if slots and all(part.plan.rows is parts[0].plan.rows for part in parts):  # one plan for all layers
            slots = [torch.stack(slots).sum(0)]
        pairs = list(zip(slots, parts, strict=False))
        core = _mean([_ratio(slots_N, part.candidates_N, part.core_N) for slots_N, part in pairs])
        rep = _mean([_ratio(slots_N, part.candidates_N, part.candidates_N & part.kept_N) for slots_N, part in pairs])
        groups = [part.dispersion for part in parts if part.dispersion is not None]
        distance, norm = (_mean([one[i] for one in groups]) for i in range(2))
        relative = distance / norm if distance is not None and norm else None
        found = dict(zip(MEASURES, (evicted, lost, absolute, distance, relative, core, rep), strict=True))
        return CaskEvent(row, event, length, until, found)

    def _masses(self, layer: int, row: int, part: _LayerEvent, until: int) -> tuple[Any, ...]:
        """Evicted, lost and absolutely lost mass as parts of all attention to tokens before; that of slots [N]."""
        mass_HL = self.reference.received(layer, row, part.length, until)[:, : part.length].cpu()
        total_H = mass_HL.sum(1).clamp(min=1e-30)
        before_HN = _per_slot(mass_HL, part.slot_before_L, len(part.kept_N))
        after_HK = _per_slot(mass_HL, part.slot_after_L, len(part.positions_K))
        evicted = float((1 - after_HK.sum(1) / total_H).mean())
        if part.weights_HK is None:
            return evicted, None, None, before_HN.mean(0)
        lost_HK = after_HK - part.weights_HK * mass_HL[:, part.positions_K]
        lost, absolute = (float((x_HK.sum(1) / total_H).mean()) for x_HK in (lost_HK, lost_HK.abs()))
        return evicted, lost, absolute, before_HN.mean(0)


def trace_means(events: Sequence[CaskEvent]) -> dict[str, float | None]:
    """Return the mean of every measure over the events where it exists, for one trace's record; else None."""
    return {name: _mean([event.measures[name] for event in events]) for name in MEASURES}


def _dispersion(view: SlotView, plan: CaskPlan, place: int, into_N: Tensor) -> tuple[float, float] | None:
    """Mean kappa distance of merged keys to their group's key, and their mean kappa norm; None without groups."""
    if plan.merge is None or view.rotary is None:
        return None
    kept_K = plan.kept_BHK[place, 0].cpu()
    sizes_K = torch.bincount(into_N[into_N >= 0], minlength=len(kept_K))
    member_m = torch.nonzero((into_N >= 0) & (sizes_K[into_N.clamp(min=0)] > 1))[:, 0]
    if len(member_m) == 0:
        return None
    group_m, counts_N = into_N[member_m], view.counts_BHN[place, 0].cpu().double()
    keys_HND = view.rotary.unrotate(view.keys_BHND[place].double(), view.positions_BHN[place]).cpu()
    keys_HmD = keys_HND[:, member_m]
    weight_m = plan.merge.value_weights_BHN[place, 0].double().cpu()[member_m]
    total_K, tokens_K = (torch.zeros(len(kept_K), dtype=torch.float64) for _ in range(2))
    share_m = weight_m / total_K.index_add_(0, group_m, weight_m)[group_m].clamp(min=1e-30)
    tokens_K.index_add_(0, group_m, counts_N[member_m])
    if plan.merge.rotary is None:
        own_HmD = keys_HND[:, kept_K[group_m]]
    else:  # means of keys
        mean_HKD = torch.zeros(len(keys_HmD), len(kept_K), keys_HmD.shape[2], dtype=torch.float64)
        own_HmD = mean_HKD.index_add_(1, group_m, keys_HmD * share_m[:, None])[:, group_m]
    # groups weigh as the source tokens they stand for, members within one as their values do
    weight_m = share_m * tokens_K[group_m]
    weight_m /= weight_m.sum()
    distance, norm = (
        float((_kappa_norm(x_HmD, view.rotary) * weight_m).sum(1).mean()) for x_HmD in (keys_HmD - own_HmD, keys_HmD)
    )
    return distance, norm


def _kappa_norm(keys_HmD: Tensor, rotary: Rotary) -> Tensor:
    """Sum over rotary pairs of |kappa(w_f)| |k_f|, [H, m]; kappa(w) is the mean of exp(i w d) over future distances."""
    inv_freq = rotary.inv_freq.double().cpu()
    F, phases_JF = len(inv_freq), future_distances()[:, None] * inv_freq
    kappa_F = torch.polar(torch.ones_like(phases_JF), phases_JF).mean(0).abs()
    keys_HmD = rotary.canonical(keys_HmD)
    return torch.hypot(keys_HmD[..., :F], keys_HmD[..., F : 2 * F]) @ kappa_F


def _per_slot(mass_HL: Tensor, slot_L: Tensor, slots: int) -> Tensor:
    """Attention to the tokens of every slot, [H, slots]."""
    has_slot = slot_L >= 0
    out = torch.zeros(len(mass_HL), slots, dtype=mass_HL.dtype)
    return out.index_add_(1, slot_L[has_slot], mass_HL[:, has_slot])


def _ratio(mass_N: Tensor, candidates_N: Tensor, chosen_N: Tensor) -> float | None:
    """Mass of chosen candidates over that of as many best ones."""
    best = mass_N[candidates_N].topk(int(chosen_N.sum())).values.sum()
    return float(mass_N[chosen_N].sum() / best) if float(best) > 0 else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
