"""Decoding a batch whose rows leave it when they end, so that a row's cache and its stats stop with its text.

`model.generate` feeds pads to rows that have ended until the last one has. They would fill the row's slots, cause its
events and enter its stats. Here a row that ended is taken out of the cache; its numbers are those of the row alone,
and the rest of the batch gets faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from reasonkv.errors import ReasonKVError
from reasonkv.evaluate.generate import Sampling, end_tokens
from reasonkv.runtimes.transformers import CompressedCache, RowStats


class DecodingError(ReasonKVError, RuntimeError):
    """A generation whose text cannot be trusted."""


@dataclass(frozen=True)
class Request:
    """One row: int64 ids of its prompt (at least one), its row seed, and the most tokens it may write."""

    prompt_P: Tensor
    limit: int
    row_seed: int = 0


@dataclass(frozen=True)
class Generated:
    """What came of a request.

    Args:
        tokens: ids up to and including the first end-of-sequence token.
        truncated: whether the limit was met before that token.
        stats: of the row at its end; the last token is written and never fed.
    """

    tokens: list[int]
    truncated: bool
    stats: RowStats


@torch.no_grad()
def decode_batch(
    model: PreTrainedModel,
    cache: Cache,
    requests: Sequence[Request],
    *,
    sampling: Sampling | None = None,
    seed: int = 0,
) -> list[Generated]:
    """Generate for a batch; a row writes what `model.generate` would write for it alone, up to rounding.

    Args:
        model: a causal language model.
        cache: an empty stock `DynamicCache`, or a `CompressedCache` made with the requests' prompt lengths.
        requests: the rows.
        sampling: None for greedy.
        seed: of sampling.

    Raises:
        DecodingError: the logits hold NaN.
    """
    ends = set(end_tokens(model))
    logits_BV, mask_BL = _prefill(model, cache, requests)
    mask_BL = torch.cat([mask_BL, mask_BL.new_ones(len(requests), max(one.limit for one in requests))], dim=1)
    columns = mask_BL.shape[1] - max(one.limit for one in requests)
    padded = not bool(mask_BL.all())
    row_seed_B = torch.tensor([one.row_seed for one in requests], device=model.device)
    written: list[list[int]] = [[] for _ in requests]
    finished: dict[int, Generated] = {}
    alive = list(range(len(requests)))
    while True:
        scores_BV = logits_BV.float()
        if sampling is not None:
            scores_BV = sampling.scores(scores_BV, len(written[alive[0]]), seed=seed, row_seed_B=row_seed_B)
        best_B, chosen_B = scores_BV.max(dim=-1)
        if bool(best_B.isnan().any()):
            raise DecodingError("Generation failed because the logits are not finite; try --dtype float32.")
        for row, token in zip(alive, chosen_B.tolist(), strict=True):
            written[row].append(token)
        going = [written[row][-1] not in ends and len(written[row]) < requests[row].limit for row in alive]
        if not all(going):
            for place, row in enumerate(alive):
                if not going[place]:
                    stats = _stats(cache, place, len(requests[row].prompt_P), len(written[row]))
                    finished[row] = Generated(written[row], written[row][-1] not in ends, stats)
            alive = [row for row, goes_on in zip(alive, going, strict=True) if goes_on]
            if not alive:
                return [finished[row] for row in range(len(requests))]
            keep = torch.tensor(going, device=model.device).nonzero()[:, 0]
            cache.batch_select_indices(keep)
            chosen_B, row_seed_B, mask_BL = chosen_B[keep], row_seed_B[keep], mask_BL[keep]
        columns += 1
        positions = [len(requests[row].prompt_P) + len(written[row]) - 1 for row in alive]
        logits_BV = model(
            chosen_B[:, None],
            attention_mask=mask_BL[:, :columns] if padded else None,
            position_ids=torch.tensor(positions, device=model.device)[:, None],
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]


def _prefill(model: PreTrainedModel, cache: Cache, requests: Sequence[Request]) -> tuple[Tensor, Tensor]:
    """Feed the prompts, right-aligned, in pieces that end where the schedule of any row puts an event.

    Returns:
        Logits [B, V] after each row's last prompt token, and the mask [B, L] of everything fed.
    """
    rest = [len(one.prompt_P) for one in requests]
    device, masks, logits = model.device, [], [torch.empty(0)] * len(requests)
    while any(rest):
        width = max(rest)
        if isinstance(cache, CompressedCache):
            far = cache.tokens_to_next_event()
            width = min([width, *(n for n, left in zip(far, rest, strict=True) if n is not None and n < left)])
        ids_BQ = torch.zeros(len(requests), width, dtype=torch.long)
        positions_BQ, new_BQ = torch.zeros_like(ids_BQ), torch.zeros_like(ids_BQ)
        for row, one in enumerate(requests):
            count = min(width, rest[row])
            start = len(one.prompt_P) - rest[row]
            ids_BQ[row, width - count :] = one.prompt_P[start : start + count]
            positions_BQ[row, width - count :] = torch.arange(start, start + count)
            new_BQ[row, width - count :] = 1
        masks.append(new_BQ.to(device))
        mask_BL = torch.cat(masks, dim=1)
        logits_BV = model(
            ids_BQ.to(device),
            attention_mask=None if bool(mask_BL.all()) else mask_BL,
            position_ids=positions_BQ.to(device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        for row in range(len(requests)):
            ended = 0 < rest[row] <= width
            rest[row] -= min(width, rest[row])
            if ended:
                logits[row] = logits_BV[row]
    return torch.stack(logits), torch.cat(masks, dim=1)


def _stats(cache: Cache, place: int, prompt: int, written: int) -> RowStats:
    """The row's stats now; a stock cache's follow from its lengths."""
    if isinstance(cache, CompressedCache):
        return cache.stats().rows[place]
    fed, decoded = prompt + written - 1, written - 1
    slot = sum(
        layer.keys.shape[1] * (layer.keys.shape[3] + layer.values.shape[3]) * layer.keys.element_size()
        for layer in cache.layers
        if type(layer) is DynamicLayer  # sliding-window layers are bounded by the model itself
    )
    return RowStats(
        length=fed,
        prompt=prompt,
        physical_mean=(prompt + 1 + fed) / 2 if decoded else 0.0,
        physical_peak=fed,
        physical_terminal=fed,
        events=0,
        tokens_dropped=0,
        tokens_folded=0.0,
        bytes_held=fed * slot,
        bytes_peak=fed * slot,
        bytes_full=fed * slot,
    )
