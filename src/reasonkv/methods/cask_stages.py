"""One event of one row for CASK: how the budget is divided, which prompt slots stay, and what is folded into what.

Legend: N slots held, K slots kept, P prompt slots (they come first), M query heads of all layers a plan covers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from reasonkv.methods.cask_plan import LEAST_SUPPORT, Candidates, Consolidation, Grouping, Rules, consolidate
from reasonkv.methods.cask_votes import Votes
from reasonkv.plan import PlanError

PromptMode = Literal["evict", "pin", "open"]
PREFIX_EXHAUSTED, MERGE_INACTIVE = "prefix_budget_exhausted", "merge_inactive"


@dataclass(frozen=True)
class Shares:
    """How the slots are divided between prompt, core, scratch and the newest; options of `reasonkv.methods.cask.CASK`.

    Args:
        prompt: "evict" - the first stage may drop prompt slots; "pin" - it may not; "open" - there is no first stage
            and prompt slots are candidates like all others.
        prompt_share: most of the slots that are neither protected nor recent that the prompt may hold while the decode
            stage could use them.
        coverage: part of the kept prompt that is spread evenly, whatever the scores.
        window: newest decode slots that always stay.
        normalise: scores are z-scored per query head, over the prompt in stage 1 and over the candidates in stage 2.
        paper: reproduce the reference where it loses sinks and weighs wrongly.
    """

    prompt: PromptMode = "evict"
    prompt_share: float = 0.9
    coverage: float = 0.0625
    window: int = 8
    normalise: bool = True
    paper: bool = False


@dataclass(frozen=True)
class RowSlots:
    """The slots of one row, as far as planning is concerned.

    Args:
        prefix: P; leading slots the first stage is about.
        protected_N: bool, may not be dropped.
        scores_MN: float32, frequency scores of every query head.
        counts_N, starts_N, ends_N, positions_N, phases_N: int64; source tokens, span, token index and phase.
        vectors_ND: float64, what slots are compared by; None where nothing is folded.
        values_NE: float64, projected values for the value gate, or None.
        noise_MP: added to the prompt's scores (the reference breaks ties so); None: nothing.
    """

    prefix: int
    protected_N: NDArray[np.bool_]
    scores_MN: Tensor
    counts_N: NDArray[np.int64]
    starts_N: NDArray[np.int64]
    ends_N: NDArray[np.int64]
    positions_N: NDArray[np.int64]
    phases_N: NDArray[np.int64]
    vectors_ND: NDArray[np.float64] | None = None
    values_NE: NDArray[np.float64] | None = None
    noise_MP: Tensor | None = None


@dataclass(frozen=True)
class RowPlan:
    """What becomes of one row's slots.

    Args:
        kept_K: int64, ascending.
        into_N: int64, output slot of every input slot, -1 where it is evicted.
        key_weights_N, value_weights_N: float64, weights within a group.
        log_mass_K: float64, log of the source tokens an output slot stands for.
        counts_K: int64, those tokens.
        core: slots of the protected core, ascending.
        folds: some output slot stands for more than one input slot, or is weighted otherwise than by 1.
        guards: emergency rules that decided.
        consolidation: the second stage's, or None where it had nothing to do; indices count from `candidates`.
        candidates: slots the second stage chose from.
    """

    kept_K: NDArray[np.int64]
    into_N: NDArray[np.int64]
    key_weights_N: NDArray[np.float64]
    value_weights_N: NDArray[np.float64]
    log_mass_K: NDArray[np.float64]
    counts_K: NDArray[np.int64]
    core: tuple[int, ...] = ()
    folds: bool = False
    guards: tuple[str, ...] = ()
    consolidation: Consolidation | None = None
    candidates: tuple[int, ...] = ()


def plan_row(row: RowSlots, keep: int, shares: Shares, rules: Rules) -> RowPlan:
    """Both stages of one row: exactly `keep` of its more than `keep` slots come out.

    Raises:
        PlanError: a score is NaN, or more slots are protected than may stay.

    """
    if bool(torch.isnan(row.scores_MN).any()):
        raise PlanError("A score is NaN, so the slots have no order.")
    N, protected = len(row.protected_N), row.protected_N
    if int(protected.sum()) > keep:
        raise PlanError(f"{int(protected.sum())} slots are protected, but only {keep} may stay.")
    prefix = 0 if shares.prompt == "open" else row.prefix
    guards: list[str] = []
    stays = np.zeros(N, dtype=bool)  # everything but the candidates

    recent = _recent(protected[prefix:], shares.window)
    if shares.prompt == "pin" and prefix + int(protected[prefix:].sum()) >= keep:
        guards.append(PREFIX_EXHAUSTED)
    if shares.paper and guards:
        return _newest(row, keep, guards)
    if shares.prompt == "evict" or guards:
        target = prompt_target(keep, prefix, protected, recent, shares.prompt_share)
    else:
        target = prefix
    if target < prefix:
        scores_P = combined_scores(row.scores_MN[:, :prefix], shares.normalise, row.noise_MP)
        stays[choose_prompt(scores_P.cpu().numpy(), target, shares.coverage, protected[:prefix])] = True
    else:
        stays[:prefix] = True

    # The newest window gives way where it would leave no two slots for the rest of the decode tokens.
    recent = _recent(protected[prefix:], shares.window)
    room = keep - int(stays[:prefix].sum())
    if N - prefix > room and recent >= room:
        recent = max(0, room - 2)
    stays[prefix:] |= protected[prefix:]
    stays[N - recent :] = True
    candidates = np.flatnonzero(~stays[prefix:]) + prefix
    slots = keep - int(stays.sum())
    if slots < 0:  # protected slots fill what the window had
        stays[prefix:] = protected[prefix:]
        candidates = np.flatnonzero(~stays[prefix:]) + prefix
        slots = keep - int(stays.sum())
    if slots >= len(candidates):
        return _assemble(row, shares, rules, stays, candidates, _alone(range(len(candidates))), guards)
    if slots <= 1:
        guards.append(MERGE_INACTIVE)
        last = range(len(candidates) - slots, len(candidates))
        return _assemble(row, shares, rules, stays, candidates, _alone(last), guards)

    index = torch.as_tensor(candidates, device=row.scores_MN.device)
    scores_Mn = row.scores_MN.index_select(1, index)
    scores_n = combined_scores(scores_Mn, shares.normalise)
    supports_n = functional.softplus(scores_n) + LEAST_SUPPORT
    known = Candidates(
        scores=scores_n.cpu().numpy().astype(np.float64),
        supports=supports_n.cpu().numpy().astype(np.float64),
        counts=row.counts_N[candidates],
        starts=row.starts_N[candidates],
        ends=row.ends_N[candidates],
        phases=row.phases_N[candidates],
        vectors=np.zeros((len(candidates), 1)) if row.vectors_ND is None else row.vectors_ND[candidates],
        values=None if row.values_NE is None else row.values_NE[candidates],
        linked=np.diff(candidates, prepend=-2) == 1,
    )
    found = consolidate(known, Votes(scores_Mn), slots, rules)
    if not found.feasible:
        guards.append(MERGE_INACTIVE)
    return _assemble(row, shares, rules, stays, candidates, found.groups, guards, known.supports, found)


def prompt_target(keep: int, prefix: int, protected_N: NDArray[np.bool_], recent: int, share: float) -> int:
    """Prompt slots that stay at this event.

    Of the slots left beside the newest and the protected decode ones the prompt gets `share`, and whatever the
    decode candidates cannot fill; it leaves them two slots if there are as many, and keeps what of it is protected.
    With share 1 that is the reference's rule.

    Args:
        keep: slots that stay in total.
        prefix: prompt slots held.
        protected_N: bool, all slots.
        recent: newest decode slots that stay.
        share: 0 to 1.

    """
    decode = protected_N[prefix:]
    stays = decode.copy()
    stays[len(decode) - recent :] = True
    candidates = len(decode) - int(stays.sum())
    free = keep - int(stays.sum())
    target = max(int(share * free), free - candidates)
    target = min(target, free - min(2, candidates), prefix)
    return max(target, int(protected_N[:prefix].sum()), 0)


def choose_prompt(
    scores_P: NDArray[np.float32], target: int, coverage: float, forced_P: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """The first stage: protected prompt slots, an evenly spread reserve, and the best-scored of the rest; ascending.

    Args:
        scores_P: combined scores of the prompt's slots.
        target: slots to return, at least the forced ones and fewer than P.
        coverage: the reserve as a part of `target`; at most half of it.
        forced_P: bool, slots that stay.

    """
    P = len(scores_P)
    chosen = forced_P.copy()
    reserve = min(target // 2, round(target * coverage))
    for slot in np.unique(np.round(np.linspace(0, P - 1, reserve)).astype(np.int64)) if reserve > 0 else ():
        if int(chosen.sum()) < target:
            chosen[slot] = True
    rest = np.flatnonzero(~chosen)
    best = rest[np.argsort(-scores_P[rest], kind="stable")]
    chosen[best[: target - int(chosen.sum())]] = True
    return np.flatnonzero(chosen)


def combined_scores(scores_Mn: Tensor, normalise: bool, noise_Mn: Tensor | None = None) -> Tensor:
    """Maximum over query heads, [n]; z-scored per head first if asked (population deviation, at least 1e-6)."""
    if normalise:
        scores_Mn = scores_Mn - scores_Mn.mean(-1, keepdim=True)
        scores_Mn = scores_Mn / scores_Mn.square().mean(-1, keepdim=True).sqrt_().clamp_(min=1e-6)
    if noise_Mn is not None:
        scores_Mn = scores_Mn + noise_Mn
    return scores_Mn.amax(0)


def _recent(protected_decode: NDArray[np.bool_], window: int) -> int:
    """Newest decode slots that stay: the window, or the protected tail where that is longer."""
    n = len(protected_decode)
    open_slots = np.flatnonzero(~protected_decode)
    tail = n - 1 - int(open_slots[-1]) if len(open_slots) else n
    return min(max(window, tail), n)


def _newest(row: RowSlots, keep: int, guards: list[str]) -> RowPlan:
    """The reference's way out of an exhausted budget: the last `keep` slots, and what is protected."""
    stays = row.protected_N.copy()
    older = np.flatnonzero(~stays)
    stays[older[len(older) - (keep - int(stays.sum())) :]] = True
    nothing = np.empty(0, dtype=np.int64)
    return _assemble(row, Shares(), Rules(), stays, nothing, _alone(range(0)), guards)


