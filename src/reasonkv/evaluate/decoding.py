"""Batched generation: every sequence writes what it would write alone, and leaves the batch when it ends.

A sequence that has ended is dropped from the cache (`batch_select_indices`), so its statistics are those of its own
length and the rest of the batch gets faster.

Sampling is greedy decoding of noisy scores: the largest of (logit / temperature + Gumbel noise) is an exact sample of
the softmax. The noise is a hash of (seed, row seed, step, token id), so a sequence's text depends on its own numbers
alone: not on the batch, its order, or any generator's state.

Legend: B sequences, V vocabulary, K most likely tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reasonkv import noise
from reasonkv.errors import ReasonKVError
from reasonkv.evaluate.chunks import feed_prompts
from reasonkv.evaluate.generate import encode, end_tokens, opens_thinking
from reasonkv.evaluate.settings import Sampling
from reasonkv.offload import input_device
from reasonkv.runtimes.transformers import CompressedCache, RowStats
from reasonkv.tasks.options import THINK, THINK_END

OnTokens = Callable[[int], None]
"""Called after every step with the tokens it wrote or scored."""


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
    """What came of a request."""

    tokens: list[int]  # ids up to and including the first end-of-sequence token, or the last one of a stop text
    truncated: bool  # whether the limit was met before that
    stats: RowStats  # of the sequence at its end; the last token is written and never fed
    # wall-clock seconds; every step's are divided among the sequences that were in it
    seconds: float = field(default=0.0, compare=False)


@dataclass(frozen=True)
class TextRules:
    """What the text of an output decides: where it stops, and when its thinking is ended."""

    tokenizer: PreTrainedTokenizerBase
    sampling: Sampling
    think_end: str = THINK_END

    def tail(self, tokens: Sequence[int], text: str) -> str:
        """Return the text of the newest tokens, in which `text` stands if the last one completed it."""
        last = tokens[-len(text.encode()) :]  # a token that is part of a text has at least a byte of it
        return str(self.tokenizer.decode(last, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def stops(self, tokens: Sequence[int]) -> bool:
        """Return whether an output ends with its newest token."""
        return any(text in self.tail(tokens, text) for text in self.sampling.stop)

    def thinks(self, prompt_P: Tensor) -> bool:
        """Return whether thinking goes on from the first token: the prompt opened it, or it has marks of its own."""
        if self.sampling.think_budget is None or self.think_end != THINK_END:
            return self.sampling.think_budget is not None
        return opens_thinking(self.tokenizer, prompt_P, self.think_end)


@dataclass
class _Writing:
    """A sequence under way."""

    request: Request
    thinks: bool = False
    tokens: list[int] = field(default_factory=list)
    forced: list[int] = field(default_factory=list)
    seconds: float = 0.0

    def write(self, token: int, rules: TextRules | None) -> None:
        """Append a token, or the next one of the text that ends thinking once its budget is spent."""
        self.tokens.append(self.forced.pop(0) if self.forced else token)
        if rules is None or rules.sampling.think_budget is None:
            return
        if rules.think_end in rules.tail(self.tokens, rules.think_end):
            self.thinks, self.forced = False, []
        elif not self.thinks and THINK in rules.tail(self.tokens, THINK):
            self.thinks = True
        if self.thinks and not self.forced and len(self.tokens) >= rules.sampling.think_budget:
            self.forced = encode(rules.tokenizer, rules.think_end).tolist()


def decode_batch(
    model: PreTrainedModel, cache: CompressedCache, requests: Sequence[Request], **options: Any
) -> list[Generated]:
    """Return what `decode_rows` yields, in the order of the requests; options are its own."""
    return [one for _, one in sorted(decode_rows(model, cache, requests, **options), key=lambda pair: pair[0])]


def write_full(model: PreTrainedModel, requests: Sequence[Request], **options: Any) -> list[Generated]:
    """Return what full KV writes; options are those of `decode_batch`.

    With nothing evicted a `CompressedCache` writes what the stock cache does, several times faster in large batches.
    """
    with CompressedCache(model, "full", prompt_lengths=[len(one.prompt_P) for one in requests]) as cache:
        return decode_batch(model, cache, requests, **options)


@torch.no_grad()
def decode_rows(
    model: PreTrainedModel,
    cache: CompressedCache,
    requests: Sequence[Request],
    *,
    sampling: Sampling | None = None,
    seed: int = 0,
    rules: TextRules | None = None,
    on_tokens: OnTokens = lambda count: None,
) -> Iterator[tuple[int, Generated]]:
    """Generate for a batch and yield (number of the request, what came of it) the moment a sequence ends.

    A sequence writes what `model.generate` would write for it alone, up to rounding.

    Args:
        cache: empty, made with the requests' prompt lengths.
        sampling: how tokens are drawn; None is greedy.
        rules: needed where sampling has stop texts or a budget of thinking.

    Raises:
        DecodingError: the logits hold NaN, or rules are missing.
    """
    drawing, ends, began = sampling or Sampling(), set(end_tokens(model)), time.perf_counter()
    if rules is None and (drawing.stop or drawing.think_budget):
        raise DecodingError("Stop texts and a budget of thinking need a tokenizer; give rules=TextRules(...).")
    last_logits, mask_BL = feed_prompts(model, cache, [one.prompt_P for one in requests], cache.tokens_to_next_event)
    logits_BV, columns = torch.stack(last_logits), mask_BL.shape[1]
    padded = not bool(mask_BL.all())
    mask_BL = torch.cat([mask_BL, mask_BL.new_ones(len(requests), max(one.limit for one in requests))], dim=1)
    row_seed_B = torch.tensor([one.row_seed for one in requests], device=input_device(model))
    rows = [_Writing(one, rules is not None and rules.thinks(one.prompt_P)) for one in requests]
    alive = list(range(len(requests)))
    seen_BV = _seen(requests, logits_BV) if drawing.repetition_penalty else None
    while True:
        if seen_BV is not None:
            logits_BV = penalised(logits_BV, seen_BV, drawing.repetition_penalty or 1.0)
        step = len(rows[alive[0]].tokens)
        best_B, chosen_B = next_tokens(drawing, logits_BV, step, seed=seed, row_seed_B=row_seed_B)
        if bool(best_B.isnan().any()):
            raise DecodingError("Generation failed because the logits are not finite; try --dtype float32.")
        now = time.perf_counter()
        for row, token in zip(alive, chosen_B.tolist(), strict=True):
            rows[row].write(token, rules)
            rows[row].seconds += (now - began) / len(alive)
        on_tokens(len(alive))
        whole = [rows[row].tokens[-1] in ends or (rules is not None and rules.stops(rows[row].tokens)) for row in alive]
        going = [not one and len(rows[row].tokens) < requests[row].limit for one, row in zip(whole, alive, strict=True)]
        chosen_B = torch.tensor([rows[row].tokens[-1] for row in alive], device=input_device(model))
        if not all(going):
            stats = cache.stats().rows
            for place, row in enumerate(alive):
                if not going[place]:
                    yield row, Generated(rows[row].tokens, not whole[place], stats[place], rows[row].seconds)
            now = time.perf_counter()  # what the caller does with a sequence is not decoding
            alive = [row for row, goes_on in zip(alive, going, strict=True) if goes_on]
            if not alive:
                return
            keep = torch.tensor(going, device=input_device(model)).nonzero()[:, 0]
            cache.batch_select_indices(keep)
            chosen_B, row_seed_B, mask_BL = chosen_B[keep], row_seed_B[keep], mask_BL[keep]
            seen_BV = None if seen_BV is None else seen_BV[keep]
        if seen_BV is not None:
            seen_BV[torch.arange(len(alive)), chosen_B] = True
        columns, began = columns + 1, now
        positions = [len(requests[row].prompt_P) + len(rows[row].tokens) - 1 for row in alive]
        logits_BV = model(
            chosen_B[:, None],
            attention_mask=mask_BL[:, :columns] if padded else None,
            position_ids=torch.tensor(positions, device=input_device(model))[:, None],
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]


def _seen(requests: Sequence[Request], logits_BV: Tensor) -> Tensor:
    """Return the tokens of every prompt, bool [B, V]."""
    seen_BV = torch.zeros_like(logits_BV, dtype=torch.bool)
    for row, request in enumerate(requests):
        seen_BV[row, request.prompt_P.to(logits_BV.device)] = True
    return seen_BV


# -- sampling ---------------------------------------------------------------------------------------------------------

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
