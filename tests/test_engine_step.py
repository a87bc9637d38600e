"""One engine step in integers: where tokens and queries go, and which requests have an event, against loops."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonkv import Budget
from reasonkv.batch_schedule import BatchSchedule
from reasonkv.methods import get_method
from reasonkv.runtimes.vllm.step import Asked, RunningRequest, StepLayout, StepPlaces
from reasonkv.schedule import Lengths, step

PLACES, BLOCK = 7, 4
BUDGET, METHOD = Budget(8, interval=4, sinks=1, recent=2, prompt="count"), get_method("random")


@st.composite
def requests(draw: st.DrawFn) -> tuple[dict[str, RunningRequest], list[int]]:
    """Some requests, as far as each is, and what a step feeds them."""
    count = draw(st.integers(1, 4))
    courses, places = BatchSchedule(PLACES), draw(st.permutations(range(PLACES)))[:count]
    sequences = {}
    for name, place in zip("dabc", places, strict=False):
        budget, state = draw(st.sampled_from([BUDGET, None])), Lengths(prompt=draw(st.integers(1, 20)))
        if draw(st.booleans()):  # its prompt is in
            state, _ = step(budget, state, state.prompt)
        for _ in range(draw(st.integers(0, 9))):
            state, _ = step(budget, state, 1)
        courses.start(place, budget, state)
        sequences[name] = RunningRequest(lengths=courses, row=place, asked=Asked(METHOD))
    pieces = st.just(1) if draw(st.booleans()) else st.integers(1, 9)
    return sequences, [draw(pieces) for _ in sequences]


@settings(max_examples=200, deadline=None)
@given(requests(), st.integers(1, 6))
def test_a_step_is_what_loops_say(given_: tuple[dict[str, RunningRequest], list[int]], ring: int) -> None:
    sequences, pieces = given_
    order, before = list(sequences), [one.state for one in sequences.values()]
    fed = dict(sorted(zip(order, pieces, strict=True)))  # the scheduler's order is another one
    table = torch.randperm((len(order) + 2) * 12).view(-1, 12).int()  # rows behind the batch's are padding
    one = StepLayout(fed, sequences, order)
    padded = [*pieces, 0, 0]
    places = StepPlaces(
        one, torch.from_numpy(one.rows), torch.from_numpy(one.lengths - one.held),
        torch.tensor([0, *padded]).cumsum(0).int(), torch.tensor([state.logical for state in before] + [0, 0]).int()
        + torch.tensor(padded).int(), table,
    )  # fmt: skip

    tokens = [(row, rank) for row, n in enumerate(pieces) for rank in range(n)]
    assert one.tokens == len(tokens)
    assert places.position_n.tolist() == [before[row].logical + rank for row, rank in tokens]
    assert places.row_n.tolist() == [sequences[order[row]].row for row, _ in tokens]
    assert one.longest == max(state.physical + n for state, n in zip(before, pieces, strict=True))
    slots = [before[row].physical + rank for row, rank in tokens]
    expected = [
        int(table[row, slot // BLOCK]) * BLOCK + slot % BLOCK for (row, _), slot in zip(tokens, slots, strict=True)
    ]
    assert places.physical_slots(BLOCK).tolist() == expected and places.physical_slots(BLOCK).dtype == torch.int64

    lines = places.ring_lines(ring, PLACES).tolist()
    kept = [(line, number) for number, line in enumerate(lines) if line < PLACES * ring]
    written = dict(kept)
    assert len(written) == len(kept)  # no line that is read is written twice
    naive = {}  # later tokens overwrite earlier ones
    for number, (row, rank) in enumerate(tokens):
        naive[sequences[order[row]].row * ring + (before[row].logical + rank) % ring] = number
    assert written == naive

    one.end()
    afters = [step(sequences[name].budget, state, fed[name]) for name, state in zip(order, before, strict=True)]
    assert [sequence.state for sequence in sequences.values()] == [state for state, _ in afters]
    assert [
        (event.batch_row, event.name, event.before, event.held, event.after, event.budget) for event in one.due
    ] == [
        (row, name, before[row], before[row].physical + fed[name], state, BUDGET)
        for row, (name, (state, keep)) in enumerate(zip(order, afters, strict=True))
        if keep is not None
    ]
    groups = one.compaction_groups(ring, sequences)
    assert sorted(event.batch_row for group in groups for event in group) == [event.batch_row for event in one.due]
    assert all(len({(e.held, e.after.physical, min(ring, e.after.logical)) for e in group}) == 1 for group in groups)
    ended = {name: sequence for name, sequence in sequences.items() if name != order[0]}
    assert all(event.batch_row for group in one.compaction_groups(ring, ended) for event in group)