def _alone(candidates: range) -> Grouping:
    """Candidates that stay as they are."""
    index = np.asarray(candidates, dtype=np.int64)
    ones = np.ones(len(index))
    return Grouping(index, index, index, np.ones_like(index), ones, np.zeros_like(ones))


def _assemble(
    row: RowSlots,
    shares: Shares,
    rules: Rules,
    stays_N: NDArray[np.bool_],
    candidates: NDArray[np.int64],
    groups: Grouping,
    guards: list[str],
    supports_n: NDArray[np.float64] | None = None,
    consolidation: Consolidation | None = None,
) -> RowPlan:
    """Kept slots, fold targets and weights from what stays as it is and from the groups of candidates."""
    N = len(stays_N)
    latest = rules.representative == "weighted_latest"
    first_g, last_g = groups.first, groups.last
    chosen_g = last_g if latest else groups.anchor
    kept_N = stays_N.copy()
    kept_N[candidates[chosen_g]] = True
    kept_K = np.flatnonzero(kept_N)
    output_N = np.cumsum(kept_N) - 1
    into_N = np.where(kept_N, output_N, -1)
    sizes_g = last_g - first_g + 1
    starts = np.repeat(first_g - np.concatenate([[0], np.cumsum(sizes_g)[:-1]]), sizes_g) if len(sizes_g) else first_g
    members = candidates[starts + np.arange(int(sizes_g.sum()))]
    into_N[members] = np.repeat(output_N[candidates[chosen_g]], sizes_g)

    counts_K = np.zeros(len(kept_K), dtype=np.int64)
    np.add.at(counts_K, into_N[into_N >= 0], row.counts_N[into_N >= 0])
    supports_N = np.ones(N)
    if supports_n is not None:
        supports_N[candidates] = supports_n
    weights_N = _weights(row, shares, rules, into_N, members, supports_N, len(kept_K))
    key_weights_N = weights_N.copy()
    if not latest:
        key_weights_N = kept_N.astype(np.float64)
    elif shares.paper and rules.operator == "mean":
        key_weights_N = _normalised(row.counts_N.astype(np.float64), into_N, len(kept_K))
    core = () if consolidation is None else tuple(candidates[list(consolidation.core)].tolist())
    folds = bool((sizes_g > 1).any()) or bool((weights_N[kept_K] != 1.0).any())
    return RowPlan(
        kept_K, into_N, key_weights_N, weights_N, np.log(counts_K), counts_K, core, folds, tuple(guards), consolidation,
        tuple(candidates.tolist()),
    )  # fmt: skip


