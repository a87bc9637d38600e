"""What a replay says was lost: against a count by hand, and on its way into records, tables and the report."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from models import tiny_model
from rich.console import Console

from reasonkv import Budget
from reasonkv.evaluate.chunks import TraceRow, feed
from reasonkv.evaluate.diagnostics import LOOKUP, Diagnostics
from reasonkv.evaluate.job import BudgetOptions, ReplayJob
from reasonkv.evaluate.records import ReplayRecord
from reasonkv.evaluate.reference import FullAttention
from reasonkv.evaluate.run import run
from reasonkv.evaluate.table import summarize, to_frame
from reasonkv.models import load_model
from reasonkv.plan import Plan
from reasonkv.report.report import write_report
from reasonkv.report.terminal import diagnostic_tables
from reasonkv.runtimes.transformers import CompressedCache
from reasonkv.view import SlotView

BUDGET = Budget(24, interval=16, sinks=2, recent=4, prompt="count")


class ByHand:
    """Sets of held tokens per (layer, row, head), and the attention of every interval to what is in none of them."""

    def __init__(self, reference: FullAttention) -> None:
        self.reference = reference
        self.events: dict[tuple[int, int], list[tuple[int, list[set[int]]]]] = {}

    def __call__(self, layer: int, rows: list[int], view: SlotView, plan: Plan) -> None:
        for place, row in enumerate(rows):
            held = [
                {int(positions[slot]) for slot in kept}
                for positions, kept in zip(view.positions_BHN[place], plan.kept_BHK[place], strict=True)
            ]
            self.events.setdefault((layer, row), []).append((int(view.length_B[place]), held))

    def lost(self, row: int) -> tuple[float, float]:
        paid = lost = 0.0
        looked_up = missed = 0
        for (layer, of_row), events in self.events.items():
            if of_row != row:
                continue
            ends = [length for length, _ in events[1:]] + [self.reference.lengths[row]]
            for (start, held), end in zip(events, ends, strict=True):
                total_HN = self.reference.received(layer, row, start, end)
                most_HN = self.reference.received(layer, row, start, end, "max")
                for head, kept in enumerate(held):
                    paid += float(total_HN[head].sum())
                    for token in range(start):
                        looked_up += int(most_HN[head, token] > LOOKUP)
                        if token not in kept:
                            lost += float(total_HN[head, token])
                            missed += int(most_HN[head, token] > LOOKUP)
        return lost / paid, missed / max(1, looked_up)


def sharp(model: torch.nn.Module) -> None:
    """Make attention look things up: the queries ten times as long."""
    for name, weight in model.named_parameters():
        if name.endswith("q_proj.weight"):
            weight.data *= 10


@pytest.mark.parametrize("method", ["random", "knorm", "streaming"])
def test_lost_attention_and_look_ups_equal_a_count_by_hand(method: str) -> None:
    model = tiny_model("llama")
    sharp(model)
    ids = torch.randint(5, 90, (2, 120), generator=torch.Generator().manual_seed(0))
    rows = [TraceRow(ids[0, :10], ids[0, 10:]), TraceRow(ids[1, :7], ids[1, 7:80])]
    reference = FullAttention.collect(model, rows)
    ours, by_hand = Diagnostics(reference), ByHand(reference)

    def both(layer: int, at: list[int], view: SlotView, plan: Plan) -> None:
        ours(layer, at, view, plan)
        by_hand(layer, at, view, plan)

    prompts = [len(row.prompt_P) for row in rows]
    with torch.no_grad(), CompressedCache(model, method, BUDGET, prompt_lengths=prompts, observer=both) as cache:
        for _ in feed(model, cache, rows, distances=cache.tokens_to_next_event, score=False):
            pass
    for row, measures in enumerate(ours.measures()):
        lost, lookups = by_hand.lost(row)
        assert 0 < lost < 1
        assert measures["lost_attention"] == pytest.approx(lost, abs=1e-6)
        assert measures["lost_lookups"] == pytest.approx(lookups)
        assert lookups > 0
        assert set(measures) == {"lost_attention", "lost_lookups"}


def test_a_trace_without_an_event_has_no_diagnostics() -> None:
    model = tiny_model("llama")
    rows = [TraceRow(torch.arange(5, 10), torch.arange(10, 20))]
    seen = Diagnostics(FullAttention.collect(model, rows))
    with torch.no_grad(), CompressedCache(model, "random", BUDGET, prompt_lengths=[5], observer=seen) as cache:
        for _ in feed(model, cache, rows, distances=cache.tokens_to_next_event, score=False):
            pass
    assert seen.measures() == [{}]


def test_diagnostics_reach_records_table_and_report(tmp_path: Path) -> None:
    job = ReplayJob(
        task="program:lines=12",
        methods=("full", "random", "cask:fold=neighbours"),
        budget=BudgetOptions(tokens=(64,), interval=16, recent=8, prompt="count"),
        limit=2,
        diagnostics=True,
    )
    out = tmp_path / "out"
    found = run(job, load_model("testbed"), out)
    records = {record.method: record for record in found if isinstance(record, ReplayRecord)}
    assert records["full"].diagnostics == {}
    assert set(records["random"].diagnostics) == {"lost_attention", "lost_lookups"}
    assert records["cask"].diagnostics["lost_attention"] < records["random"].diagnostics["lost_attention"]
    assert {"lost_mass", "kappa_dispersion_relative", "rho_core", "rho_rep"} <= set(records["cask"].diagnostics)
    console = Console(width=200, record=True, file=io.StringIO())
    for table in diagnostic_tables(summarize(to_frame(found))):
        console.print(table)
    text = console.export_text()
    assert "what was lost" in text
    assert "rho core" in text
    page = write_report([out], tmp_path / "report.html").read_text()
    assert "rho of the core" in page
    assert "lost look-ups %" in page
