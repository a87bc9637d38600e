"""Metrics against values computed by hand, and budgets solved for an equal mean length."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonkv.budget import Budget, BudgetError
from reasonkv.evaluate.matching import attended_slots, budget_for_mean, mean_physical
from reasonkv.evaluate.metrics import SLICE_ELEMENTS, NonFiniteError, TeacherLogprobs, TraceScore
from reasonkv.schedule import Lengths, next_event, step


def logits(*probabilities: float) -> list[float]:
    return [math.log(p) for p in probabilities]


def kl(teacher: TeacherLogprobs, ours: torch.Tensor) -> torch.Tensor:
    """KL of every position."""
    score = TraceScore()
    score.add(ours, torch.zeros(len(ours), dtype=torch.long), teacher)
    return score._chunks[0][1]


def test_metrics_equal_hand_computation() -> None:
    full = torch.tensor([logits(0.5, 0.25, 0.125, 0.125), logits(0.1, 0.2, 0.3, 0.4)])
    ours = torch.tensor([logits(0.25, 0.5, 0.125, 0.125), logits(0.1, 0.2, 0.3, 0.4)])
    score = TraceScore()
    score.add(ours, torch.tensor([0, 2]), TeacherLogprobs.from_logits(full, 4))
    metrics = score.result()
    assert metrics.top1 == 0.5
    assert metrics.top5 == 1.0
    assert metrics.first_mismatch == 0
    assert metrics.nll == pytest.approx((-math.log(0.25) - math.log(0.3)) / 2, abs=1e-6)
    assert metrics.kl == pytest.approx((0.5 * math.log(2) + 0.25 * math.log(0.5)) / 2, abs=1e-6)


def test_kl_over_the_top_tokens_puts_all_others_in_one_bucket() -> None:
    full = torch.tensor([logits(0.5, 0.3, 0.15, 0.05)])
    ours = torch.tensor([logits(0.25, 0.25, 0.2, 0.3)])
    reference = TeacherLogprobs.from_logits(full, 2)
    assert reference.ids_Nk is not None
    assert reference.ids_Nk.tolist() == [[0, 1]]
    expected = 0.5 * math.log(0.5 / 0.25) + 0.3 * math.log(0.3 / 0.25) + 0.2 * math.log(0.2 / 0.5)
    assert kl(reference, ours).item() == pytest.approx(expected, abs=1e-6)


@given(st.integers(0, 1000), st.integers(1, 20))
def test_coarser_kl_is_never_larger_and_never_negative(seed: int, k: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    full, ours = torch.randn(2, 3, 20, generator=generator) * 3
    whole = kl(TeacherLogprobs.from_logits(full, 20), ours)
    coarse = kl(TeacherLogprobs.from_logits(full, k), ours)
    assert bool((coarse <= whole + 1e-4).all())
    assert bool((coarse >= -1e-6).all())


def test_top5_asks_whether_full_kv_s_choice_is_among_the_five_most_likely() -> None:
    full = torch.zeros(2, 8)
    full[0, 7], full[1, 0] = 5, 5
    ours = torch.arange(8.0).flip(0).expand(2, 8)
    score = TraceScore()
    score.add(ours, torch.tensor([0, 0]), TeacherLogprobs.from_logits(full, 8))
    assert (score.result().top5, score.result().top1, score.result().first_mismatch) == (0.5, 0.5, 0)


def test_a_trace_without_a_mismatch_says_none_and_cutting_it_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(9, 30, generator=generator)
    tokens = torch.randint(0, 30, (9,), generator=generator)
    reference = TeacherLogprobs.from_logits(values, 5)
    whole, pieces = TraceScore(), TraceScore()
    whole.add(values, tokens, reference)
    for start, stop in ((0, 1), (1, 6), (6, 9)):
        pieces.add(values[start:stop], tokens[start:stop], reference.rows(start, stop))
    assert whole.result() == pieces.result()
    assert whole.result().first_mismatch is None
    assert whole.result().kl == pytest.approx(0, abs=1e-7)


def test_a_large_vocabulary_in_slices_gives_the_metrics_of_one_whole_softmax() -> None:
    generator = torch.Generator().manual_seed(3)
    vocabulary = SLICE_ELEMENTS // 3  # slices of three positions
    full, ours = (2 * torch.randn(2, 8, vocabulary, generator=generator)).bfloat16()
    tokens = torch.randint(0, vocabulary, (8,), generator=generator)
    teacher = TeacherLogprobs.from_logits(full, 64)
    p, q = full.double().log_softmax(-1), ours.double().log_softmax(-1)
    assert teacher.ids_Nk is not None
    torch.testing.assert_close(teacher.logprobs_Nk.double(), p.gather(1, teacher.ids_Nk), rtol=0, atol=1e-5)
    left_p, left_q = (one.scatter(1, teacher.ids_Nk, -torch.inf).logsumexp(-1) for one in (p, q))
    torch.testing.assert_close(teacher.rest_N.double(), left_p, rtol=0, atol=1e-5)
    p, q = p.gather(1, teacher.ids_Nk), q.gather(1, teacher.ids_Nk)
    expected = (p.exp() * (p - q)).sum(-1) + left_p.exp() * (left_p - left_q)
    score = TraceScore()
    score.add(ours, tokens, teacher)
    found = score.result()
    assert found.kl == pytest.approx(expected.mean().item(), abs=1e-5)
    nll = -ours.double().log_softmax(-1).gather(1, tokens[:, None]).mean().item()
    assert found.nll == pytest.approx(nll, abs=1e-5)
    score = TraceScore()
    score.add(full, tokens, teacher)  # bfloat16 has many equal logits, of which each is as good as the other
    assert (score.result().top1, score.result().kl) == (1.0, pytest.approx(0, abs=1e-6))


def test_scores_that_are_not_numbers_are_refused() -> None:
    score = TraceScore()
    score.add(torch.full((1, 4), torch.nan), torch.tensor([0]), TeacherLogprobs.from_logits(torch.zeros(1, 4), 4))
    with pytest.raises(NonFiniteError):
        score.result()


# -- equal mean length ------------------------------------------------------------------------------------------------


def slowly(budget: Budget | None, prompt: int, length: int) -> int:
    """Slots attended, one token at a time."""
    state, total = Lengths(prompt=prompt), 0
    while state.logical < prompt:
        event = next_event(budget, state)
        state, _ = step(budget, state, min(prompt, event or prompt) - state.logical)
    while state.logical < length:
        total += state.physical + 1
        state, _ = step(budget, state, 1)
    return total


budgets = st.builds(
    lambda trigger, **fields: Budget(trigger=trigger[0], trigger_counts=trigger[1], **fields),
    trigger=st.sampled_from([("occupancy", "all"), ("grid", "all"), ("grid", "decode")]),
    tokens=st.integers(12, 80),
    interval=st.integers(1, 40),
    sinks=st.integers(0, 4),
    recent=st.integers(0, 8),
    prompt=st.sampled_from(["count", "on_top"]),
    cut_prompt=st.sampled_from(["prefill", "first_event"]),
)
shapes = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 200)), min_size=1, max_size=4)


@given(budgets, st.integers(1, 60), st.integers(0, 200))
def test_attended_slots_equal_counting_token_by_token(budget: Budget, prompt: int, more: int) -> None:
    assert attended_slots(budget, prompt, prompt + more) == slowly(budget, prompt, prompt + more)


@given(budgets, shapes, st.floats(0, 1))
@settings(deadline=None, max_examples=60)
def test_tokens_for_mean_finds_the_nearest_budget(budget: Budget, rows: list[tuple[int, int]], at: float) -> None:
    prompts, lengths = [p for p, _ in rows], [p + n for p, n in rows]
    low = max(1, budget.sinks + budget.recent)
    means = {t: mean_physical(replace(budget, tokens=t), prompts, lengths) for t in range(low, max(low, *lengths) + 1)}
    target = means[low] + at * (mean_physical(None, prompts, lengths) - means[low])
    found = budget_for_mean(budget, target, prompts, lengths).tokens
    assert abs(means[found] - target) <= min(abs(mean - target) for mean in means.values()) + 1e-9


def test_a_mean_that_cannot_be_reached_is_one_sentence() -> None:
    with pytest.raises(BudgetError, match="between"):
        budget_for_mean(Budget(96, prompt="count"), 1000, [10], [500])
    with pytest.raises(BudgetError, match="between"):
        budget_for_mean(Budget(96, prompt="count"), 3, [10], [500])
    assert budget_for_mean(Budget(96, prompt="count"), 200.0, [10], [2000]).tokens == pytest.approx(140, abs=8)
