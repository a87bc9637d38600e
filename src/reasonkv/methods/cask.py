"""CASK: a protected core, and the rest folded into neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reasonkv.budget import Budget
from reasonkv.methods.base import Method, Requirements, SlotState
from reasonkv.methods.cask_phases import PAPER_MARKERS, phase_markers, phases_of_tokens
from reasonkv.methods.cask_plan import Folding, Operator, Representative, Rules
from reasonkv.methods.cask_stages import PromptMode, RowPlan, RowSlots, Shares, plan_row
from reasonkv.methods.frequency import Aggregation, FrequencyOptions, frequency_scores
from reasonkv.plan import Fold, Plan
from reasonkv.view import SlotView

__all__ = ["CASK", "PAPER_MARKERS", "CaskPlan", "phase_markers", "phases_of_tokens"]

Profile = Literal["default", "paper"]
_SPAN = {"span_start": SlotState("position", "min", torch.int32), "span_end": SlotState("position", "max", torch.int32)}
_PROFILES: dict[str, dict[str, Any]] = {
    "default": {"scores": "z", "prompt_share": 0.9, "fold": "similar", "operator": "mean", "mass": "log"},
    "paper": {"scores": "raw", "prompt_share": 1.0, "fold": "neighbours", "operator": "keepkv", "mass": "none"},
}


@dataclass(frozen=True)
class CaskPlan(Plan):
    """A plan that also tells how it came about, one `RowPlan` per row, for observers."""

    rows: tuple[RowPlan, ...] = ()


@dataclass(frozen=True)
class CASK(Method):
    """Protect what the coming queries will attend to, fold the rest into its neighbours (CASK, 2026; the code is
    Skyline-23/CASK at 02c2f8b, the scores are TriAttention's, arXiv 2604.04921).

    One set of slots for all layers and heads (`per_layer`: one per layer). At an event:

    1. Prompt slots are evicted down to their share: an evenly spread reserve, and the best by score.
    2. Of the decode slots but the newest, a core is protected: what most query heads name among their best (`vote`),
       or what scores best (`score`). The rest is scratch.
    3. Neighbouring scratch that is close and similar is merged, most similar first; core slots and phase boundaries
       keep runs apart. Scratch that does not fit then is evicted, worst score first.
    4. A group becomes one slot: the key of its best-scored source, the weighted mean of its values, and, with
       `mass="log"`, + log(source tokens) on its logits.

    `profile=paper` is the reference, with its quirks:

    - step 3 goes on below the similarity, until all scratch fits (`fold=neighbours`); if the runs are too many for
      that, phase boundaries give way, then the core;
    - a group's values weigh count x support, support = softplus(raw score) + 1e-4, divided by max(sum, 1): tiny
      supports shrink the value; `operator=mean` SUMS the values;
    - a folded slot enters the softmax as one key, whatever it stands for (`mass=none`);
    - the prompt takes all slots but the window and two (`prompt_share=1`);
    - `prompt_stage=pin` with a prompt that fills the budget keeps the newest slots alone, sinks lost (guard
      prefix_budget_exhausted);
    - scores are not standardised, although a maximum is taken over all heads.

    Two differences of form: what the budget protects stays in either profile (`paper_budget` protects nothing), and
    exactly the budget's slots stay where the reference returns one fewer (window + 1 decode tokens beside a prompt that
    is being evicted: one more prompt slot stays). The reference's tie-breaking noise, 1e-6 on stage 1's scores, is left
    out; of equal scores the older slot stays.

    The default profile corrects: only what is redundant is folded (a name and its number are neighbours, and one slot
    cannot stand for both), true weighted means, log mass, standardised scores, a tenth of what is neither recent nor
    protected for the decode stage, and a pinned prompt that does not fit is evicted after all (with the same guard).

    Args:
        profile: "default" or "paper".
        per_layer: every layer has a plan of its own, from its own scores.
        window: newest decode tokens that always stay.
        prompt_stage: "evict" - step 1 (the reference's `count_prompt_tokens`); "pin" - the prompt stays; "open" - no
            step 1, prompt tokens are candidates of step 2 (the reference's `allow_prefill_compression`).
        prompt_share: most of the slots neither recent nor protected that the prompt may take from decode tokens; -1
            stands for the profile's own.
        coverage: part of the kept prompt that is evenly spread.
        core: "vote" or "score".
        core_ratio: part of step 2's slots that the core gets.
        core_least: slots of the core at the least.
        promotion: scratch with this part of the core's lowest score joins the core; 0 is off.
        fold: "neighbours" - all scratch is merged until it fits, however unlike; "similar" - neighbours that are close
            and similar are merged while the slots do not suffice, then the worst scratch is evicted; "none" - it is
            evicted at once; "" stands for the profile's own.
        operator: how a group's values are weighted: "mean" - by source tokens; "keepkv" - times their supports; ""
            stands for the profile's own.
        representative: "score_max_source" - the group's key is its best source's; "weighted_latest" - the weighted mean
            of all, moved to the latest position.
        local_window: positions between spans up to which two slots are close.
        similarity: cosine from which they are similar. With fold="neighbours" a preference: merging goes on below it.
        value_gate: most distance between two slots' projected values; 0 is off.
        mass_gate: most summed score of a pair, in mean scores of the best; 0 is off.
        phases: runs end where the phase changes (between prompt and decode tokens even without markers).
        markers: token-id sequences that end a phase, "198;271;12-13" for three, the last of two tokens; "none"; ""
            stands for the reference's texts in the tokenizer's ids (`phase_markers`), which the commands fill in
            (`for_tokenizer`); without a tokenizer there are none.
        mass: "log" - a folded slot's logits are raised by the log of its source tokens; "none" - for runtimes that add
            nothing to logits; "" stands for the profile's own.
        scores: "z" - standardised per query head over the candidates; "raw"; "" stands for the profile's own.
        aggregation, mlr, trig: of the score, see `FrequencyOptions`.

    """

    name: ClassVar[str] = "cask"
    title: ClassVar[str] = "Protected core by expected score, the rest folded into neighbours"
    paper: ClassVar[str] = "CASK, github.com/Skyline-23/CASK"

    profile: Profile = "default"
    per_layer: bool = False
    window: int = 8
    prompt_stage: PromptMode = "evict"
    prompt_share: float = -1.0
    coverage: float = 0.0625
    core: Literal["vote", "score"] = "vote"
    core_ratio: float = 0.5
    core_least: int = 1
    promotion: float = 0.0
    fold: Folding | Literal[""] = ""
    operator: Operator | Literal[""] = ""
    representative: Representative = "score_max_source"
    local_window: int = 32
    similarity: float = 0.985
    value_gate: float = 0.0
    mass_gate: float = 0.0
    phases: bool = True
    markers: str = ""
    mass: Literal["log", "none", ""] = ""
    scores: Literal["z", "raw", ""] = ""
    aggregation: Aggregation = "mean"
    mlr: bool = True
    trig: bool = True

    def __post_init__(self) -> None:
        if self.profile not in get_args(Profile):
            raise ValueError(f"profile must be default or paper, not {self.profile!r}.")
        for key, value in _PROFILES[self.profile].items():
            if getattr(self, key) in ("", -1.0):
                object.__setattr__(self, key, value)
        for key, allowed in (
            ("prompt_stage", ("evict", "pin", "open")),
            ("core", ("vote", "score")),
            ("fold", get_args(Folding)),
            ("operator", ("mean", "keepkv")),
            ("representative", ("score_max_source", "weighted_latest")),
            ("mass", ("log", "none")),
            ("scores", ("z", "raw")),
        ):
            if getattr(self, key) not in allowed:
                raise ValueError(f"{key} must be {' or '.join(allowed)}, not {getattr(self, key)!r}.")
        for key in ("prompt_share", "coverage", "core_ratio"):
            if not 0.0 <= getattr(self, key) <= 1.0:
                raise ValueError(f"{key} must be between 0 and 1, not {getattr(self, key)}.")
        for key in ("window", "core_least", "local_window", "promotion", "value_gate", "mass_gate"):
            if not getattr(self, key) >= 0:
                raise ValueError(f"{key} must be at least 0, not {getattr(self, key)}.")
        assert self.frequency and self.marker_ids is not None  # checked where they are read

    @property
    def frequency(self) -> FrequencyOptions:
        """The options of the score."""
        return FrequencyOptions(self.aggregation, self.mlr, self.trig)

    @property
    def _folds(self) -> bool:
        return self.fold != "none"

    @property
    def marker_ids(self) -> tuple[tuple[int, ...], ...]:
        """`markers` as token ids; none where they are left to a tokenizer that is not known."""
        if self.markers in ("", "none"):
            return ()
        try:
            return tuple(tuple(int(token) for token in one.split("-")) for one in self.markers.split(";") if one)
        except ValueError:
            raise ValueError(f"markers are token ids like 198;271;12-13, or none, not {self.markers!r}.") from None

    @property
    def rules(self) -> Rules:
        """How the second stage consolidates."""
        names = {field.name for field in fields(Rules)}
        given: dict[str, Any] = {key: value for key, value in self.options().items() if key in names}
        return Rules(**given)

    @property
    def shares(self) -> Shares:
        """How the slots are divided."""
        return Shares(
            self.prompt_stage, self.prompt_share, self.coverage, self.window,
            normalise=self.scores == "z", paper=self.profile == "paper",
        )  # fmt: skip

    @property
    def needs(self) -> Requirements:
        """Query statistics and what the options ask for; in the default profile the window is protected."""
        return Requirements(
            recent=0 if self.profile == "paper" else self.window,
            scope="layer" if self.per_layer else "model",
            folds=self._folds,
            slot_state=_SPAN if self._folds else {},
            log_mass=self._folds and self.mass == "log",
            token_ids=self._folds and self.phases and bool(self.marker_ids),
            calibration=True,
            output_projection=self._folds and self.value_gate > 0.0,
        )

    @classmethod
    def paper_budget(cls, tokens: int, entry: Literal["command_line", "library"] = "command_line") -> Budget:
        """The budget of the reference's entry points.

        Args:
            tokens: slots that stay, prompt included.
            entry: "command_line" - `run-one` and the prompt-heavy runs (with `prompt_stage=evict`); "library" - the
                replay harness behind its reasoning tables (with `prompt_stage=pin`).

        """
        if entry == "command_line":
            return Budget(tokens, interval=128, sinks=0, recent=0, cut_prompt="first_event", prompt="count")
        return Budget(
            tokens,
            interval=128,
            sinks=0,
            recent=0,
            trigger="grid",
            trigger_counts="decode",
            cut_prompt="first_event",
            prompt="count",
        )

    def for_tokenizer(self, tokenizer: Any) -> CASK:
        """With the markers that are not given as the tokenizer's ids."""
        return replace(self, markers=phase_markers(tokenizer) or "none") if self.markers == "" else self

    def spec(self) -> str:
        """As for every method, but against the defaults of the profile."""
        base = CASK(profile=self.profile).options() | {"profile": "default"}
        changed = [f"{key}={value}" for key, value in self.options().items() if value != base[key]]
        return self.name + (":" + ",".join(changed) if changed else "")

    def plan(self, view: SlotView, keep: int) -> Plan:
        """One layer alone; see `plan_layers`."""
        return self._plan_together([view], keep)[0]

    def plan_layers(self, views: Sequence[SlotView], keep: int) -> list[Plan]:
        """One set of slots and groups for all layers, or with `per_layer` one for each."""
        if self.per_layer:
            return [self.plan(view, keep) for view in views]
        return self._plan_together(views, keep)

    def _plan_together(self, views: Sequence[SlotView], keep: int) -> list[Plan]:
        return self.plans_of(
            views, [plan_row(row, keep, self.shares, self.rules) for row in self.row_slots(views, keep)]
        )

    def plans_of(self, views: Sequence[SlotView], rows: Sequence[RowPlan]) -> list[Plan]:
        """The rows' plans as one plan per layer, all equal but for each layer's own rotary embedding."""
        first = views[0]
        (B, H, _), device = first.positions_BHN.shape, first.positions_BHN.device

        def for_heads(parts: list[NDArray[Any]], dtype: torch.dtype) -> Tensor:
            whole = torch.from_numpy(np.stack(parts)).to(device, dtype)
            return whole[:, None].expand(B, H, -1).contiguous()

        # float64 models fold in float64, others in float32
        dtype = torch.promote_types(first.keys_BHND.dtype, torch.float32)
        kept_BHK = for_heads([row.kept_K for row in rows], torch.int64)
        guards = tuple(sorted({guard for row in rows for guard in row.guards}))
        if not any(row.folds for row in rows):
            return [CaskPlan(kept_BHK, guards=guards, rows=tuple(rows)) for _ in views]
        into_BHN = for_heads([row.into_N for row in rows], torch.int64)
        keys_BHN = for_heads([row.key_weights_N for row in rows], dtype)
        values_BHN = for_heads([row.value_weights_N for row in rows], dtype)
        log_mass_BHK = for_heads([row.log_mass_K for row in rows], dtype) if self.mass == "log" else None
        moves = self.representative == "weighted_latest"
        return [
            CaskPlan(
                kept_BHK,
                Fold(into_BHN, keys_BHN, values_BHN, view.rotary if moves else None),
                log_mass_BHK=log_mass_BHK,
                guards=guards,
                rows=tuple(rows),
            )
            for view in views
        ]

    def row_slots(self, views: Sequence[SlotView], keep: int) -> list[RowSlots]:
        """What planning needs to know of every row; the only reads of the layers' tensors.

        Args:
            views: the layers one plan covers; their slots hold the same tokens.
            keep: slots that stay.

        """
        first = views[0]
        scores_BLqN = first.all_heads(torch.stack([self._scores(view) for view in views], dim=1), dim=2)
        scores_BMN = scores_BLqN.flatten(1, 2)
        vectors_BND = comparison_vectors(views).cpu().numpy().astype(np.float64) if self._folds else None
        gated = self._folds and self.value_gate > 0.0
        values_BNE = projected_values(views).cpu().numpy().astype(np.float64) if gated else None
        positions_BN, counts_BN = _host(first.positions_BHN), _host(first.counts_BHN)
        starts_BN, ends_BN = (_host(first.state.get(name, first.positions_BHN)) for name in _SPAN)
        is_prompt_BN = first.is_prompt_BHN[:, 0].cpu().numpy()
        protected_BN = torch.stack([view.is_protected_BHN.any(1) for view in views]).any(0).cpu().numpy()
        B = len(positions_BN)
        prompts = is_prompt_BN.sum(-1).tolist() if first.prompt_length_B is None else first.prompt_length_B.tolist()
        rows = []
        for b in range(B):
            phases_N = np.where(is_prompt_BN[b], -1, 0)
            if self.marker_ids and first.token_ids is not None:
                ids_L = first.token_ids[b].cpu().numpy()
                phases_N = phases_of_tokens(ids_L, prompts[b], self.marker_ids)[starts_BN[b]]
            held = int(is_prompt_BN[b].sum())
            # a pinned prompt counts whole in the reference, even once its guard has dropped some of it
            is_full = self.prompt_stage == "pin" and self.profile == "paper" and prompts[b] >= keep
            rows.append(
                RowSlots(
                    prefix=max(held, prompts[b]) if is_full else held,
                    protected_N=protected_BN[b],
                    scores_MN=scores_BMN[b],
                    counts_N=counts_BN[b],
                    starts_N=starts_BN[b],
                    ends_N=ends_BN[b],
                    positions_N=positions_BN[b],
                    phases_N=phases_N,
                    vectors_ND=None if vectors_BND is None else vectors_BND[b],
                    values_NE=None if values_BNE is None else values_BNE[b],
                )
            )
        return rows

    def _scores(self, view: SlotView) -> Tensor:
        assert view.calibration is not None and view.rotary is not None
        return frequency_scores(view.keys_BHND, view.calibration, view.rotary, view.length_B, self.frequency)


def comparison_vectors(views: Sequence[SlotView]) -> Tensor:
    """What slots are compared by: unit keys before RoPE, averaged over layers and KV heads; float32 or 64 [B, N, D].

    The rotation is linear, keeps norms, and is the same for all heads of a slot, so the rotated unit keys are averaged
    and un-rotated once. Averaging over query heads instead counts every KV head equally often: the same.

    Args:
        views: layers whose heads hold the same tokens.

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


def projected_values(views: Sequence[SlotView]) -> Tensor:
    """Values through the output projection, averaged over layers and query heads: [B, N, E], E the model's width."""
    total: Tensor | None = None
    for view in views:
        assert view.output_projection_HqDM is not None
        Hq, D, E = view.output_projection_HqDM.shape
        B, H, N, _ = view.values_BHND.shape
        dtype = torch.promote_types(view.values_BHND.dtype, torch.float32)
        weight_hE = view.output_projection_HqDM.to(dtype).view(H, Hq // H, D, E).sum(1).flatten(0, 1) / Hq
        projected_BNE = view.values_BHND.to(dtype).transpose(1, 2).reshape(B, N, H * D) @ weight_hE
        total = projected_BNE if total is None else total + projected_BNE
    assert total is not None
    return views[0].reduce(total / len(views), "mean")


def _host(x_BHN: Tensor) -> NDArray[np.int64]:
    """The first head's numbers (all heads' are the same) on the host, int64 [B, N]."""
    numbers: NDArray[np.int64] = x_BHN[:, 0].long().cpu().numpy()
    return numbers
