"""R-KV: importance minus redundancy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from reasonkv.methods.base import OF_VARIANT, Requirements, ScorerMethod
from reasonkv.methods.ops import average_pool, by_head, fill_window, max_pool, window_attention
from reasonkv.methods.options import Kernel, Share, Size
from reasonkv.view import SlotView

Spare = Literal["last", "first", "none"]
_FIRST_WIDTH, _LAST_WIDTH = 32, 256  # columns compared at once; constant, so that no sequence depends on its batch


@dataclass(frozen=True)
class RKV(ScorerMethod):
    """Keep what is attended to and not said again (Cai et al., 2025, "R-KV: Redundancy-aware KV Cache Compression for
    Reasoning Models", arXiv 2505.24133: importance, redundancy estimation, joint selection).

    score = weight * importance - (1 - weight) * redundancy, both softmaxes over slots.

    The authors' code uses the redundancy of batch row 0 for every row; here every row has its own.

    Args:
        variant: "paper" - the authors' code; "vase" - VaSE's harness, which most published comparisons ran; see
            `importance` and `redundancy`.
        window: newest queries that vote; their tokens are always kept. Unless given: 8, vase 64.
        kernel: slots pooled together, odd. Unless given: 7 (maximum), vase 5 (mean).
        weight: the paper's lambda. Unless given: 0.1, vase 0.5.
        threshold: paper; cosine above which two keys count as duplicates.
        retain: paper; "last" - the newest duplicate of each key is spared; "first" - slot 0 is spared instead (a slip
            of the authors' code, for comparison only).
    """

    variants: ClassVar[dict[str, dict[str, object]]] = {
        "paper": {"window": 8, "kernel": 7, "weight": 0.1},
        "vase": {"window": 64, "kernel": 5, "weight": 0.5},
    }

    variant: Literal["paper", "vase"] = "paper"
    window: Size = OF_VARIANT
    kernel: Kernel = OF_VARIANT
    weight: Share = OF_VARIANT
    threshold: Share = 0.5
    retain: Literal["last", "first"] = "last"

    @property
    def needs(self) -> Requirements:
        return Requirements(queries=self.window, recent=self.window)

    def score(self, view: SlotView) -> Tensor:
        importance_BHn = self.importance(view)
        redundancy_BHn = self.redundancy(view)[..., : importance_BHn.shape[-1]]
        score_BHn = self.weight * importance_BHn - (1.0 - self.weight) * redundancy_BHn
        return fill_window(score_BHn, view.positions_BHN.shape[-1])

    def importance(self, view: SlotView) -> Tensor:
        """Return the attention of the window to the slots before it, with those alone in the softmax: [B, H, n].

        Paper: maximum of the LOGITS over the group, softmax, mean over queries, maximum over neighbours.
        VaSE: softmax, mean over queries, mean over neighbours, mean over the group.
        """
        attention_BHn = window_attention(view, over="old", merge_logits=self.variant == "paper").mean(2)
        return (max_pool if self.variant == "paper" else average_pool)(attention_BHn, self.kernel)

    def redundancy(self, view: SlotView) -> Tensor:
        """Return the softmax over slots of the mean cosine with the other keys.

        Paper: over all N slots, where each key's newest duplicate is spared the cosine: [B, H, N].
        VaSE: over the n slots before the window, nothing spared: [B, H, n].
        """
        if self.variant == "paper":
            return mean_cosine(view.keys_BHND, self.retain, self.threshold).softmax(-1)
        n = view.keys_BHND.shape[2] - view.queries_BHgTD().shape[3]
        return mean_cosine(view.keys_BHND[:, :, :n], "none").softmax(-1)


def mean_cosine(keys_BHND: Tensor, spare: Spare = "last", threshold: float = 0.5) -> Tensor:
    """Return the mean over i of cos(i, j), the diagonal and the spared entries counted as 0, float32 [B, H, N].

    The sum of column j is k_j . (sum of all k) - k_j . k_j over unit keys, so the N x N matrix is never formed; only
    the entries that are spared have to be found.

    Args:
        keys_BHND: keys as cached (rotated).
        spare: in each row i, "last" - the entry of the newest duplicate of i, or of slot 0 if i has none; "first" -
            the entry of slot 0; "none" - no entry.
        threshold: cosine above which two keys are duplicates, at least 0.
    """

    def of_heads(keys_RND: Tensor) -> Tensor:
        unit_RND = functional.normalize(keys_RND, dim=-1)
        column_RN = (unit_RND.sum(1, keepdim=True) @ unit_RND.mT).squeeze(1) - unit_RND.square().sum(-1)
        if spare != "none":
            spared_RN, cosine_RN = spared_columns(unit_RND, threshold if spare == "last" else None)
            # Added in float64: the order in which an accelerator adds does not show after rounding.
            spared = torch.zeros_like(column_RN, dtype=torch.float64).scatter_add_(1, spared_RN, cosine_RN.double())
            column_RN = column_RN - spared.to(column_RN.dtype)
        return column_RN / unit_RND.shape[1]

    return by_head(of_heads, keys_BHND)


def spared_columns(unit_RND: Tensor, threshold: float | None) -> tuple[Tensor, Tensor]:
    """Return for every row i of the cosine matrix the last column j != i with cos(i, j) > threshold, or 0.

    Blocks of columns are visited from the newest to the oldest, and a row leaves as soon as it has its column: work
    is O(N^2 D) only for rows without a duplicate, and memory is one block.

    Args:
        unit_RND: unit keys of R heads.
        threshold: at least 0; None names column 0 for every row.

    Returns:
        int64 [R, N], the columns; [R, N], the cosines there (0 on the diagonal).
    """
    R, N, _ = unit_RND.shape
    unit_rD = unit_RND.flatten(0, 1)  # r = R x N, the rows of all heads
    cosine_r = (unit_RND[:, :1] @ unit_RND.mT).flatten()
    cosine_r[::N] = 0.0
    column_r = torch.zeros_like(cosine_r, dtype=torch.int64)
    if threshold is None:
        return column_r.view(R, N), cosine_r.view(R, N)
    # M rows per head are compared: row_RM says which, open_RM whether they are still looking for their column.
    row_RM = torch.arange(R * N, device=unit_RND.device).view(R, N)
    start_R1, open_RM = row_RM[:, :1], torch.ones_like(row_RM, dtype=torch.bool)
    rows_RMD, high, width = unit_RND, N, _FIRST_WIDTH
    while high > 0:
        low = max(0, high - width)
        cosine_RMC = rows_RMD @ unit_RND[:, low:high].mT
        own_RM1 = (row_RM - start_R1 - low).unsqueeze(2)  # a key is no duplicate of itself
        here_RM1 = own_RM1.clamp(0, high - low - 1)
        cosine_RMC.scatter_(2, here_RM1, cosine_RMC.gather(2, here_RM1).masked_fill(own_RM1 == here_RM1, 0.0))
        hit_RM = (cosine_RMC.amax(2) > threshold) & open_RM
        hit_h = hit_RM.flatten().nonzero().squeeze(1)
        if hit_h.numel() > 0:
            cosine_hC = cosine_RMC.flatten(0, 1).index_select(0, hit_h)
            is_duplicate_hC = (cosine_hC > threshold).to(torch.uint8)
            last_h1 = high - low - 1 - is_duplicate_hC.flip(1).argmax(1, keepdim=True)  # argmax: the first of equals
            row_h = row_RM.flatten()[hit_h]
            column_r[row_h] = low + last_h1.squeeze(1)
            cosine_r[row_h] = cosine_hC.gather(1, last_h1).squeeze(1)
            open_RM = open_RM & ~hit_RM
            left = int(open_RM.sum(1).max())
            if left == 0:
                break
            if left < 0.8 * row_RM.shape[1]:  # else moving the rows costs more than it saves
                order_RM = open_RM.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :left]
                row_RM, open_RM = row_RM.gather(1, order_RM), open_RM.gather(1, order_RM)
                rows_RMD = unit_rD.index_select(0, row_RM.flatten()).view(*row_RM.shape, -1)
        high, width = low, min(2 * width, _LAST_WIDTH)
    return column_r.view(R, N), cosine_r.view(R, N)
