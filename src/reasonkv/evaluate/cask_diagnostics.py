"""What CASK's plans cost, against full KV's attention in the interval that followed: the paper's own measures.

The paper argues with the mass its core and representatives hold, and with the dispersion of what it folds; its code
computes neither from attention. Here both are taken from the attention that full KV really pays, in the trace, between
one event and the next. docs/methods/cask.md has the formulas.

Legend: H KV heads, L tokens seen, N slots before an event, K after it, n candidates, F rotary pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from reasonkv.methods.cask import CaskPlan
from reasonkv.methods.cask_stages import RowPlan
from reasonkv.methods.frequency import FrequencyOptions
from reasonkv.plan import Plan
from reasonkv.rotary import Rotary
from reasonkv.view import SlotView, TraceAttention


@dataclass(frozen=True)
class CaskEvent:
    """One event of one row; masses are parts of all attention paid in the interval, means over layers and KV heads.

    Args:
        row: batch row.
        event: number of the row's event, from 0.
        length: tokens seen at the event.
        until: tokens seen at the next event, or the trace's end; the interval's queries are length .. until - 1.
        candidates: slots the second stage chose from (mean over layers where they differ).
        core: slots of the protected core.
        representatives: slots the candidates became.
        evicted_mass: attention to tokens without a slot, evicted at this event or before.
        lost_mass: attention to folded tokens minus what their slots stand for: source tokens (or 1 without log mass)
            times the attention to the representative's own token. Negative where the representative is the most
            attended of its group. None where a representative is no token's key (`weighted_latest`).
        lost_mass_absolute: the same with every slot's difference counted positive.
        kappa_dispersion: mean over groups, weighted by source tokens, of the mean kappa distance to their key.
        kappa_dispersion_relative: the same, divided by the mean kappa norm of the keys of those groups.
        rho_core: attention to the core, over that to as many best candidates; None without a core.
        rho_rep: attention to the representatives' own slots, over that to as many best candidates.
        guards: emergency rules that decided.
    """

    row: int
    event: int
    length: int
    until: int
    candidates: float
    core: float
    representatives: float
    evicted_mass: float | None
    lost_mass: float | None
    lost_mass_absolute: float | None
    kappa_dispersion: float | None
    kappa_dispersion_relative: float | None
    rho_core: float | None
    rho_rep: float | None
    guards: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values for a record."""
        return asdict(self) | {"guards": list(self.guards)}


MEASURES = (
    "evicted_mass",
    "lost_mass",
    "lost_mass_absolute",
    "kappa_dispersion",
    "kappa_dispersion_relative",
    "rho_core",
    "rho_rep",
)


