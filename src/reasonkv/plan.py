"""What a method decided at one event: the slots that stay, and what is merged into them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from reasonkv.errors import ReasonKVError
from reasonkv.rotary import Rotary


class PlanError(ReasonKVError, RuntimeError):
    """A method returned a plan that no cache can carry out: a defect of the method, not of the user's input."""


@dataclass(frozen=True)
class Merge:
    """Slots merged into kept ones; every output slot is a weighted sum over its group.

    Args:
        into_BHN: int64; the output slot (0..K-1) an input slot contributes to, or -1 for a dropped slot. A kept slot
            contributes to its own output slot.
        key_weights_BHN: float32, weights within a group; they sum to 1 unless a method means otherwise. One-hot
            weights return the chosen key bit for bit.
        value_weights_BHN: the same for values.
        rotary: when given, every member's key is first turned from its own position to that of the kept slot.
    """

    into_BHN: Tensor
    key_weights_BHN: Tensor
    value_weights_BHN: Tensor
    rotary: Rotary | None = None


@dataclass(frozen=True)
class Plan:
    """One event of one layer, for rows that share their physical length N and their target K.

    Args:
        kept_BHK: int64, ascending; output slot j continues input slot kept[j]: its position, and its key and value
            unless a merge says otherwise.
        merge: None when slots are only evicted.
        state: method state that the plan itself rewrites, by name, [B, H, K]; all other state moves with its slot.
        log_mass_BHK: float32, added to the logits of every kept slot from now on; None leaves what stands there.
        fallbacks: names of the fallbacks that decided this plan; counted per row in the records.
    """

    kept_BHK: Tensor
    merge: Merge | None = None
    state: dict[str, Tensor] = field(default_factory=dict)
    log_mass_BHK: Tensor | None = None
    fallbacks: tuple[str, ...] = ()

    @property
    def new_state(self) -> dict[str, Tensor]:
        """State the plan rewrites, log mass included."""
        return self.state if self.log_mass_BHK is None else {**self.state, "log_mass": self.log_mass_BHK}

    def merged_B(self) -> Tensor | None:
        """Return how many slots of every row are merged into others, float32 mean over heads; None without a fold."""
        if self.merge is None:
            return None
        return ((self.merge.into_BHN >= 0).sum(-1) - self.kept_BHK.shape[-1]).float().mean(-1)

    def check(self, shape_BHN: tuple[int, int, int], keep: int, is_protected_BHN: Tensor | None = None) -> None:
        """Check the invariants; one pass over indices, cheap beside the gather.

        Raises:
            PlanError: wrong shape, indices out of range, not strictly ascending, or a protected slot dropped.
        """
        B, H, N = shape_BHN
        kept = self.kept_BHK
        if tuple(kept.shape) != (B, H, keep):
            raise PlanError(f"A plan must keep [{B}, {H}, {keep}] slots, got {list(kept.shape)}.")
        wrong = (kept[..., 1:] <= kept[..., :-1]).any() | (kept[..., 0] < 0).any() | (kept[..., -1] >= N).any()
        lost = torch.zeros_like(wrong)
        if is_protected_BHN is not None:
            # clamped, so that one read of both flags from the device suffices even for wrong indices
            marked = torch.zeros(shape_BHN, dtype=torch.bool, device=kept.device)
            lost = (is_protected_BHN & ~marked.scatter_(2, kept.clamp(0, N - 1), True)).any()
        is_wrong, is_lost = torch.stack([wrong, lost]).tolist()
        if is_wrong:
            raise PlanError(f"Kept slots must be strictly ascending indices below {N}.")
        if is_lost:
            raise PlanError("A plan dropped a protected slot (a sink, a recent token or a kept prompt).")
        if self.merge is not None and tuple(self.merge.into_BHN.shape) != shape_BHN:
            raise PlanError(f"A merge must name a target for every slot, [{B}, {H}, {N}].")
        for name, values in self.new_state.items():
            if tuple(values.shape) != (B, H, keep):
                raise PlanError(f"A plan's {name} must be [{B}, {H}, {keep}], not {list(values.shape)}.")
