"""CASK: protect the core of a reasoning trace, and merge the rest into its neighbours.

In the paper's order: the prompt, votes for a core, runs and merging, the plan. Rows are planned on the host in float64.

Legend: B rows, H KV heads, N slots of a row, the first P of them prompt, n candidates of stage 2, K slots kept, M query
heads of all layers that a plan covers, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from reasonkv.methods.base import OF_VARIANT, Method, Requirements, SlotState
from reasonkv.methods.frequency import layer_scores
from reasonkv.methods.keys import comparison_vectors, unit_vectors
from reasonkv.methods.options import Count, Share
from reasonkv.methods.phases import parse_markers, phase_markers, phases_of_tokens
from reasonkv.methods.triattention import paper_budget
from reasonkv.plan import Merge, Plan, PlanError
from reasonkv.view import SlotView

Ints: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float64]
Bools: TypeAlias = NDArray[np.bool_]
COVERAGE = 0.0625  # part of the kept prompt that is spread evenly
LOCAL_WINDOW = 32  # positions between two slots up to which they are close
LEAST_SUPPORT = 1e-4
_SPAN = {"span_start": SlotState("position", "min", torch.int32), "span_end": SlotState("position", "max", torch.int32)}


class Row(NamedTuple):
    """What planning reads of a row's slots, or of its candidates; `scores_MN` are on the device.

    A slot stands for `counts_N` tokens, from position `starts_N` to `ends_N` (ascending from slot to slot); `phases_N`
    is the phase of the first, -1 in the prompt. Slots are compared by `vectors_ND` (empty where nothing merges).
    """

    scores_MN: Tensor
    counts_N: Ints
    starts_N: Ints
    ends_N: Ints
    phases_N: Ints
    protected_N: Bools
    vectors_ND: Floats
    prompt: int = 0
    prompt_length: int = 0


class RowPlan(NamedTuple):
    """What becomes of one row: the slot that continues each slot (-1: evicted); supports are 1 beside candidates."""

    target_N: Ints
    supports_N: Floats
    candidates_N: Bools
    core_N: Bools
    fallbacks: tuple[str, ...] = ()


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
    2. Of the decode slots before the recent window, the core is what most query heads have among their best.
    3. The others are scratch. Neighbouring scratch merges, the most similar pair first; core slots and phase boundaries
       end a run of neighbours. Scratch that is still too much is evicted, the lowest score first.
    4. A group becomes one slot: the key of its best-scored source, the mean of its values over source tokens, and the
       log of their number on its logits.

    `variant="paper"` merges until everything fits, weighs values by tokens times support, adds nothing to logits and
    compares raw scores of all heads (docs/methods/cask.md).

    Args:
        variant: "corrected" or "paper".
        per_layer: every layer has a plan of its own, from its own scores.
        window: newest decode tokens that are always kept.
        prompt_share: largest part of the slots, neither recent nor protected, that the prompt may take from decode
            tokens. Unless given: 0.9, paper 1.
        core_ratio: part of stage 2's slots that the core gets, at least one slot; 0 turns the core off.
        fold: "similar" - close and similar neighbours merge while the slots do not suffice; "neighbours" - all scratch
            merges until it fits, if need be across phases and with a smaller core; "none" - scratch is evicted. Unless
            given: similar, paper neighbours.
        similarity: cosine from which neighbours are similar; with fold="neighbours" only a preference.
        mass: "log" - a merged slot's logits are raised by the log of its tokens; "none" - for runtimes that cannot.
            Unless given: log, paper none.
        markers: token ids that end a phase, "198;271;12-13" for three, the last of two tokens; or "none". Unless given,
            `for_tokenizer` fills in the paper's.
    """

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
        parse_markers(self.markers)

    @property
    def needs(self) -> Requirements:
        """Query statistics, and what merging stores; the corrected variant's window is protected."""
        merges = self.fold != "none"
        return Requirements(
            recent=self.window if self.variant == "corrected" else 0, scope="layer" if self.per_layer else "model",
            merges=merges, slot_state=_SPAN if merges else {}, log_mass=merges and self.mass == "log",
            token_ids=merges and bool(parse_markers(self.markers)), calibration=True,
        )  # fmt: skip

    def for_tokenizer(self, tokenizer: Any) -> CASK:
        """Return the method with the paper's markers in the tokenizer's ids, unless markers are given."""
        return self if self.markers else replace(self, markers=phase_markers(tokenizer) or "none")

    def plan(self, view: SlotView, keep: int) -> Plan:
        return self.plan_layers([view], keep)[0]

    def prompt_stage(self, row: Row, keep: int, recent: int, coverage: float = COVERAGE) -> Bools:
        """Return the prompt slots that are kept, bool [P]: protected ones, some evenly spread, the best of the rest.

        The prompt gets its share of the slots beside the recent and protected decode slots, and what the decode
        candidates cannot fill; it leaves them two slots if there are as many.
        """
        P, decode_n = row.prompt, row.protected_N[row.prompt :].copy()
        decode_n[len(decode_n) - recent :] = True
        candidates, free = int((~decode_n).sum()), keep - int(decode_n.sum())
        target = min(max(int(self.prompt_share * free), free - candidates), free - min(2, candidates), P)
        is_kept = row.protected_N[:P].copy()
        target = max(target, int(is_kept.sum()))
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

    def core(self, scores_Mn: NDArray[Any], scores_n: Floats, size: int, slots: int) -> Bools:
        """Return the core, bool [n], by votes, score and age; a head votes for its `size` best, of equals the older."""
        n, is_core_n = len(scores_n), np.zeros(len(scores_n), dtype=bool)
        if size > 0:
            least_M1 = np.partition(scores_Mn, n - size, axis=-1)[:, n - size, None]
            named_Mn = scores_Mn >= least_M1
            if named_Mn.sum() > size * len(scores_Mn):
                above_Mn = scores_Mn > least_M1
                equal_Mn = named_Mn & ~above_Mn
                named_Mn = above_Mn | (equal_Mn & (equal_Mn.cumsum(-1) <= size - above_Mn.sum(-1, keepdims=True)))
            is_core_n[np.lexsort((-scores_n, -named_Mn.sum(0)))[:size]] = True
        return is_core_n

    def merge_runs(
        self, own: Row, scores_n: Floats, linked_n: Bools, is_core_n: Bools, phases_n: Ints, slots: int
    ) -> Ints | None:
        """Merge neighbouring scratch until `slots` groups are left; return which candidate continues each candidate.

        A run ends where a candidate does not directly follow the one before it (`linked_n`), at the core, and where the
        phase changes. Close and similar pairs (tier 2) merge before close ones (1) and these before others (0), then by
        the cosine of their best-scored sources, then the oldest. A merge changes the cosine of one boundary alone.
        -1: evicted. None: so few cannot be reached.
        """
        n, is_first, evicts = len(scores_n), ~is_core_n, self.fold == "similar"
        joined_n = is_first & linked_n
        joined_n[1:] &= is_first[:-1] & (phases_n[1:] == phases_n[:-1])
        surplus = int(is_first.sum()) - slots
        if surplus > int(joined_n.sum()) and not evicts:
            return None  # more runs than slots
        unit_nD = unit_vectors(own.vectors_ND)
        cosine_n, is_close_n = np.zeros(n), np.zeros(n, dtype=bool)  # of every candidate and the one before it
        (unit_nD[:-1] * unit_nD[1:]).sum(-1, out=cosine_n[1:])
        is_close_n[1:] = own.starts_N[1:] - own.ends_N[:-1] <= LOCAL_WINDOW
        tier_n = np.where(is_close_n, np.where(cosine_n >= self.similarity, 2, 1), 0)
        # by tier, the cosine of the group that starts here and the one before it; -inf: they may not merge
        order_3n = np.where(joined_n & (tier_n == [[0], [1], [2]]), cosine_n, -np.inf)
        tiers = (2,) if evicts else (2, 1, 0)
        score, anchor, joined = scores_n.tolist(), list(range(n)), joined_n.tolist()
        after, before = list(range(1, n + 1)), list(range(-1, n - 1))  # first candidates of neighbouring groups
        while surplus > 0:
            found = ((tier, int(order_3n[tier].argmax())) for tier in tiers)
            right = next((i for tier, i in found if order_3n[tier, i] > -np.inf), None)
            if right is None:
                break
            left, following = before[right], after[right]
            order_3n[:, right], is_first[right] = -np.inf, False
            after[left], surplus = following, surplus - 1
            if following < n:
                before[following] = left
            if score[anchor[right]] >= score[anchor[left]]:  # a tie goes to the later
                anchor[left], changed = anchor[right], left
            else:
                changed = following
            if changed < n and joined[changed]:
                cosine = float(np.add.reduce(unit_nD[anchor[before[changed]]] * unit_nD[anchor[changed]]))
                order_3n[:, changed] = -np.inf
                order_3n[(2 if cosine >= self.similarity else 1) if is_close_n[changed] else 0, changed] = cosine
        if surplus > 0 and not evicts:
            return None
        firsts = np.flatnonzero(is_first)
        firsts = firsts[best_first(scores_n[np.array(anchor)[firsts]])[:slots]]
        target_n = np.where(is_core_n, np.arange(n), -1)
        for first in firsts.tolist():
            target_n[first : after[first]] = anchor[first]
        return target_n

    def decode_stage(self, own: Row, scores_n: Floats, linked_n: Bools, slots: int) -> tuple[Ints, Bools] | None:
        """Return which candidate continues each candidate (-1: evicted) and which are the core; None if nothing fits.

        Where all scratch has to merge and does not fit, phase boundaries give way, and then the core.
        """
        largest = min(max(round(self.core_ratio * slots), 1 if self.core_ratio > 0 else 0), slots - 1)
        scores_Mn, anything_n = own.scores_MN.cpu().numpy(), np.zeros(len(scores_n), dtype=np.int64)
        for size in range(largest, -1, -1):
            is_core_n = self.core(scores_Mn, scores_n, size, slots)
            if self.fold == "none":
                target = np.full(len(scores_n), -1)
                best = best_first(np.where(is_core_n, np.inf, scores_n))[:slots]
                target[best] = best
                return target, is_core_n
            for phases_n in (own.phases_N, anything_n):
                merged = self.merge_runs(own, scores_n, linked_n, is_core_n, phases_n, slots - int(is_core_n.sum()))
                if merged is not None:
                    return merged, is_core_n
        return None

    def plan_row(self, row: Row, keep: int) -> RowPlan:
        """Plan one row, of whose slots exactly `keep` go on."""
        P, N, protected = row.prompt, len(row.protected_N), row.protected_N
        protected_tail = int(np.append(protected[P:][::-1], False).argmin())
        recent = min(max(self.window, protected_tail), N - P)
        stays = np.concatenate([self.prompt_stage(row, keep, recent), protected[P:]])
        # The window gives way where it would leave no two slots for the other decode tokens.
        room = keep - int(stays[:P].sum())
        if room < N - P and recent >= room:
            recent = max(0, room - 2)
        if int(stays.sum()) + int((~protected[N - recent :]).sum()) <= keep:  # else protected slots fill the window
            stays[N - recent :] = True
        made = RowPlan(np.where(stays, np.arange(N), -1), np.ones(N), ~stays & (np.arange(N) >= P), np.zeros(N, bool))
        index, slots, found = np.flatnonzero(made.candidates_N), keep - int(stays.sum()), None
        newest = index[max(0, len(index) - slots) :]
        if 1 < slots < len(index):
            scores_Mn = row.scores_MN.index_select(1, torch.as_tensor(index, device=row.scores_MN.device))
            best_n = self.best_head(scores_Mn)
            made.supports_N[index] = (functional.softplus(best_n) + LEAST_SUPPORT).cpu().numpy()
            scores_n = best_n.cpu().numpy().astype(np.float64)
            own, linked_n = Row(scores_Mn, *(cast(Any, x)[index] for x in row[1:7])), np.diff(index, prepend=-2) == 1
            found, newest = self.decode_stage(own, scores_n, linked_n, slots), index[best_first(scores_n)[:slots]]
        if found is None:  # nothing merges
            made.target_N[newest] = newest
            return made if slots >= len(index) else made._replace(fallbacks=("merge_inactive",))
        target_n, made.core_N[index] = found
        made.target_N[index] = np.where(target_n >= 0, index[target_n], -1)
        return made

    def rows(self, views: Sequence[SlotView]) -> list[Row]:
        """Return what planning reads of every row, from layers whose slots hold the same tokens."""
        first, state = views[0], views[0].state
        scores_BLqN = first.all_heads(torch.stack([layer_scores(view) for view in views], dim=1), dim=2)
        if bool(scores_BLqN.isnan().any()):
            raise PlanError("A score is NaN, so the slots have no order.")
        stored = (first.counts_BHN, *(state.get(name, first.positions_BHN) for name in _SPAN))
        counts_BN, starts_BN, ends_BN = (x_BHN[:, 0].long().cpu().numpy() for x_BHN in stored)
        is_prompt_BN, markers = first.is_prompt_BHN[:, 0].cpu().numpy(), parse_markers(self.markers)
        prompts_B, phases_BN = is_prompt_BN.sum(-1).tolist(), np.where(is_prompt_BN, -1, 0)
        lengths_B = prompts_B if first.prompt_length_B is None else first.prompt_length_B.tolist()
        for b, ids_L in enumerate((first.token_ids or ()) if markers else ()):
            phases_BN[b] = phases_of_tokens(ids_L.cpu().numpy(), lengths_B[b], markers)[starts_BN[b]]
        protected_BN = torch.stack([view.is_protected_BHN.any(1) for view in views]).any(0).cpu().numpy()
        vectors_BND = np.empty((*starts_BN.shape, 0))
        if self.fold != "none":
            vectors_BND = comparison_vectors(views).cpu().numpy().astype(np.float64)
        arrays = (counts_BN, starts_BN, ends_BN, phases_BN, protected_BN, vectors_BND, prompts_B, lengths_B)
        return [Row(*of_row) for of_row in zip(scores_BLqN.flatten(1, 2), *arrays, strict=True)]

    def plan_layers(self, views: Sequence[SlotView], keep: int) -> list[Plan]:
        """Plan all layers: one set of slots and groups for all, or with `per_layer` one for each."""
        if self.per_layer and len(views) > 1:
            return [self.plan(view, keep) for view in views]
        first, rows = views[0], tuple(self.plan_row(row, keep) for row in self.rows(views))
        (B, H, N), device = first.positions_BHN.shape, first.positions_BHN.device
        fallbacks = tuple(sorted({name for row in rows for name in row.fallbacks}))
        target_BN = torch.from_numpy(np.stack([row.target_N for row in rows]))

        def for_heads(x: Tensor, dtype: torch.dtype) -> Tensor:
            return x.to(device, dtype)[:, None].expand(B, H, -1).contiguous()

        stays_BN, is_kept_BN = target_BN >= 0, target_BN == torch.arange(N)
        kept_BHK = for_heads(is_kept_BN.nonzero()[:, 1].view(B, keep), torch.int64)
        if int(stays_BN.sum()) == B * keep:  # nothing merged
            return [CaskPlan(kept_BHK, fallbacks=fallbacks, rows=rows) for _ in views]
        into_BN = (is_kept_BN.cumsum(1) - 1).gather(1, target_BN.clamp(min=0)).where(stays_BN, torch.tensor(0))

        def summed(x_BN: Tensor) -> Tensor:
            return torch.zeros(B, keep, dtype=torch.float64).scatter_add_(1, into_BN, x_BN * stays_BN)

        mass_BN = counts_BN = first.counts_BHN[:, 0].cpu().double()
        if self.variant == "paper":
            supports_BN = torch.from_numpy(np.stack([row.supports_N for row in rows]))
            mass_BN = counts_BN * supports_BN.clamp(min=LEAST_SUPPORT)
        sums_BK = summed(mass_BN).clamp(min=1.0 if self.variant == "paper" else 0.0)
        is_alone_BN = summed(torch.ones(B, N, dtype=torch.float64)).gather(1, into_BN) == 1
        weights_BN = torch.where(is_alone_BN, 1.0, mass_BN / sums_BK.gather(1, into_BN)) * stays_BN
        dtype = torch.promote_types(first.keys_BHND.dtype, torch.float32)
        into_BHN = for_heads(into_BN.masked_fill(~stays_BN, -1), torch.int64)
        merge = Merge(into_BHN, for_heads(is_kept_BN, dtype), for_heads(weights_BN, dtype))
        log_mass_BHK = for_heads(summed(counts_BN).log(), dtype) if self.mass == "log" else None
        return [CaskPlan(kept_BHK, merge, log_mass_BHK=log_mass_BHK, fallbacks=fallbacks, rows=rows) for _ in views]


def best_first(scores: NDArray[Any]) -> Ints:
    """Return indices by falling score; of equals the earlier first."""
    return np.argsort(-scores, kind="stable")
