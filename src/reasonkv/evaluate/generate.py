"""Free generation of a left-padded batch, with the stock cache or a compressed one, and sampling that no batch changes.

Sampling is greedy decoding of noisy scores: the largest of (logit / temperature + Gumbel noise) is an exact sample of
the softmax. The noise is a hash of (seed, row seed, step, token id), so a row's text depends on its own numbers alone:
not on the batch, its order, or any generator's state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Cache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from reasonkv import noise

_SAMPLING = -1  # stands where methods put their layer, so that no method draws the same numbers


@dataclass(frozen=True)
class Sampling:
    """Temperature and nucleus of sampled generation."""

    temperature: float = 0.6
    top_p: float = 0.95

    def scores(self, logits_BV: Tensor, step: int, *, seed: int, row_seed_B: Tensor) -> Tensor:
        """Scores whose largest entry is a sample of every row.

        Args:
            logits_BV: the model's logits, any float dtype.
            step: number of the output token, from 0.
            seed: the run's seed.
            row_seed_B: int64, see `row_seed`.

        Returns:
            float32 [B, V], -inf outside the nucleus: the most likely tokens up to the first whose predecessors hold
            a share `top_p` between them.
        """
        scaled_BV = logits_BV.float() / self.temperature
        if self.top_p < 1:
            ordered = scaled_BV.sort(dim=-1, descending=True, stable=True)
            share_BV = ordered.values.softmax(-1)
            outside_BV = share_BV.cumsum(-1) - share_BV >= self.top_p
            scaled_BV = scaled_BV.masked_fill(outside_BV.scatter(1, ordered.indices, outside_BV), -torch.inf)
        tokens_V = torch.arange(logits_BV.shape[-1], device=logits_BV.device)
        row_seed_B1 = row_seed_B.to(logits_BV.device)[:, None]
        drawn_BV = noise.uniform(tokens_V, seed=seed, row_seed=row_seed_B1, layer=_SAMPLING, head=0, event=step)
        return scaled_BV + noise.gumbel(drawn_BV)


class SamplingNoise(LogitsProcessor):  # type: ignore[misc]  # transformers is not followed by the type checker
    """`Sampling` for `model.generate(..., do_sample=False, logits_processor=[...])`.

    Args:
        sampling: temperature and nucleus.
        columns: columns of the prompt, padding included, from which the step is counted.
        seed: the run's seed.
        row_seeds: one per row of the batch.
    """

    def __init__(self, sampling: Sampling, columns: int, *, seed: int, row_seeds: Sequence[int]) -> None:
        self.sampling, self.columns, self.seed = sampling, columns, seed
        self.row_seed_B = torch.tensor(list(row_seeds), dtype=torch.long)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Noisy scores [B, V] for the token after `input_ids` [B, L]."""
        step = input_ids.shape[1] - self.columns
        return self.sampling.scores(scores, step, seed=self.seed, row_seed_B=self.row_seed_B)


def row_seed(example: int, sample: int = 0) -> int:
    """The row seed of sampling and of methods: the example below 2 ** 32, the sample above; sample 0 is the example."""
    return example + (sample << 32)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """int64 token ids [P] of a text, with nothing added around it."""
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long)


def end_tokens(model: PreTrainedModel) -> list[int]:
    """The ids that end a generation, most usual first; empty when the model names none."""
    own = model.generation_config
    found = own.eos_token_id if own is not None else None
    if found is None:
        return []
    return list(found) if isinstance(found, list) else [found]


def context_length(model: PreTrainedModel) -> int | None:
    """Most positions the model was made for, or None if its configuration does not say."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return None if limit is None else int(limit)


def generate_rows(
    model: PreTrainedModel,
    prompts: Sequence[Tensor],
    max_new_tokens: int,
    *,
    sampling: Sampling | None = None,
    seed: int = 0,
    row_seeds: Sequence[int] | None = None,
    cache: Cache | None = None,
) -> list[Tensor]:
    """Generate for a batch of prompts; what the checkpoint says about sampling is overridden.

    Args:
        model: a causal language model.
        prompts: int64 ids [P] per row.
        max_new_tokens: most tokens per row.
        sampling: None for greedy.
        seed: of sampling.
        row_seeds: of sampling, one per row (0 each unless given); rows that share one and their prompt are equal.
        cache: `past_key_values`, or None for the stock cache.

    Returns:
        int64 ids [T] per row, up to and including its first end-of-sequence token.
    """
    longest = max(len(prompt) for prompt in prompts)
    ids_BL = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask_BL = torch.zeros_like(ids_BL)
    for row, prompt in enumerate(prompts):
        ids_BL[row, longest - len(prompt) :] = prompt
        mask_BL[row, longest - len(prompt) :] = 1
    ends = end_tokens(model)
    options: dict[str, Any] = {} if cache is None else {"past_key_values": cache}
    if sampling is not None:
        seeds = [0] * len(prompts) if row_seeds is None else row_seeds
        processor = SamplingNoise(sampling, longest, seed=seed, row_seeds=seeds)
        options["logits_processor"] = LogitsProcessorList([processor])
    with torch.no_grad():
        out_BN: Any = model.generate(
            input_ids=ids_BL.to(model.device),
            attention_mask=mask_BL.to(model.device),
            generation_config=_settings(model, ends, max_new_tokens),
            **options,
        )
    return [_until_end(row_N, ends) for row_N in out_BN[:, longest:].cpu()]


def _settings(model: PreTrainedModel, ends: list[int], max_new_tokens: int) -> GenerationConfig:
    own = model.generation_config
    pad = own.pad_token_id if own is not None else None
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=ends or None,
        pad_token_id=pad if pad is not None else (ends[0] if ends else 0),
        do_sample=False,
    )


def _until_end(row_N: Tensor, ends: Sequence[int]) -> Tensor:
    stops = torch.isin(row_N, torch.tensor(ends, dtype=torch.long)).nonzero()
    return row_N[: int(stops[0]) + 1] if len(stops) else row_N
