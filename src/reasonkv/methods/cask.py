"""CASK: protect the core of a reasoning trace, and merge the rest into its neighbours.

The file follows the paper: stage 1 evicts prompt slots, the heads' votes choose a core, runs of the other slots merge,
and the outcome becomes a plan. Rows are planned on the host in float64, so that a plan is the same on every device once
the scores are.

Legend: B rows, H KV heads, N slots of a row, the first P of them prompt, n candidates of stage 2, K slots kept, M query
heads of all layers that a plan covers, D head_dim.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from reasonkv.methods.base import OF_VARIANT, Method, Requirements, SlotState
from reasonkv.methods.frequency import layer_scores, paper_budget
from reasonkv.methods.ops import top_k_mask
from reasonkv.methods.options import Count, Share
from reasonkv.methods.phases import parse_markers, phase_markers, phases_of_tokens
from reasonkv.plan import Fold, Plan, PlanError
from reasonkv.view import SlotView

Ints, Floats, Bools = NDArray[np.int64], NDArray[np.float64], NDArray[np.bool_]
Pair = tuple[int, float, int, int, int]
"""Entry of the heap: -tier, -cosine, left group, version of the left and of the right group."""
COVERAGE = 0.0625
"""Part of the kept prompt that is spread evenly."""
LOCAL_WINDOW = 32
"""Positions between two slots up to which they are close."""
LEAST_SUPPORT = 1e-4
_SPAN = {"span_start": SlotState("position", "min", torch.int32), "span_end": SlotState("position", "max", torch.int32)}


class Row(NamedTuple):
    """The slots of one row: what planning reads of them.

    `scores_MN` are float32, on the device; `counts_N` the tokens that a slot stands for, `starts_N` and `ends_N` their
    first and last position; `phases_N` the phase of the first of them, -1 in the prompt. Slots are compared by
    `vectors_ND` (zeros where nothing merges).
    """

    scores_MN: Tensor
    counts_N: Ints
    starts_N: Ints
    ends_N: Ints
    phases_N: Ints
    protected_N: Bools
    vectors_ND: Floats
    prompt: int
    prompt_length: int


class RowPlan(NamedTuple):
    """What becomes of one row: `target_N` is the slot that continues each slot, -1 where it is evicted.

    `supports_N` are softplus(score) + 1e-4 of the candidates, 1 elsewhere; `candidates_N` and `core_N` mark the slots
    that stage 2 chose from, and its core.
    """

    target_N: Ints
    supports_N: Floats
    candidates_N: Bools
    core_N: Bools
    guards: tuple[str, ...] = ()


@dataclass(frozen=True)
class CaskPlan(Plan):
    """A plan that also tells observers how it came about, one `RowPlan` per row."""

    rows: tuple[RowPlan, ...] = ()


@dataclass(frozen=True)
class CASK(Method):
    """Protect what the coming queries will attend to, and merge the rest into its neighbours (CASK, 2026; the code is
    Skyline-23/CASK at 02c2f8b, the scores are TriAttention's, arXiv 2604.04921).

    One set of slots for all layers and heads. At a compaction:

    1. Prompt slots are evicted down to their share. An evenly spread part of them is kept, and the best by score.
    2. Of the decode slots before the recent window, the core is what most query heads have among their best. The others
       are scratch.
    3. Neighbouring scratch merges, the most similar pair first. Core slots and phase boundaries end a run of
       neighbours. Scratch that is still too much is evicted, the lowest score first.
    4. A group becomes one slot: the key of its best-scored source, the mean of its values over source tokens, and the
       log of their number on its logits.

    `variant="paper"` merges until everything fits, weighs values by tokens times support (softplus(score) + 1e-4, the
    sum at least 1), adds nothing to logits, compares raw scores of all heads, and leaves decode tokens the window and
    two slots beside a long prompt. Both variants keep what the budget protects and exactly the budget's slots, and of
    equal scores the older slot. `reasonkv.methods.reference.cask` has what else the public code does.

    Args:
        variant: "corrected" or "paper"; docs/methods/cask.md says why it was corrected.
        per_layer: every layer has a plan of its own, from its own scores.
        window: newest decode tokens that are always kept.
        prompt_share: largest part of the slots, neither recent nor protected, that the prompt may take from decode
            tokens. Unless given: 0.9, paper 1.
        core_ratio: part of stage 2's slots that the core gets, at least one slot; 0 turns the core off.
        fold: "similar" - close and similar neighbours merge while the slots do not suffice, then scratch is evicted;
            "neighbours" - all scratch merges until it fits, if need be across phases and with a smaller core; "none" -
            scratch is evicted. Unless given: similar, paper neighbours.
        similarity: cosine from which neighbours are similar; with fold="neighbours" only a preference.
        mass: "log" - a merged slot's logits are raised by the log of its tokens; "none" - for runtimes that cannot.
            Unless given: log, paper none.
        markers: token ids that end a phase, "198;271;12-13" for three, the last of two tokens; or "none". Unless given,
            `for_tokenizer` fills in the paper's.

    """

    name: ClassVar[str] = "cask"
    title: ClassVar[str] = "Protected core by expected score, the rest folded into neighbours"
    paper: ClassVar[str] = "CASK, github.com/Skyline-23/CASK"
    variants: ClassVar[dict[str, dict[str, object]]] = {
        "corrected": {"prompt_share": 0.9, "fold": "similar", "mass": "log"},
        "paper": {"prompt_share": 1.0, "fold": "neighbours", "mass": "none"},
    }
    paper_budget = staticmethod(paper_budget)

    variant: Literal["corrected", "paper"] = "corrected"
    per_layer: bool = False
    window: Count = 8
    prompt_share: Share = OF_VARIANT
    core_ratio: Share = 0.5
    fold: Literal["similar", "neighbours", "none"] = OF_VARIANT
    similarity: float = 0.985
    mass: Literal["log", "none"] = OF_VARIANT
    markers: str = ""

    def check_options(self) -> None:
        """Check that the markers can be read."""
        parse_markers(self.markers)

    @property
    def needs(self) -> Requirements:
        """Query statistics, and what merging stores; the corrected variant's window is protected."""
        merges = self.fold != "none"
        return Requirements(
            recent=self.window if self.variant == "corrected" else 0, scope="layer" if self.per_layer else "model",
            folds=merges, slot_state=_SPAN if merges else {}, log_mass=merges and self.mass == "log",
            token_ids=merges and bool(parse_markers(self.markers)), calibration=True,
        )  # fmt: skip

    def for_tokenizer(self, tokenizer: Any) -> CASK:
        """Return the method with the paper's markers in the tokenizer's ids, unless markers are given."""
        return self if self.markers else replace(self, markers=phase_markers(tokenizer) or "none")

    def plan(self, view: SlotView, keep: int) -> Plan:
        """Plan one layer alone."""
        return self._plan_together([view], keep)[0]

    def plan_layers(self, views: Sequence[SlotView], keep: int) -> list[Plan]:
        """Plan all layers: one set of slots and groups for all, or with `per_layer` one for each."""
        return [self.plan(view, keep) for view in views] if self.per_layer else self._plan_together(views, keep)

    # -- stage 1: the prompt -------------------------------------------------------------------------------------------

    def prompt_stage(self, row: Row, keep: int, recent: int) -> Bools:
        """Return the prompt slots that are kept, bool [P].

        The prompt gets its share of the slots beside the recent and protected decode slots, and what the decode
        candidates cannot fill; it leaves them two slots if there are as many.
        """
        is_kept = row.protected_N.copy()
        is_kept[len(is_kept) - recent :] = True
        candidates, free = int((~is_kept[row.prompt :]).sum()), keep - int(is_kept[row.prompt :].sum())
        target = max(int(self.prompt_share * free), free - candidates)
        target = min(target, free - min(2, candidates), row.prompt)
        return self.spread_and_best(row, max(target, int(row.protected_N[: row.prompt].sum()), 0))

    def spread_and_best(self, row: Row, target: int, coverage: float = COVERAGE) -> Bools:
        """Return `target` prompt slots: the protected ones, some evenly spread, the best of the rest; bool [P]."""
        P, is_kept = row.prompt, row.protected_N[: row.prompt].copy()
        if target == P:
            return np.ones(P, dtype=bool)
        reserve = min(target // 2, round(target * coverage))
        for slot in np.unique(np.round(np.linspace(0, P - 1, reserve)).astype(np.int64)):
            is_kept[slot] |= int(is_kept.sum()) < target
        rest, scores_P = np.flatnonzero(~is_kept), self.best_head(row.scores_MN[:, :P]).cpu().numpy()
        is_kept[rest[best_first(scores_P[rest])[: target - int(is_kept.sum())]]] = True
        return is_kept

    def best_head(self, scores_Mn: Tensor) -> Tensor:
        """Return the maximum over query heads, [n]; corrected: of z-scores per head (deviation at least 1e-6)."""
        if self.variant == "corrected":
            scores_Mn = scores_Mn - scores_Mn.mean(-1, keepdim=True)
            scores_Mn = scores_Mn / scores_Mn.square().mean(-1, keepdim=True).sqrt_().clamp_(min=1e-6)
        return scores_Mn.amax(0)

    # -- stage 2: core, runs, merging ----------------------------------------------------------------------------------

    def core(self, scores_Mn: Tensor, scores_n: Floats, size: int, slots: int) -> Bools:
        """Return the core, bool [n]: the most votes first, then the highest score, then the oldest.

        Every query head votes for its `size` best candidates, of equals for the older.
        """
        is_core_n = np.zeros(len(scores_n), dtype=bool)
        if size > 0:
            votes_n = top_k_mask(scores_Mn.flip(-1)[None], size)[0].flip(-1).sum(0).cpu().numpy()
            is_core_n[np.lexsort((-scores_n, -votes_n))[:size]] = True
        return is_core_n

    def groups(self, row: Row, index: Ints, scores_n: Floats, supports_n: Floats, slots: int) -> Groups:
        """Return the candidates `index` of a row as groups of one."""
        return Groups(row, index, scores_n, self.similarity, evicts=self.fold == "similar")

    def decode_stage(
        self, scores_Mn: Tensor, scores_n: Floats, groups: Groups, slots: int
    ) -> tuple[Ints, Bools] | None:
        """Return which candidate continues each candidate (-1: evicted) and which are the core; None if nothing fits.

        `slots`, at least 2 and fewer than n, go on. Where all scratch has to merge and does not fit, phase boundaries
        give way, and then the core.
        """
        largest = min(max(round(self.core_ratio * slots), 1 if self.core_ratio > 0 else 0), slots - 1)
        for size in range(largest, -1, -1):
            is_core_n = self.core(scores_Mn, scores_n, size, slots)
            scratch_slots = slots - int(is_core_n.sum())
            if self.fold == "none":
                best = best_first(np.where(is_core_n, np.inf, scores_n))[:slots]
                return np.where(np.isin(np.arange(len(scores_n)), best), np.arange(len(scores_n)), -1), is_core_n
            for phases_n in (groups.phases_n, np.zeros_like(groups.phases_n)):
                target_n = groups.merge_down(scratch_slots, is_core_n, phases_n)
                if target_n is not None:
                    return target_n, is_core_n
        return None

    def plan_row(self, row: Row, keep: int) -> RowPlan:
        """Plan one row, of whose slots exactly `keep` go on."""
        P, N, protected = row.prompt, len(row.protected_N), row.protected_N
        unprotected = np.flatnonzero(~protected[P:])
        tail = N - P - 1 - int(unprotected[-1]) if len(unprotected) else N - P
        recent = min(max(self.window, tail), N - P)
        stays_P = self.prompt_stage(row, keep, recent)
        # The window gives way where it would leave no two slots for the other decode tokens.
        room = keep - int(stays_P.sum())
        if room < N - P and recent >= room:
            recent = max(0, room - 2)
        stays = np.concatenate([stays_P, protected[P:]])
        if int(stays.sum()) + int((~protected[N - recent :]).sum()) <= keep:  # else protected slots fill the window
            stays[N - recent :] = True
        is_candidate = ~stays & (np.arange(N) >= P)
        index, slots = np.flatnonzero(is_candidate), keep - int(stays.sum())
        made = RowPlan(np.where(stays, np.arange(N), -1), np.ones(N), is_candidate, np.zeros(N, dtype=bool))
        if slots >= len(index) or slots <= 1:
            newest = index[max(0, len(index) - slots) :]
            made.target_N[newest] = newest
            return made if slots >= len(index) else made._replace(guards=("merge_inactive",))
        scores_Mn = row.scores_MN.index_select(1, torch.as_tensor(index, device=row.scores_MN.device))
        best_n = self.best_head(scores_Mn)
        scores_n = best_n.cpu().numpy().astype(np.float64)
        made.supports_N[index] = (functional.softplus(best_n) + LEAST_SUPPORT).cpu().numpy()
        groups = self.groups(row, index, scores_n, made.supports_N[index], slots)
        found = self.decode_stage(scores_Mn, scores_n, groups, slots)
        if found is None:  # the best are kept, and nothing merges
            best = index[best_first(scores_n)[:slots]]
            made.target_N[best] = best
            return made._replace(guards=("merge_inactive",))
        target_n, made.core_N[index] = found
        made.target_N[index] = np.where(target_n >= 0, index[target_n], -1)
        return made

    # -- from rows to plans --------------------------------------------------------------------------------------------

    def rows(self, views: Sequence[SlotView]) -> list[Row]:
        """Return what planning reads of every row, from layers whose slots hold the same tokens.

        Raises:
            PlanError: a score is NaN.
        """
        first, position_BHN = views[0], views[0].positions_BHN
        scores_BLqN = first.all_heads(torch.stack([layer_scores(view) for view in views], dim=1), dim=2)
        if bool(scores_BLqN.isnan().any()):
            raise PlanError("A score is NaN, so the slots have no order.")
        stored = (first.counts_BHN, *(first.state.get(name, position_BHN) for name in _SPAN))
        counts_BN, starts_BN, ends_BN = (x_BHN[:, 0].long().cpu().numpy() for x_BHN in stored)
        is_prompt_BN = first.is_prompt_BHN[:, 0].cpu().numpy()
        prompts_B, phases_BN = is_prompt_BN.sum(-1).tolist(), np.where(is_prompt_BN, -1, 0)
        lengths_B = prompts_B if first.prompt_length_B is None else first.prompt_length_B.tolist()
        markers = parse_markers(self.markers)
        for b, ids_L in enumerate((first.token_ids or ()) if markers else ()):
            phases_BN[b] = phases_of_tokens(ids_L.cpu().numpy(), lengths_B[b], markers)[starts_BN[b]]
        protected_BN = torch.stack([view.is_protected_BHN.any(1) for view in views]).any(0).cpu().numpy()
        vectors_BND = np.zeros((*starts_BN.shape, 1))
        if self.fold != "none":
            vectors_BND = comparison_vectors(views).cpu().numpy().astype(np.float64)
        spans = (counts_BN, starts_BN, ends_BN, phases_BN)
        parts = (scores_BLqN.flatten(1, 2), *spans, protected_BN, vectors_BND, prompts_B, lengths_B)
        return [Row(*of_row) for of_row in zip(*parts, strict=True)]

    def _plan_together(self, views: Sequence[SlotView], keep: int) -> list[Plan]:
        first = views[0]
        (B, H, N), device = first.positions_BHN.shape, first.positions_BHN.device
        rows = tuple(self.plan_row(row, keep) for row in self.rows(views))
        guards = tuple(sorted({guard for row in rows for guard in row.guards}))
        target_BN = torch.from_numpy(np.stack([row.target_N for row in rows]))
        supports_BN = torch.from_numpy(np.stack([row.supports_N for row in rows]))

        def for_heads(x: Tensor, dtype: torch.dtype) -> Tensor:
            return x.to(device, dtype)[:, None].expand(B, H, -1).contiguous()

        is_kept_BN = target_BN == torch.arange(N)
        kept_BHK = for_heads(is_kept_BN.nonzero()[:, 1].view(B, keep), torch.int64)
        if int((target_BN >= 0).sum()) == B * keep:  # nothing merged
            return [CaskPlan(kept_BHK, guards=guards, rows=rows) for _ in views]
        output_BN = (is_kept_BN.cumsum(1) - 1).gather(1, target_BN.clamp(min=0)).clamp(min=0)
        counts_BN = first.counts_BHN[:, 0].cpu().double() * (target_BN >= 0)
        counts_BK = torch.zeros(B, keep, dtype=torch.float64).scatter_add_(1, output_BN, counts_BN)
        weights_BN = self.value_weights(counts_BN, supports_BN, output_BN, keep)
        dtype = torch.promote_types(first.keys_BHND.dtype, torch.float32)
        fold = Fold(
            for_heads(output_BN.masked_fill(target_BN < 0, -1), torch.int64),
            for_heads(is_kept_BN, dtype), for_heads(weights_BN, dtype),
        )  # fmt: skip
        log_mass_BHK = for_heads(counts_BK.log(), dtype) if self.mass == "log" else None
        return [CaskPlan(kept_BHK, fold, log_mass_BHK=log_mass_BHK, guards=guards, rows=rows) for _ in views]

    def value_weights(self, counts_BN: Tensor, supports_BN: Tensor, output_BN: Tensor, keep: int) -> Tensor:
        """Return the weight of every slot's value in its output slot; 0 where it is evicted, as its count is."""
        mass_BN = counts_BN if self.variant == "corrected" else counts_BN * supports_BN.clamp(min=LEAST_SUPPORT)
        sums_BK, sizes_BK = (
            torch.zeros(len(x_BN), keep, dtype=torch.float64).scatter_add_(1, output_BN, x_BN)
            for x_BN in (mass_BN, (counts_BN > 0).double())
        )
        if self.variant == "corrected":
            return mass_BN / sums_BK.gather(1, output_BN)
        weights_BN = mass_BN / sums_BK.clamp(min=1.0).gather(1, output_BN)
        return torch.where(sizes_BK.gather(1, output_BN) == 1, (counts_BN > 0).double(), weights_BN)


class Groups:
    """Neighbouring candidates that merge, each group named by its first candidate.

    Lists, because single entries are read and written, which arrays are slow at.

    Args:
        row: a row's slots.
        index: those that are candidates, n.
        scores_n: their scores.
        similarity: cosine from which neighbours are similar.
        evicts: only close and similar neighbours merge; groups that are too many then are evicted.
    """

    def __init__(self, row: Row, index: Ints, scores_n: Floats, similarity: float, *, evicts: bool) -> None:
        self.scores_n, self.similarity, self.evicts = scores_n, similarity, evicts
        self.starts_n, self.ends_n, self.phases_n = row.starts_N[index], row.ends_N[index], row.phases_N[index]
        self.linked_n = np.diff(index, prepend=-2) == 1
        self.unit_nD = unit_vectors(row.vectors_ND[index])
        self.neighbours_n = np.zeros(len(index))  # cosine of every candidate and the one before it
        (self.unit_nD[:-1] * self.unit_nD[1:]).sum(-1, out=self.neighbours_n[1:])
        self.cosines: dict[tuple[int, int], float] = {}  # of other pairs of anchors, as they are met

    def merge_down(self, slots: int, is_core_n: Bools, phases_n: Ints) -> Ints | None:
        """Merge neighbouring scratch until `slots` groups are left, the best pair first; of equal pairs the older.

        A heap holds every adjacent pair. A merge makes at most two new ones and leaves outdated ones in the heap, whose
        versions tell: O(n log n) instead of a scan of all pairs per merge.

        Args:
            slots: groups allowed for all scratch together.
            is_core_n: bool, candidates that stay alone and end a run.
            phases_n: runs end where they change.

        Returns:
            The candidate that continues each candidate, -1 where it is evicted; None if so few cannot be reached.
        """
        n, is_first = len(is_core_n), ~is_core_n
        joined_n = is_first & self.linked_n
        joined_n[1:] &= is_first[:-1] & (phases_n[1:] == phases_n[:-1])
        surplus = int(is_first.sum()) - slots
        if surplus > int(joined_n.sum()) and not self.evicts:
            return None  # more runs than slots
        self.restart()
        joined, version = joined_n.tolist(), [0] * n  # the version of a group; -1 once it is inside another one
        after, before = list(range(1, n + 1)), list(range(-1, n - 1))  # first candidates of neighbouring groups
        heap = self.first_pairs(np.flatnonzero(joined_n))
        heapq.heapify(heap)
        while surplus > 0 and (heap or self.relax(heap, before, joined, version)):
            _, _, left, left_version, right_version = heapq.heappop(heap)
            right = after[left]
            if version[left] != left_version or right == n or version[right] != right_version:
                continue
            self.merge(left, right)
            version[left], version[right], is_first[right] = left_version + 1, -1, False
            after[left] = after[right]
            surplus -= 1
            new = [(before[left], left)] if joined[left] else []
            if after[left] < n:
                before[after[left]] = left
                new += [(left, after[left])] if joined[after[left]] else []
            for one, other in new:
                order = self.order(one, other)
                if order is not None:
                    heapq.heappush(heap, (-order[0], -order[1], one, version[one], version[other]))
        if surplus > 0 and not self.evicts:
            return None
        firsts = np.flatnonzero(is_first)
        firsts = firsts[best_first(np.array(self.score)[firsts])[:slots]]
        target_n = np.where(is_core_n, np.arange(n), -1)
        for first in firsts.tolist():
            target_n[first : self.last[first] + 1] = self.goes_on(first)
        return target_n

    def relax(self, heap: list[Pair], before: list[int], joined: list[bool], version: list[int]) -> bool:
        """Return whether there are more pairs once the heap is empty: none here."""
        return False

    def restart(self) -> None:
        """Make every candidate a group of its own."""
        self.score, self.start, self.end = self.scores_n.tolist(), self.starts_n.tolist(), self.ends_n.tolist()
        self.anchor, self.last = list(range(len(self.score))), list(range(len(self.score)))

    def goes_on(self, first: int) -> int:
        """Return the candidate that a group becomes: its best-scored one."""
        return self.anchor[first]

    def first_pairs(self, right: Ints) -> list[Pair]:
        """Return heap entries (-tier, -cosine, left, 0, 0) of single candidates `right` and those before them."""
        left, cosine = right - 1, self.neighbours_n[right]
        is_close = self.starts_n[right] - self.ends_n[left] <= LOCAL_WINDOW
        tier = np.where(is_close, np.where(cosine >= self.similarity, 2, 1), 0)
        allowed = tier >= (2 if self.evicts else 0)
        columns = ((-tier)[allowed].tolist(), (-cosine)[allowed].tolist(), left[allowed].tolist())
        return [(*entry, 0, 0) for entry in zip(*columns, strict=True)]

    def order(self, left: int, right: int) -> tuple[int, float] | None:
        """Return (tier, cosine) of two groups, None if they may not merge; 2: close and similar, 1: close, 0: not."""
        cosine = self.cosine(left, right)
        is_close = self.start[right] - self.end[left] <= LOCAL_WINDOW
        tier = 0 if not is_close else 2 if cosine >= self.similarity else 1
        return None if self.evicts and tier < 2 else (tier, cosine)

    def cosine(self, left: int, right: int) -> float:
        """Return the cosine of two groups' anchors, which do not change: half of all pairs are met again."""
        pair = one, other = self.anchor[left], self.anchor[right]
        if pair not in self.cosines:
            adjacent = other - one == 1
            found = self.neighbours_n[other] if adjacent else np.add.reduce(self.unit_nD[one] * self.unit_nD[other])
            self.cosines[pair] = float(found)
        return self.cosines[pair]

    def merge(self, left: int, right: int) -> None:
        """Put the group `right` into the group `left` before it; the better anchor goes on, of equals the later."""
        if self.score[right] >= self.score[left]:
            self.anchor[left], self.score[left] = self.anchor[right], self.score[right]
        self.start[left], self.end[left] = (
            min(self.start[left], self.start[right]),
            max(self.end[left], self.end[right]),
        )
        self.last[left] = self.last[right]


def comparison_vectors(views: Sequence[SlotView]) -> Tensor:
    """Return what slots are compared by, [B, N, D]: unit keys before RoPE, averaged over layers and KV heads.

    The rotation is linear, keeps norms, and is the same for all heads of a slot, so rotated unit keys are averaged and
    un-rotated once.
    """
    first = views[0]
    dtype = torch.promote_types(first.keys_BHND.dtype, torch.float32)
    total_BND = torch.zeros(first.keys_BHND[:, 0].shape, dtype=dtype, device=first.keys_BHND.device)
    for view in views:
        for keys_BND in view.keys_BHND.to(dtype).unbind(1):  # one head at a time stays in a core's cache
            norm_BN1 = torch.linalg.vector_norm(keys_BND, dim=-1, keepdim=True)
            total_BND.addcdiv_(keys_BND, norm_BN1.clamp_(min=1e-12))
    assert first.rotary is not None
    total_BND /= len(views) * first.keys_BHND.shape[1]
    return first.rotary.unrotate(first.reduce(total_BND, "mean"), first.positions_BHN[:, 0])


def best_first(scores: NDArray[Any]) -> Ints:
    """Return indices by falling score; of equals the earlier first."""
    best: Ints = np.argsort(-scores, kind="stable")
    return best


def unit_vectors(vectors: Floats) -> Floats:
    """Return vectors [..., D] divided by their norms."""
    unit: Floats = vectors / np.maximum(np.sqrt(np.square(vectors).sum(-1, keepdims=True)), 1e-12)
    return unit
