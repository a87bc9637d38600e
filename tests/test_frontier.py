"""Usable budgets with known crossings, crossings between methods, and regimes that are never mixed."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from report_folders import record, write_folder

from reasonkv.budget import Budget
from reasonkv.evaluate.frontier import (
    Point,
    crossings,
    measured_points,
    pairs_to_test,
    read_comparable,
    usable_budget,
)
from reasonkv.evaluate.records import ReplayRecord
from reasonkv.evaluate.table import FULL_KV, to_frame
from reasonkv.evaluate.target import FrontierError, Target

TARGET = Target("top1", 0.8)


def point(
    tokens: int, mean: float, *, method: str = "rkv", n: int = 32, spread: float = 0.0, **changes: object
) -> Point:
    """A cell whose examples scatter around `mean`, and average to it exactly; full KV has 1.0 on all of them."""
    noise = np.random.default_rng(tokens).normal(0, spread, n)
    values = dict(enumerate((mean + noise - noise.mean()).tolist()))
    base = Point(
        "program",
        method,
        "{}",
        "compressed",
        tokens,
        values,
        dict.fromkeys(values, 1.0),
        tokens * 1.5,
        tokens * 100.0,
    )
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def test_the_crossing_is_where_the_line_in_log_budget_meets_the_target() -> None:
    points = [point(64, 0.6), point(256, 1.0), point(128, 0.7)]
    found = usable_budget(points, TARGET)
    assert found.status == "reached"
    assert found.tokens == pytest.approx(128 * 2 ** (1 / 3))  # a third of the way from 0.7 to 1.0
    assert (found.low, found.high) == pytest.approx((found.tokens, found.tokens))  # examples that agree leave no doubt
    assert usable_budget(points, TARGET, axis="bytes_held").tokens == pytest.approx(12_800 * 2 ** (1 / 3))
    assert usable_budget(points, Target("top1", 0.8, relative=True)).tokens == pytest.approx(found.tokens)


def test_a_lower_metric_is_crossed_from_above() -> None:
    found = usable_budget([point(64, 0.4), point(128, 0.1)], Target("nll", 0.2))
    assert found.tokens == pytest.approx(64 * 2 ** (2 / 3))


def test_never_and_always_reached_are_said() -> None:
    never = usable_budget([point(64, 0.1), point(128, 0.2)], TARGET)
    assert (never.status, never.tokens, never.low, never.high) == ("not reached", None, None, None)
    always = usable_budget([point(64, 0.9), point(128, 0.95)], TARGET)
    assert (always.status, always.tokens, always.low, always.high) == ("at most", 64, 64, 64)
    exactly = usable_budget([point(64, 0.1), point(128, 0.8)], TARGET)
    assert exactly.tokens == pytest.approx(128)


def test_a_curve_that_falls_again_is_usable_only_beyond_its_last_failure() -> None:
    found = usable_budget([point(64, 0.9), point(128, 0.7), point(256, 0.9)], TARGET)
    assert found.tokens == pytest.approx(128 * math.sqrt(2))
    assert found.fails_above == (128,)
    lost = usable_budget([point(64, 0.5), point(128, 0.9), point(256, 0.7)], TARGET)
    assert lost.status == "not reached"
    assert lost.fails_above == (256,)


def test_the_interval_holds_the_crossing_and_shrinks_with_examples() -> None:
    widths = []
    for n in (16, 256):
        found = usable_budget([point(b, m, spread=0.2, n=n) for b, m in ((64, 0.5), (128, 0.7), (256, 0.95))], TARGET)
        assert found.tokens is not None
        assert found.low is not None
        assert found.high is not None
        assert found.low < found.tokens < found.high
        widths.append(found.high / found.low)
    assert widths[1] < widths[0]
    doubtful = usable_budget([point(64, 0.5, spread=0.4, n=8), point(128, 0.81, spread=0.4, n=8)], TARGET)
    assert doubtful.status == "reached"
    assert doubtful.high is None  # many resamples do not reach it


def test_points_that_do_not_belong_together_are_refused() -> None:
    for other in (point(128, 0.9, regime="uncompressed"), point(128, 0.9, method="snapkv"), point(128, 0.9, rule="x")):
        with pytest.raises(FrontierError, match="one task, method"):
            usable_budget([point(64, 0.5), other], TARGET)
    with pytest.raises(FrontierError, match="at least one"):
        usable_budget([], TARGET)
    with pytest.raises(FrontierError, match="add full"):
        usable_budget([point(64, 0.5, full={})], Target("top1", 0.9, relative=True))


@pytest.mark.parametrize(
    ("text", "metric", "words"),
    [
        ("much", "top1", "not 'much'"), ("0.9x", "kl", "absolute"), ("1.2x", "top1", "at most 1x"),
        ("0.9x", "nll", "at least 1x"), ("95", "accuracy", "between 0 and 1"), ("0.9", "top2", "must be one of"),
    ],
)  # fmt: skip
def test_targets_that_make_no_sense_are_one_sentence(text: str, metric: str, words: str) -> None:
    with pytest.raises(FrontierError, match=words):
        Target.parse(text, metric)


def test_targets_read_back() -> None:
    assert Target.parse("0.95x", "accuracy") == Target("accuracy", 0.95, relative=True)
    assert str(Target.parse("0.2", "nll")) == "nll <= 0.2"


# -- between methods --------------------------------------------------------------------------------------------------


def test_a_smaller_budget_that_wins_is_a_crossing_and_noise_is_not() -> None:
    points = [
        point(64, 0.9, method="a", spread=0.05), point(128, 0.6, method="b", spread=0.05),
        point(128, 0.9, method="c", spread=0.05),
    ]  # fmt: skip
    found = crossings(points, "top1")
    assert found[0].label == "a@64 > b@128"
    assert found[0].holds
    assert found[0].advantage.mean == pytest.approx(0.3)
    assert found[0].advantage.pairs == 32
    assert [one.label for one in found if one.holds] == ["a@64 > b@128"]
    better_nll = crossings(points, "nll")  # the same numbers as a loss: nothing smaller is better but by noise
    assert not any(one.holds for one in better_nll)
    for other in ("regime", "rule", "task"):
        moved = [dataclasses.replace(points[0], **{other: "elsewhere"}), *points[1:]]
        assert not any(one.ours.method == "a" for one in crossings(moved, "top1"))


def test_holm_counts_every_pair() -> None:
    """One pair at p near 0.01 holds alone and no longer among many."""
    rng = np.random.default_rng(0)
    ours, theirs = point(64, 0.55, method="a", spread=0.1), point(128, 0.5, method="b", spread=0.05)
    (alone,) = crossings([ours, theirs], "top1")
    assert 1e-5 < alone.p < 0.05
    assert alone.holds
    crowd = [point(256 + i, 0.5 + 0.001 * rng.normal(), method=f"m{i}", spread=0.1) for i in range(40)]
    among = [one for one in crossings([ours, theirs, *crowd], "top1") if one.label == alone.label]
    assert among[0].p > alone.p
    assert not among[0].holds


def test_cells_at_equal_memory_are_no_pair() -> None:
    a = point(64, 0.9, method="a", physical_mean=200.0)
    b = point(256, 0.6, method="b", physical_mean=203.0)
    far = point(256, 0.6, method="c", physical_mean=205.0)
    assert [(one.method, other.method) for one, other in pairs_to_test([a, b, far], "physical_mean")] == [("a", "c")]
    assert len(pairs_to_test([a, b, far], "tokens")) == 2


# -- regimes ----------------------------------------------------------------------------------------------------------


def in_budget(events: int, prompt_tokens: int = 90, guards: dict[str, int] | None = None, **fields: object) -> str:
    budget = Budget(**({"tokens": 128, "prompt": "count"} | fields)).to_dict()  # type: ignore[arg-type]
    return regime(record(0, budget=budget, events=events, prompt_tokens=prompt_tokens, guards=guards or {}))


def regime(one: ReplayRecord) -> str:
    return str(to_frame([one])["regime"].iloc[0])


def test_every_record_has_one_regime() -> None:
    assert in_budget(0) == "uncompressed"
    assert in_budget(3) == "compressed"
    assert in_budget(1) == "compressed"  # the prompt of 90 fits, so the event fell while decoding
    assert in_budget(1, prompt_tokens=300) == "prompt_fills_budget"  # the cut of the prompt, and nothing after it
    assert in_budget(2, prompt_tokens=300) == "compressed"
    assert in_budget(1, prompt_tokens=300, cut_prompt="first_event") == "compressed"
    assert in_budget(2, prompt_tokens=300, prefill_chunk=100) == "prompt_fills_budget"  # cuts at 200 and at 300
    assert in_budget(3, prompt_tokens=300, prefill_chunk=100) == "compressed"
    assert in_budget(9, guards={"prefix_budget_exhausted": 2}) == "prompt_fills_budget"
    assert in_budget(9, guards={"another": 2}) == "compressed"
    assert in_budget(9, prompt="keep") == "prompt_fills_budget"  # 90 and 64 recent ones fill 128
    assert in_budget(9, prompt="keep", prompt_tokens=40) == "compressed"
    assert in_budget(9, prompt="on_top", prompt_tokens=900) == "compressed"
    assert regime(record(0, method="full", budget=None, events=0)) == FULL_KV


def test_points_are_split_by_regime_and_carry_full_kv_of_their_own_examples() -> None:
    budget = Budget(128, prompt="count").to_dict()
    records = [
        *(record(i, method="full", options={}, budget=None, events=0, top1=1.0 - i / 100) for i in range(4)),
        *(record(i, budget=budget, events=0 if i < 1 else 5, top1=i / 10) for i in range(4)),
    ]
    points = {one.regime: one for one in measured_points(to_frame(records), "top1")}
    assert set(points) == {"uncompressed", "compressed"}
    assert points["compressed"].values == {1: 0.1, 2: 0.2, 3: 0.3}
    assert points["compressed"].full == {1: 0.99, 2: 0.98, 3: 0.97}
    assert points["compressed"].mean == pytest.approx(0.2)
    with pytest.raises(FrontierError, match="not accuracy"):
        measured_points(to_frame(records), "accuracy")


def test_folders_are_joined_only_if_model_and_settings_agree(tmp_path: Path) -> None:
    def folder(name: str, model: str = "a", seed: int = 0, method: str = "snapkv") -> Path:
        records = [record(0, method="full", options={}, budget=None), record(0, method=method)]
        return write_folder(tmp_path / name, records, model=model, seed=seed)

    one = folder("one")
    assert len(read_comparable([one, folder("two", method="rkv")])) == 3  # full KV counts once
    with pytest.raises(FrontierError, match="different models"):
        read_comparable([one, folder("three", model="b")])
    with pytest.raises(FrontierError, match="differ in seed"):
        read_comparable([one, folder("four", seed=1)])
