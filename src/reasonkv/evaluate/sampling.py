"""Draw the next token of every sequence, independent of the batch.

Sampling is greedy decoding of noisy scores: the largest of (logit / temperature + Gumbel noise) is an exact sample of
the softmax. The noise is a hash of (seed, row seed, step, token id), so a sequence's text depends on its own numbers
alone: not on the batch, its order, or any generator's state.

Legend: B sequences, V vocabulary, K most likely tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from reasonkv import noise
from reasonkv.evaluate.settings import Sampling

FIRST = 256
"""Most likely tokens that are looked at first; a vocabulary of 152k is sorted only where its mass is spread wider."""
_LAYER = -1  # stands where methods put their layer, so that no method draws the same numbers


def next_tokens(
    sampling: Sampling, logits_BV: Tensor, step: int, *, seed: int, row_seed_B: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the best score and the id of the next token of every sequence, [B] each; NaN stays NaN.

    Args:
        sampling: temperature, top-k, nucleus and min-p, applied in this order; with a temperature of 0 the most likely
            token is taken.
        logits_BV: the model's logits, any float dtype.
        row_seed_B: int64, see `reasonkv.evaluate.generate.row_seed`.
    """
    if not sampling.temperature:
        best = logits_BV.max(dim=-1)
        return best.values, best.indices
    scores_BK, ids_BK = likely_tokens(sampling, logits_BV.float() / sampling.temperature)
    row_seed_B1 = row_seed_B.to(logits_BV.device)[:, None]
    drawn_BK = noise.uniform(ids_BK, seed=seed, row_seed=row_seed_B1, layer=_LAYER, head=0, event=step)
    best = (scores_BK + noise.gumbel(drawn_BK)).max(dim=-1)
    return best.values, ids_BK.gather(1, best.indices[:, None])[:, 0]


def likely_tokens(sampling: Sampling, scores_BV: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scores of the tokens that may be drawn, and their ids, [B, K] each; -inf fills up a sequence's K.

    Tokens as likely as the last one that may be drawn may be drawn, too: which of them a sort puts first is chance.

    Args:
        sampling: `top_k` tokens stay; then the most likely up to the first whose predecessors hold a share `top_p`;
            then those with at least `min_p` of the most likely one's probability.
        scores_BV: logits divided by the temperature, float32.
    """
    vocabulary, top_p = scores_BV.shape[-1], 1.0 if sampling.top_p is None else sampling.top_p
    top_k = min(sampling.top_k or vocabulary, vocabulary)
    if top_p == 1 and not sampling.min_p and top_k == vocabulary:
        return scores_BV, torch.arange(vocabulary, device=scores_BV.device).expand_as(scores_BV)
    width = min(vocabulary, FIRST if top_k == vocabulary else max(FIRST, 2 * top_k))
    while True:
        top = scores_BV.topk(width, dim=-1)
        least_B1 = top.values.new_full((len(scores_BV), 1), -torch.inf)
        if top_k < vocabulary:
            least_B1 = top.values[:, top_k - 1 : top_k]
        if top_p < 1:
            inside_BK = top.values.masked_fill(top.values < least_B1, -torch.inf)
            mass_B1 = (scores_BV if top_k == vocabulary else inside_BK).logsumexp(-1, keepdim=True)
            share_BK = (inside_BK - mass_B1).exp()
            last_B1 = (share_BK.cumsum(-1) - share_BK < top_p).sum(-1, keepdim=True) - 1
            least_B1 = torch.maximum(least_B1, top.values.gather(1, last_B1.clamp(min=0)))
        if sampling.min_p:
            least_B1 = torch.maximum(least_B1, top.values[:, :1] + math.log(sampling.min_p))
        out_BK = top.values < least_B1
        if width == vocabulary or bool(out_BK[:, -1].all()):
            return top.values.masked_fill(out_BK, -torch.inf), top.indices
        width = min(vocabulary, 8 * width)


def penalised(logits_BV: Tensor, seen_BV: Tensor, penalty: float) -> Tensor:
    """Return logits with those of seen tokens divided by a penalty where positive, and multiplied where negative."""
    lowered_BV = torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return torch.where(seen_BV, lowered_BV, logits_BV)
