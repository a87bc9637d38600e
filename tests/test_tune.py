"""The search for a usable budget finds known answers, stops early, says when larger was not better, and resumes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from models import calibration
from snippets import parses
from test_records import record
from tiny import TASK, tiny_loaded

import reasonkv
from reasonkv.budget import Budget
from reasonkv.calibration import save_calibration
from reasonkv.cli.console import print_json
from reasonkv.cli.ready import python_line, serve_line
from reasonkv.evaluate.job import BudgetOptions, ReplayJob, TraceSettings, TuneJob
from reasonkv.evaluate.merging import merge
from reasonkv.evaluate.records import AnswerRecord, ReplayRecord, read_lines
from reasonkv.evaluate.run import run
from reasonkv.evaluate.target import FrontierError, Target
from reasonkv.evaluate.tune import Search, budget_range, check_search, find_usable_budget, tune
from reasonkv.layers import bounded_layers
from reasonkv.methods import get_method

TARGET = Target("top1", 0.9, relative=True)
FULL = [record(i, method="full", options={}, budget=None, events=0, top1=1.0) for i in range(32)]


class Cell:
    """A method whose metric at every budget is known; counts what is run."""

    def __init__(self, curve: Callable[[int], float], *, longest: int = 10_000, spread: float = 0.0) -> None:
        self.curve, self.longest, self.spread = curve, longest, spread
        self.ran: list[int] = []

    def __call__(self, tokens: int) -> list[ReplayRecord]:
        self.ran.append(tokens)
        noise = np.random.default_rng(tokens).normal(0, self.spread, len(FULL))
        events = 5 if tokens < self.longest else 0
        budget = Budget(tokens, interval=8, recent=8, prompt="on_top").to_dict()
        mine = [
            record(i, budget=budget, events=events, top1=self.curve(tokens) + float(one))
            for i, one in enumerate(noise - noise.mean())
        ]
        return [*FULL, *mine]


def linear_in_log(tokens: int) -> float:
    return min(1.0, 0.5 + 0.1 * np.log2(tokens / 16))  # 0.9 at 256


@pytest.mark.parametrize("resolution", [1.02, 1.1, 1.5])
def test_the_known_budget_is_found_within_the_resolution(resolution: float) -> None:
    cell = Cell(linear_in_log)
    found = find_usable_budget(cell, 16, 4096, TARGET, resolution=resolution)
    assert found.status == "reached"
    missed, kept = found.bracket
    assert missed < 256 <= kept
    assert kept <= resolution * missed or kept - missed == 1
    assert found.tokens == kept
    assert found.usable is not None
    assert found.usable.tokens == pytest.approx(256, rel=0.01)
    assert (found.task, found.method, found.usable.examples) == ("program", "snapkv:window=16", 32)
    assert not found.falls
    assert not found.violated


def test_every_budget_is_run_once_at_midpoints_in_log_budget() -> None:
    cell = Cell(linear_in_log)
    found = find_usable_budget(cell, 16, 4096, TARGET)
    assert cell.ran[:3] == [16, 256, 64]  # sqrt(16 * 4096) keeps the target; then sqrt(16 * 256)
    assert len(cell.ran) == len(set(cell.ran)) < 10
    assert [probe.tokens for probe in found.probes] == cell.ran
    assert [probe.keeps for probe in found.probes[:3]] == [False, True, False]
    assert found.probes[0].regimes == {"compressed": 32}


def test_the_smallest_budget_may_do() -> None:
    cell = Cell(lambda tokens: 0.97)
    found = find_usable_budget(cell, 16, 4096, TARGET)
    assert (found.status, found.tokens, cell.ran) == ("at most", 16, [16, 256])


def test_no_compressed_budget_may_do() -> None:
    found = find_usable_budget(Cell(lambda tokens: 0.5, longest=500), 16, 1000, TARGET)
    assert (found.status, found.tokens) == ("not reached", None)
    missed, end = found.bracket
    assert missed < 500 <= end  # where compression ends, nothing counts as kept
    assert {probe.keeps for probe in found.probes} == {False, None}


def test_rows_too_short_for_any_event_say_so() -> None:
    cell = Cell(lambda tokens: 0.5, longest=0)
    found = find_usable_budget(cell, 16, 1000, TARGET)
    assert (found.status, found.tokens, found.usable, cell.ran) == ("never compressed", None, None, [16])


def test_a_dip_above_a_budget_that_keeps_the_target_is_found_and_said() -> None:
    """16 keeps the target, its midpoint with 4096 does not: the search goes on above it."""
    found = find_usable_budget(Cell(lambda tokens: 0.95 if tokens < 100 or tokens > 600 else 0.6), 16, 4096, TARGET)
    assert found.status == "reached"
    assert found.bracket[0] < 600 < found.bracket[1]
    assert found.violated
    assert found.usable is not None
    assert 256 in found.usable.fails_above
    assert (16, 256) in {(fall.ours.tokens, fall.theirs.tokens) for fall in found.falls if fall.holds}


def test_a_sure_fall_below_the_target_is_a_violation_and_noise_is_not() -> None:
    def curve(tokens: int) -> float:
        return 0.8 if tokens < 20 else linear_in_log(tokens)  # 64 has 0.7

    assert find_usable_budget(Cell(curve, spread=0.01), 16, 4096, TARGET).violated
    noisy = find_usable_budget(Cell(lambda tokens: 0.6 + 0.005 * np.sin(tokens), spread=0.05), 16, 4096, TARGET)
    assert noisy.falls
    assert not noisy.violated


def test_a_loss_is_searched_from_the_other_side() -> None:
    def cell(tokens: int) -> list[ReplayRecord]:
        budget = Budget(tokens, recent=8, prompt="on_top").to_dict()
        return [record(i, budget=budget, nll=32 / tokens) for i in range(4)]  # 0.25 at 128

    found = find_usable_budget(cell, 16, 1024, Target("nll", 0.25))
    assert found.bracket[0] < 128 <= found.bracket[1]


@pytest.mark.parametrize(
    ("change", "words"),
    [({"low": 90, "high": 80}, "no budget between 90 and 80"),
     ({"run_cell": lambda tokens: FULL}, "one method on one task at 16 tokens"),
     ({"run_cell": lambda tokens: Cell(linear_in_log)(tokens)[32:]}, "needs full KV")],
)  # fmt: skip
def test_searches_that_make_no_sense_are_one_sentence(change: dict[str, object], words: str) -> None:
    arguments: dict[str, object] = {"run_cell": Cell(linear_in_log), "low": 16, "high": 100, "target": TARGET} | change
    with pytest.raises(FrontierError, match=words):
        find_usable_budget(**arguments)  # type: ignore[arg-type]


# -- over real runs ---------------------------------------------------------------------------------------------------

RULE = Budget(10, interval=4, sinks=2, recent=8, prompt="on_top")


def job(**changes: object) -> TuneJob:
    values: dict[str, object] = {
        "task": TASK, "methods": "full,streaming", "limit": 2, "batch_size": 2, "max_new_tokens": 40,
        "budget": BudgetOptions(interval=4, sinks=2, recent=8, prompt="on_top"),
    }  # fmt: skip
    return TuneJob(**(values | changes))  # type: ignore[arg-type]


def merged_job(sizes: set[int]) -> ReplayJob:
    one = job()
    return ReplayJob(
        task=TASK, methods="full,streaming", limit=2, batch_size=2, traces=TraceSettings(max_new_tokens=40),
        budget=replace(one.budget, tokens=sorted(sizes)),
    )  # fmt: skip


def test_the_range_holds_what_is_protected_and_drops_nothing_at_its_end() -> None:
    full = [record(0, method="full", budget=None, prompt_tokens=90, output_tokens=50)]
    method = get_method("snapkv:window=16")
    assert budget_range(RULE, method, full) == (2 + 16, 49)  # the method's own window is protected as well
    assert budget_range(Budget(10, sinks=2, recent=8, prompt="count"), get_method("random"), full) == (10, 90 + 49)
    keep = Budget(10, sinks=2, recent=8, prompt="keep")
    assert budget_range(keep, get_method("random"), full) == (90 + 8 + 1, 90 + 49)
    shared = replace(RULE, layer_shares="0.2/1/1.8")  # until the smallest share holds 49: 10 + .2 * 382
    assert budget_range(shared, get_method("random"), full, 3) == (10, 8 * 49)


def test_a_real_search_leaves_one_folder_and_resumes_without_recomputing(tmp_path: Path) -> None:
    model, out = tiny_loaded(), tmp_path / "search"

    def search(**wanted: object) -> tuple[Search, list[str]]:
        said: list[str] = []
        (found,) = tune(job(resolution=1.5, **wanted), model, out, lambda what, *_, **__: said.append(what))
        return found, said

    first, said = search(target="0.9x")
    assert any("streaming @ 10" in one for one in said)
    lines = (out / "records.jsonl").read_bytes()
    records = read_lines(out / "records.jsonl", ReplayRecord)
    probed = {probe.tokens for probe in first.probes}
    assert {one.budget["tokens"] for one in records if one.budget} == probed
    assert sum(one.budget is None for one in records) == 2
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["command"] == "replay"
    assert manifest["arguments"]["budgets"] == [{**RULE.to_dict(), "tokens": size} for size in sorted(probed)]
    assert {one.run for one in records} == {manifest["run"]}
    assert records == run(merged_job(probed), model, out)  # an ordinary folder: nothing is missing

    assert search(target="0.9x")[0] == first
    assert (out / "records.jsonl").read_bytes() == lines
    times = {path: path.stat().st_mtime_ns for path in out.glob("cells/*/*/records.jsonl")}
    other, _ = search(metric="nll", target="1.2x")  # another target shares what it meets again
    both = probed & {probe.tokens for probe in other.probes}
    assert both
    assert all(path.stat().st_mtime_ns == times[path] for path in times)  # nothing was run again
    print_json([first.to_dict(), other.to_dict()])


def test_calibrated_shares_are_recorded_as_numbers(tmp_path: Path) -> None:
    loaded, stats = tiny_loaded(), tmp_path / "stats.safetensors"
    layers = len(bounded_layers(loaded.model.config))
    shares = "/".join(f"{1 + layer}" for layer in range(layers))
    save_calibration(stats, replace(calibration(loaded.model), layer_shares=shares))
    loaded, rule = replace(loaded, calibration_file=stats), replace(job().budget, layer_shares="calibrated")
    (found,) = tune(job(budget=rule, resolution=2.0, target="0.9x"), loaded, tmp_path / "out")
    budgets = json.loads((tmp_path / "out" / "manifest.json").read_text())["arguments"]["budgets"]
    assert budgets and {one["layer_shares"] for one in budgets} == {shares}
    records = read_lines(tmp_path / "out" / "records.jsonl", ReplayRecord)
    same = merged_job({probe.tokens for probe in found.probes})
    same = replace(same, budget=replace(same.budget, layer_shares="calibrated"))
    assert records == run(same, loaded, tmp_path / "out")  # an ordinary folder: nothing is missing
    merge(same, tmp_path / "plan", [tmp_path / "out"])  # a plan knows the word alone
    merged = json.loads((tmp_path / "plan" / "manifest.json").read_text())["arguments"]["budgets"]
    assert sorted(map(json.dumps, merged)) == sorted(map(json.dumps, budgets))


def test_a_search_for_accuracy_generates(tmp_path: Path) -> None:
    accuracy = job(methods="streaming", metric="accuracy", target="0.5", max_new_tokens=20, resolution=2.0)
    (found,) = tune(accuracy, tiny_loaded(), tmp_path)
    assert found.status == "not reached"  # random weights answer nothing
    assert len(read_lines(tmp_path / "records.jsonl", AnswerRecord)) == 2 + 2 * len(found.probes)
    (again,) = tune(accuracy, tiny_loaded(), tmp_path)
    assert again == found


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"methods": "full"}, "bounded method"),
        ({"methods": "quest"}, "drops nothing"),
        ({"target": "2x"}, "at most 1x"),
    ],
)
def test_jobs_that_cannot_be_searched_are_one_sentence(changes: dict[str, object], words: str) -> None:
    with pytest.raises(FrontierError, match=words):
        check_search(job(**changes))


def test_full_kv_at_zero_is_no_yardstick() -> None:
    """A target of 0.9 x 0 would be kept by anything."""

    def cell(tokens: int) -> list[ReplayRecord]:
        budget = Budget(tokens, recent=8, prompt="on_top").to_dict()
        hard = [record(i, method="full", options={}, budget=None, events=0, top1=float(i > 0)) for i in range(4)]
        # beyond 100 tokens only example 0 is long enough to be compressed, and full KV fails there too
        return [*hard, *(record(i, budget=budget, top1=0.0, events=0 if tokens > 100 and i else 5) for i in range(4))]

    found = find_usable_budget(cell, 16, 1000, TARGET)
    assert found.status == "not reached"
    assert {probe.tokens > 100: probe.keeps for probe in found.probes} == {False: False, True: None}
    with pytest.raises(FrontierError, match="top1 is 0 on program"):
        find_usable_budget(cell, 200, 1000, TARGET)


@pytest.mark.parametrize(
    ("method", "rule", "python", "serve"),
    [
        ("snapkv:window=16", {"interval": 64},
         "CompressedCache(model, SnapKV(window=16), tokens=96, interval=64)",
         "reasonkv serve some/model --method snapkv:window=16 --budget 96 --interval 64"),
        ("cask", {"prompt": "count"},
         "CompressedCache(model, CASK(), tokens=96, prompt='count')",
         "reasonkv serve some/model --method cask:mass=none --budget 96 --prompt-policy count"),
        ("kara", {"window": 128},
         "CompressedCache(model, Kara(), Window(size=128, buffer=64, retention=0.75))",
         "reasonkv serve some/model --method kara --window 128 --window-buffer 64 --retention 0.75"),
        ("h2o", {}, "CompressedCache(model, H2O(), tokens=96)", "# "),
        ("random", {"layer_shares": "0.5/1.5"},
         "CompressedCache(model, RandomEviction(), tokens=96, layer_shares='0.5/1.5')",
         "reasonkv serve some/model --method random --budget 96 --layer-shares 0.5/1.5"
         "  # layers in groups of like shares, which loses a little more"),
        ("random", {"layer_shares": "0.5/1.5", "prompt": "keep"},
         "CompressedCache(model, RandomEviction(), tokens=96, prompt='keep', layer_shares='0.5/1.5')", "# "),
        ("oracle", {}, "# ", "# "),
    ],
)  # fmt: skip
def test_a_budget_that_was_found_is_a_line_to_paste(
    method: str, rule: dict[str, object], python: str, serve: str
) -> None:
    budget = BudgetOptions(**rule)  # type: ignore[arg-type]
    line, command = python_line(method, budget, 96), serve_line("some/model", method, budget, 96)
    assert line == python if python != "# " else line.startswith("# ")
    assert command == serve if serve != "# " else command.startswith("# ")
    if serve != "# ":
        parses(command)
    if python != "# " and not get_method(method).needs.calibration:  # the tiny model has none
        made = eval(line, {name: getattr(reasonkv, name) for name in reasonkv.__all__}, {"model": tiny_loaded().model})
        assert made.method.name == get_method(method).name  # a window may shrink what a method reads
        made.detach()