@dataclass
class _LayerEvent:
    """One layer's part of an event, kept until its interval is over."""

    length: int
    plan: RowPlan
    slot_before_L: Tensor
    slot_after_L: Tensor
    positions_K: Tensor
    weights_HK: Tensor | None
    dispersion: tuple[float, float] | None
    measured: dict[str, Any] = field(default_factory=dict)


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
        self._ends: dict[tuple[int, int], int] = {}  # (row, event) -> tokens seen at the next one

    def __call__(self, layer: int, rows: list[int], view: SlotView, plan: Plan) -> None:
        """Take one layer's plan, before it is carried out."""
        if not isinstance(plan, CaskPlan):
            return
        for place, (row, event, length) in enumerate(
            zip(rows, view.event_B.tolist(), view.length_B.tolist(), strict=True)
        ):
            found = self._observed(layer, row, place, length, view, plan)
            self._events.setdefault((row, event), {})[layer] = found
            if event > 0 and (row, event - 1) in self._events:
                self._ends[row, event - 1] = length

    def events(self) -> list[CaskEvent]:
        """All events so far, by row and number; the last of each row is measured to its trace's end."""
        return [self._event(row, event) for row, event in sorted(self._events)]

    def _observed(self, layer: int, row: int, place: int, length: int, view: SlotView, plan: CaskPlan) -> _LayerEvent:
        decided = plan.rows[place]
        kept_K, into_N = torch.from_numpy(decided.kept_K), torch.from_numpy(decided.into_N)
        known_L = self._slots.get((layer, row), torch.empty(0, dtype=torch.int64))
        # an event leaves its slots in front; every later token follows with a slot of its own
        settled = len(into_N) - (length - len(known_L))
        before_L = torch.cat([known_L, torch.arange(settled, len(into_N))])
        after_L = torch.where(before_L >= 0, into_N[before_L.clamp(min=0)], -1)
        self._slots[layer, row] = after_L
        return _LayerEvent(
            length,
            decided,
            before_L,
            after_L,
            view.positions_BHN[place, 0].cpu()[kept_K],
            _standing(view, plan, place, kept_K),
            _dispersion(view, plan, place),
        )

    def _event(self, row: int, event: int) -> CaskEvent:
        layers = self._events[row, event]
        first = next(iter(layers.values()))
        until = self._ends.get((row, event), self.reference.lengths[row])
        if until > first.length:
            for layer, found in layers.items():
                if found.measured.get("until") != until:
                    found.measured = self._measure(layer, row, found, until) | {"until": until}
        parts = list(layers.values())
        plans = [part.plan for part in parts]

        def mean(name: str) -> float | None:
            return _mean([part.measured.get(name) for part in parts])

        dispersions = [part.dispersion for part in parts if part.dispersion is not None]
        absolute, norm = _mean([pair[0] for pair in dispersions]), _mean([pair[1] for pair in dispersions])
        core, rep = self._ratios(parts)
        return CaskEvent(
            row,
            event,
            first.length,
            until,
            fmean(len(plan.candidates) for plan in plans),
            fmean(len(plan.core) for plan in plans),
            fmean(len(_representatives(plan)) for plan in plans),
            mean("evicted"),
            mean("lost"),
            mean("absolute"),
            absolute,
            absolute / norm if absolute is not None and norm else None,
            core,
            rep,
            tuple(sorted({guard for plan in plans for guard in plan.guards})),
        )

    def _measure(self, layer: int, row: int, found: _LayerEvent, until: int) -> dict[str, Any]:
        """Masses of one layer as parts of all attention the interval pays to tokens seen before it."""
        mass_HL = self.reference.received(layer, row, found.length, until)[:, : found.length].cpu()
        total_H = mass_HL.sum(1).clamp(min=1e-30)
        kept, N = len(found.positions_K), len(found.plan.into_N)
        before_HN = _per_slot(mass_HL, found.slot_before_L, N)
        after_HK = _per_slot(mass_HL, found.slot_after_L, kept)
        result: dict[str, Any] = {
            "slots": before_HN.mean(0),
            "evicted": float((1 - after_HK.sum(1) / total_H).mean()),
        }
        if found.weights_HK is not None:
            lost_HK = after_HK - found.weights_HK * mass_HL[:, found.positions_K]
            result["lost"] = float((lost_HK.sum(1) / total_H).mean())
            result["absolute"] = float((lost_HK.abs().sum(1) / total_H).mean())
        return result

    def _ratios(self, parts: Sequence[_LayerEvent]) -> tuple[float | None, float | None]:
        """rho_core and rho_rep: over all layers at once where they share their plan, else the mean of the layers'."""
        shared = all(part.plan is parts[0].plan for part in parts)
        if any("slots" not in part.measured for part in parts):
            return None, None
        masses = [part.measured["slots"] for part in parts]
        if shared:
            masses, parts = [torch.stack(masses).sum(0)], parts[:1]
        core = [_ratio(mass, part.plan, part.plan.core) for mass, part in zip(masses, parts, strict=True)]
        rep = [_ratio(mass, part.plan, _representatives(part.plan)) for mass, part in zip(masses, parts, strict=True)]
        return _mean(core), _mean(rep)


def trace_means(events: Sequence[CaskEvent]) -> dict[str, float | None]:
    """Mean of every measure over the events where it exists, for one trace's record; None where it never does."""
    return {name: _mean([getattr(event, name) for event in events]) for name in MEASURES}


