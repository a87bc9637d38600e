"""Decoding a batch whose sequences leave it when they end, so that a sequence's cache and stats stop with its text.

`model.generate` feeds pads to sequences that have ended until the last one has. They would fill slots, cause
compactions and enter the stats. Here a sequence that ended is taken out of the cache; its numbers are those of the
sequence alone, and the rest of the batch gets faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from reasonkv.errors import ReasonKVError
from reasonkv.evaluate.chunks import feed_prompts
from reasonkv.evaluate.generate import end_tokens, noisy_scores
from reasonkv.evaluate.job import Sampling
from reasonkv.offload import input_device
from reasonkv.runtimes.transformers import CompressedCache, RowStats


class DecodingError(ReasonKVError, RuntimeError):
    """A generation whose text cannot be trusted."""


@dataclass(frozen=True)
class Request:
    """One sequence: int64 ids of its prompt (at least one), the most tokens it may write, and its row seed."""

    prompt_P: Tensor
    limit: int
    row_seed: int = 0


@dataclass(frozen=True)
class Generated:
    """What came of a request.

    Args:
        tokens: ids up to and including the first end-of-sequence token.
        truncated: whether the limit was met before that token.
        stats: of the sequence at its end; the last token is written and never fed.
    """

    tokens: list[int]
    truncated: bool
    stats: RowStats


@torch.no_grad()
def decode_batch(
    model: PreTrainedModel,
    cache: CompressedCache,
    requests: Sequence[Request],
    *,
    sampling: Sampling | None = None,
    seed: int = 0,
) -> list[Generated]:
    """Generate for a batch; a row writes what `model.generate` would write for it alone, up to rounding.

    Args:
        model: a causal language model.
        cache: empty, made with the requests' prompt lengths.
        requests: the rows.
        sampling: how tokens are drawn; None is greedy.
        seed: of sampling.

    Raises:
        DecodingError: the logits hold NaN.
    """
    drawing, ends = sampling or Sampling(), set(end_tokens(model))
    last_logits, mask_BL = feed_prompts(model, cache, [one.prompt_P for one in requests], cache.tokens_to_next_event)
    logits_BV, columns = torch.stack(last_logits), mask_BL.shape[1]
    padded = not bool(mask_BL.all())
    mask_BL = torch.cat([mask_BL, mask_BL.new_ones(len(requests), max(one.limit for one in requests))], dim=1)
    row_seed_B = torch.tensor([one.row_seed for one in requests], device=input_device(model))
    written: list[list[int]] = [[] for _ in requests]
    finished: dict[int, Generated] = {}
    alive = list(range(len(requests)))
    while True:
        step = len(written[alive[0]])
        best_B, chosen_B = noisy_scores(drawing, logits_BV, step, seed=seed, row_seed_B=row_seed_B).max(dim=-1)
        if bool(best_B.isnan().any()):
            raise DecodingError("Generation failed because the logits are not finite; try --dtype float32.")
        for row, token in zip(alive, chosen_B.tolist(), strict=True):
            written[row].append(token)
        going = [written[row][-1] not in ends and len(written[row]) < requests[row].limit for row in alive]
        if not all(going):
            stats = cache.stats().rows
            for place, row in enumerate(alive):
                if not going[place]:
                    finished[row] = Generated(written[row], written[row][-1] not in ends, stats[place])
            alive = [row for row, goes_on in zip(alive, going, strict=True) if goes_on]
            if not alive:
                return [finished[row] for row in range(len(requests))]
            keep = torch.tensor(going, device=input_device(model)).nonzero()[:, 0]
            cache.batch_select_indices(keep)
            chosen_B, row_seed_B, mask_BL = chosen_B[keep], row_seed_B[keep], mask_BL[keep]
        columns += 1
        positions = [len(requests[row].prompt_P) + len(written[row]) - 1 for row in alive]
        logits_BV = model(
            chosen_B[:, None],
            attention_mask=mask_BL[:, :columns] if padded else None,
            position_ids=torch.tensor(positions, device=input_device(model))[:, None],
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]
