"""What generation promises: samples that no batch changes, and rows whose text and numbers are their own."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from models import tiny_model as family_model
from scipy.stats import chisquare
from tiny import tiny_model
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from reasonkv import Budget, CompressedCache
from reasonkv.evaluate.decoding import DecodingError, Generated, Request, decode_batch, next_tokens
from reasonkv.evaluate.generate import end_tokens, row_seed
from reasonkv.evaluate.job import Sampling

BUDGET = Budget(24, interval=12, sinks=2, recent=8, prompt="on_top")
SAMPLING = Sampling(temperature=0.9, top_p=0.9)


def prompts(lengths: list[int], vocabulary: int = 150, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(5, vocabulary, (length,), generator=generator) for length in lengths]


# -- sampling ---------------------------------------------------------------------------------------------------------


def draws(logits_V: torch.Tensor, sampling: Sampling, count: int) -> torch.Tensor:
    _, ids = next_tokens(sampling, logits_V.expand(count, -1), 3, seed=5, row_seed_B=torch.arange(count))
    return torch.bincount(ids, minlength=len(logits_V))


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_samples_have_the_frequencies_of_the_softmax(temperature: float) -> None:
    logits = torch.tensor([2.0, 1.5, 1.0, 0.0, -1.0, 0.3])
    found = draws(logits, Sampling(temperature, 1.0), 20_000)
    expected = (logits.double() / temperature).softmax(-1) * 20_000
    assert chisquare(found.numpy(), expected.numpy()).pvalue > 0.01


def test_the_nucleus_holds_the_most_likely_tokens_up_to_its_share_and_is_sampled_as_renormalised() -> None:
    logits = torch.tensor([0.1, 0.4, 0.3, 0.15, 0.05]).log()
    found = draws(logits, Sampling(1.0, 0.8), 20_000)  # 0.4 + 0.3 < 0.8, so 0.15 is in, and 0.1 is out
    assert found[0] == found[4] == 0
    expected = torch.tensor([0.4, 0.3, 0.15]) / 0.85 * 20_000
    assert chisquare(found[1:4].numpy(), expected.numpy()).pvalue > 0.01
    assert draws(logits, Sampling(1.0, 1e-9), 100)[1] == 100


def test_samples_of_steps_seeds_and_rows_are_independent() -> None:
    logits = torch.zeros(4, 8)
    rows = torch.arange(4)

    def picks(step: int, seed: int) -> list[int]:
        return next_tokens(Sampling(1.0, 1.0), logits, step, seed=seed, row_seed_B=rows)[1].tolist()

    assert picks(0, 0) == picks(0, 0)
    assert len({tuple(picks(step, seed)) for step in range(4) for seed in range(4)}) == 16
    assert len({token for step in range(4) for token in picks(step, 0)}) > 4


def test_row_seeds_of_samples_never_meet_and_the_first_is_the_example() -> None:
    seeds = {row_seed(example, sample) for example in range(50) for sample in range(50)}
    assert len(seeds) == 2500
    assert row_seed(17) == 17
    assert max(seeds) < 2**63


@pytest.mark.parametrize("method", ["full", "random", "snapkv:window=8"])
def test_a_sample_is_the_same_alone_in_any_batch_and_in_any_order(method: str) -> None:
    model = tiny_model(torch.float64)
    tokens = prompts([30, 12, 30, 21])
    requests = [Request(one, 40, row_seed(number // 2, number % 2)) for number, one in enumerate(tokens)]

    def texts(chosen: list[int]) -> dict[int, list[int]]:
        out = decode(model, method, [requests[one] for one in chosen], SAMPLING)
        return dict(zip(chosen, [one.tokens for one in out], strict=True))

    together = texts([0, 1, 2, 3])
    assert texts([3, 0, 2, 1]) == together
    for number in range(4):
        assert texts([number]) == {number: together[number]}
    again = decode(model, method, [dataclasses.replace(requests[0], row_seed=row_seed(0, 1))], SAMPLING)
    assert again[0].tokens != together[0]


# -- decoding ---------------------------------------------------------------------------------------------------------


def decode(
    model: torch.nn.Module, method: str, requests: list[Request], sampling: Sampling | None = None, budget=BUDGET
) -> list[Generated]:
    with CompressedCache(
        model,
        method,
        None if method == "full" else budget,
        prompt_lengths=[len(one.prompt_P) for one in requests],
        row_seeds=[one.row_seed for one in requests],
        max_length=200,
    ) as cache:
        return decode_batch(model, cache, requests, sampling=sampling, seed=3)


class SamplingNoise(LogitsProcessor):
    """The same sampling in transformers' own loop; `columns` are the prompt's."""

    def __init__(self, sampling: Sampling, columns: int, row_seed: int) -> None:
        self.sampling, self.columns, self.row_seed_B = sampling, columns, torch.tensor([row_seed])

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = input_ids.shape[1] - self.columns
        _, chosen = next_tokens(self.sampling, scores, step, seed=3, row_seed_B=self.row_seed_B)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen[:, None], 0.0)


def generate(
    model: torch.nn.Module,
    request: Request,
    sampling: Sampling | None = None,
    cache: CompressedCache | None = None,
) -> list[int]:
    """What `model.generate` writes for one request; with the stock cache unless another is given."""
    columns = len(request.prompt_P)
    noise = [] if sampling is None else [SamplingNoise(sampling, columns, request.row_seed)]
    settings = GenerationConfig(
        max_new_tokens=request.limit, eos_token_id=end_tokens(model) or None, pad_token_id=0, do_sample=False
    )
    out = model.generate(
        request.prompt_P[None],
        generation_config=settings,
        logits_processor=LogitsProcessorList(noise),
        past_key_values=cache,
    )
    return out[0, columns:].tolist()


def stops(model: torch.nn.Module, tokens: list[torch.Tensor], share: float = 0.15) -> None:
    """Name so many tokens ends of sequence that rows end at different places."""
    common = torch.tensor([token for one in tokens for token in generate(model, Request(one, 60))]).unique()
    model.generation_config.eos_token_id = common[: max(1, int(len(common) * share))].tolist()


@pytest.mark.parametrize("sampling", [None, SAMPLING], ids=["greedy", "sampled"])
@pytest.mark.parametrize("method", ["full", "random", "rkv:window=8"])
def test_rows_write_what_model_generate_writes_and_their_stats_are_those_of_the_row_alone(
    method: str, sampling: Sampling | None
) -> None:
    model = tiny_model(torch.float64)
    tokens = prompts([30, 12, 25, 21, 17])
    stops(model, tokens)
    requests = [Request(one, 60, number) for number, one in enumerate(tokens)]
    together = decode(model, method, requests, sampling)
    assert len({len(one.tokens) for one in together}) > 2, "rows must end at different places"
    for request, row in zip(requests, together, strict=True):
        (alone,) = decode(model, method, [request], sampling)
        assert row == alone
        assert row.stats.length == len(request.prompt_P) + len(row.tokens) - 1
        if method == "full":
            plain = generate(model, request, sampling)
        else:
            lengths, seeds = [len(request.prompt_P)], [request.row_seed]
            with CompressedCache(
                model, method, BUDGET, prompt_lengths=lengths, row_seeds=seeds, max_length=200
            ) as cache:
                plain = generate(model, request, sampling, cache)
                assert cache.stats().rows[0] == row.stats
        assert plain == row.tokens
        assert row.truncated == (row.tokens[-1] not in model.generation_config.eos_token_id)


def test_sliding_layers_of_a_padded_batch_stay_right_when_rows_leave() -> None:
    model = family_model("gemma3")
    tokens = prompts([40, 25, 33], vocabulary=200)
    requests = [Request(one, limit) for one, limit in zip(tokens, (20, 45, 31), strict=True)]
    for method in ("full", "keydiff"):
        for request, row in zip(requests, decode(model, method, requests), strict=True):
            assert decode(model, method, [request]) == [row]


def test_a_prompt_is_fed_in_the_pieces_of_its_budget() -> None:
    model = tiny_model(torch.float64)
    budget = Budget(24, interval=8, sinks=2, recent=8, prefill_chunk=16, prompt="count")
    tokens = prompts([70, 41])
    requests = [Request(one, 12) for one in tokens]
    together = decode(model, "keydiff", requests, budget=budget)
    assert all(row.stats.physical_peak <= 24 + 16 for row in together)
    assert [decode(model, "keydiff", [one], budget=budget)[0] for one in requests] == together


def test_logits_that_are_not_numbers_stop_the_run_in_one_sentence() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    with pytest.raises(DecodingError, match="not finite"):
        decode(model, "full", [Request(prompts([9])[0], 5)])