def _weights(
    row: RowSlots,
    shares: Shares,
    rules: Rules,
    into_N: NDArray[np.int64],
    members: NDArray[np.int64],
    supports_N: NDArray[np.float64],
    keep: int,
) -> NDArray[np.float64]:
    """Value weights: a source weighs as many tokens as it stands for, times its support under "keepkv"."""
    if not shares.paper:
        plain_N = row.counts_N.astype(np.float64)
        return _normalised(plain_N * supports_N if rules.operator == "keepkv" else plain_N, into_N, keep)
    weights_N = np.where(into_N >= 0, 1.0, 0.0)
    if rules.operator == "keepkv":
        mass_N = row.counts_N * np.maximum(supports_N, LEAST_SUPPORT)
        sums_K = np.zeros(keep)
        np.add.at(sums_K, into_N[into_N >= 0], mass_N[into_N >= 0])
        folded = members[np.bincount(into_N[members], minlength=keep)[into_N[members]] > 1]
        weights_N[folded] = mass_N[folded] / np.maximum(sums_K, 1.0)[into_N[folded]]
    return weights_N


def _normalised(mass_N: NDArray[np.float64], into_N: NDArray[np.int64], keep: int) -> NDArray[np.float64]:
    """Weights that sum to 1 within every group; 0 for evicted slots."""
    stays = into_N >= 0
    sums_K = np.zeros(keep)
    np.add.at(sums_K, into_N[stays], mass_N[stays])
    weights_N = np.zeros(len(into_N))
    weights_N[stays] = mass_N[stays] / sums_K[into_N[stays]]
    return weights_N