def _standing(view: SlotView, plan: CaskPlan, place: int, kept_K: Tensor) -> Tensor | None:
    """How many tokens of its own kind every output slot stands for in the softmax, [H, K] (or [1, K])."""
    if plan.fold is not None and plan.fold.rotary is not None:
        return None
    if plan.log_mass_BHK is not None:
        return plan.log_mass_BHK[place].cpu().exp()
    if "log_mass" in view.state:
        return view.state["log_mass"][place].cpu()[:, kept_K].exp()
    return torch.ones(1, len(kept_K))


def _dispersion(view: SlotView, plan: CaskPlan, place: int) -> tuple[float, float] | None:
    """Mean kappa distance of grouped keys to their group's key, and their mean kappa norm; None without groups."""
    if plan.fold is None or view.rotary is None:
        return None
    decided = plan.rows[place]
    into_N = torch.from_numpy(decided.into_N)
    sizes_K = torch.bincount(into_N[into_N >= 0], minlength=len(decided.kept_K))
    member = torch.nonzero((into_N >= 0) & (sizes_K[into_N.clamp(min=0)] > 1))[:, 0]
    if len(member) == 0:
        return None
    group_m = into_N[member]
    device = view.keys_BHND.device
    keys_HmD = view.keys_BHND[place][:, member.to(device)].double()
    keys_HmD = view.rotary.unrotate(keys_HmD, view.positions_BHN[place][:, member.to(device)]).cpu()
    weight_m = plan.fold.value_weights_BHN[place, 0].double().cpu()[member]
    total_K = torch.zeros(len(sizes_K), dtype=torch.float64).index_add_(0, group_m, weight_m)
    share_m = weight_m / total_K[group_m].clamp(min=1e-30)
    if plan.fold.rotary is None:
        place_of_N = torch.zeros(len(into_N), dtype=torch.int64)
        place_of_N[member] = torch.arange(len(member))
        own_HmD = keys_HmD[:, place_of_N[torch.from_numpy(decided.kept_K)[group_m]]]
    else:
        mean_HKD = torch.zeros(len(keys_HmD), len(sizes_K), keys_HmD.shape[2], dtype=torch.float64)
        own_HmD = mean_HKD.index_add_(1, group_m, keys_HmD * share_m[:, None])[:, group_m]
    # groups weigh as the source tokens they stand for, members within one as their values do
    weight_m = share_m * torch.from_numpy(decided.counts_K)[group_m]
    weight_m = weight_m / weight_m.sum()
    distance = (_kappa_norm(keys_HmD - own_HmD, view.rotary) * weight_m).sum(1).mean()
    norm = (_kappa_norm(keys_HmD, view.rotary) * weight_m).sum(1).mean()
    return float(distance), float(norm)


def _kappa_norm(keys_HmD: Tensor, rotary: Rotary) -> Tensor:
    """Sum over rotary pairs of |kappa(w_f)| |k_f|, [H, m]; kappa(w) is the mean of exp(i w d) over future distances."""
    inv_freq = rotary.inv_freq.double().cpu()
    F = len(inv_freq)
    phases_JF = FrequencyOptions().offsets()[:, None] * inv_freq
    kappa_F = torch.polar(torch.ones_like(phases_JF), phases_JF).mean(0).abs()
    return torch.hypot(keys_HmD[..., :F], keys_HmD[..., F : 2 * F]) @ kappa_F


def _per_slot(mass_HL: Tensor, slot_L: Tensor, slots: int) -> Tensor:
    """Attention to the tokens of every slot, [H, slots]."""
    has_slot = slot_L >= 0
    out = torch.zeros(len(mass_HL), slots, dtype=mass_HL.dtype)
    return out.index_add_(1, slot_L[has_slot], mass_HL[:, has_slot])


def _representatives(plan: RowPlan) -> tuple[int, ...]:
    """Candidates whose slot goes on."""
    kept = set(plan.kept_K.tolist())
    return tuple(slot for slot in plan.candidates if slot in kept)


def _ratio(mass_N: Tensor, plan: RowPlan, chosen: Sequence[int]) -> float | None:
    """Mass of chosen candidates over that of as many best ones."""
    if not chosen:
        return None
    best = mass_N[list(plan.candidates)].topk(len(chosen)).values.sum()
    return float(mass_N[list(chosen)].sum() / best) if float(best) > 0 else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
