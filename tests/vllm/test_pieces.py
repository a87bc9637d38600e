"""What a method observes of a request does not depend on how the scheduler cuts it, nor on who shares its steps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from reasonkv import Budget
from reasonkv.batch_schedule import BatchSchedule
from reasonkv.methods import Method, Observed, get_method
from reasonkv.plan import PlanError
from reasonkv.rotary import Rotary
from reasonkv.runtimes.vllm.step import Asked, RunningRequest, StepLayout, StepPlaces
from reasonkv.schedule import Lengths
from reasonkv.slots import SlotStore

HQ, D, PLACES = 4, 16, 5
CPU = torch.device("cpu")
ROTARY = Rotary(10_000.0 ** (-torch.arange(D // 2) / (D // 2)))
STEPS = (
    {"a": 7, "b": 20}, {"b": 13, "a": 1}, {"c": 20, "a": 1, "b": 1}, {"a": 1, "c": 20, "b": 1}, {"b": 1, "c": 1, "a": 1},
    {"c": 1}, {"a": 9, "b": 9, "c": 1},
)  # fmt: skip


def slots_of(method: Method) -> SlotStore:
    store = SlotStore(PLACES, 2, torch.float32, CPU, method.needs)
    store.prepare(method, HQ, D)
    return store


def whole(method: Method, queries_LqD: Tensor) -> dict[str, Tensor]:
    """The state of a request fed alone and in one piece."""
    state, length = method.new_row_state(1, HQ, D, CPU), len(queries_LqD)
    valid = torch.ones(1, length, dtype=torch.bool)
    method.observe(state, Observed(queries_LqD.transpose(0, 1)[None], torch.arange(length)[None], valid, 0, ROTARY))
    return state


@pytest.mark.parametrize("spec", ["expected", "expected:covariance=full", "beaconkv", "beaconkv:beacons=4"])
def test_pieces_of_a_batch_give_the_state_of_the_whole_alone(spec: str) -> None:
    method, draw = get_method(spec), torch.Generator().manual_seed(0)
    text = {name: torch.randn(60, HQ, D, generator=draw) for name in "abc"}
    courses, sequences = BatchSchedule(PLACES), {}
    for name, place in zip("abc", (2, 0, 4), strict=True):
        courses.start(place, Budget(128, prompt="count"), Lengths(prompt=40))
        sequences[name] = RunningRequest(lengths=courses, row=place, asked=Asked(method))
    slots = slots_of(method)
    for fed in STEPS:
        step = StepLayout(fed, sequences, list(fed))
        parts = [text[name][sequences[name].state.logical :][: fed[name]] for name in step.order]
        padded = torch.cat([*parts, torch.full((3, HQ, D), torch.nan)])  # as a graph's batch would be
        starts = torch.tensor([0, *fed.values()]).cumsum(0)
        rows, lengths = torch.from_numpy(step.rows), torch.from_numpy(step.lengths + step.fed)
        pieces = StepPlaces(step, rows, torch.zeros_like(rows), starts, lengths, torch.empty(0)).query_groups()
        assert len(pieces) == len(set(fed.values()))  # requests that feed equally many share one call
        for one in pieces:
            seen = Observed(padded[one.token_bn].transpose(1, 2), one.position_bn, one.valid_bn, 0, ROTARY)
            slots.observe(method, one.row_b, seen)
        step.end()
    for name, sequence in sequences.items():
        for key, expected in whole(method, text[name][: sequence.state.logical]).items():
            torch.testing.assert_close(slots.row_state[key][sequence.row], expected[0])
    slots.start(2)
    for key, fresh in method.new_row_state(1, HQ, D, CPU).items():
        assert torch.equal(slots.row_state[key][2], fresh[0])
        assert not torch.equal(slots.row_state[key][4], fresh[0])


def test_state_that_changes_its_shape_is_a_defect_of_the_method() -> None:
    method = get_method("h2o:window=4")  # holds a whole forward's queries; engines refuse it
    slots = slots_of(method)
    seen = Observed(torch.randn(1, HQ, 6, D), torch.arange(6)[None], torch.ones(1, 6, dtype=torch.bool), 0, ROTARY)
    with pytest.raises(PlanError, match="must not change the shape of its row state"):
        slots.observe(method, torch.tensor([1]), seen)


def test_what_is_observed_counts_as_kept_beside_the_cache() -> None:
    def sized(spec: str, make: Callable[[Method], SlotStore] = slots_of) -> int:
        return make(get_method(spec)).bytes

    plain = PLACES * HQ * D * 8  # a float64 sum per dimension, and a count per request
    assert sized("expected:covariance=none") == plain + PLACES * 8
