"""Free generation of a left-padded batch, with the stock cache or a compressed one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sampling:
    """Temperature and nucleus of sampled generation."""

    temperature: float = 0.6
    top_p: float = 0.95


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
    cache: Cache | None = None,
) -> list[Tensor]:
    """Generate for a batch of prompts; what the checkpoint says about sampling is overridden.

    Args:
        model: a causal language model.
        prompts: int64 ids [P] per row.
        max_new_tokens: most tokens per row.
        sampling: None for greedy.
        seed: of sampling; the caller's random state is left as it was.
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
    config = _settings(model, ends, max_new_tokens, sampling)
    options: dict[str, Any] = {} if cache is None else {"past_key_values": cache}
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(seed)
        out_BN: Any = model.generate(
            input_ids=ids_BL.to(model.device),
            attention_mask=mask_BL.to(model.device),
            generation_config=config,
            **options,
        )
    return [_until_end(row_N, ends) for row_N in out_BN[:, longest:].cpu()]


def _settings(
    model: PreTrainedModel, ends: list[int], max_new_tokens: int, sampling: Sampling | None
) -> GenerationConfig:
    own = model.generation_config
    pad = own.pad_token_id if own is not None else None
    chosen: dict[str, Any] = {"do_sample": False}
    if sampling is not None:
        chosen = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=ends or None,
        pad_token_id=pad if pad is not None else (ends[0] if ends else 0),
        **chosen,
    )


def _until_end(row_N: Tensor, ends: Sequence[int]) -> Tensor:
    stops = torch.isin(row_N, torch.tensor(ends, dtype=torch.long)).nonzero()
    return row_N[: int(stops[0]) + 1] if len(stops) else row_N
