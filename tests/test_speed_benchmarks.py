"""The timing scripts work, sum steps to runs correctly, and the page of their results is made from their files."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = [
    "calibrated_cost", "decode", "event_cost", "floor", "gpu", "prefill", "rates", "replay_speed", "scaling",
    "stalls",
]  # fmt: skip
Scripts = Callable[[str], ModuleType]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Scripts:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_timing_script_finishes_in_its_small_mode(name: str, tmp_path: Path, script: Scripts) -> None:
    script(name).main(["--small", "--out", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["rows"]
    assert {"device", "threads", "torch", "commit"} <= set(found["environment"])
    performance = script("performance")
    if name in performance.SECTIONS:
        (tmp_path / "found.json").rename(tmp_path / f"{name}.json")
        made = performance.block(tmp_path)
        assert found["title"] in made
        assert made.count("Not measured yet") == len(performance.SECTIONS) - 1
        assert all(
            str(row.get("cache", row.get("axis", row.get("path", row.get("prompt"))))) in made for row in found["rows"]
        )


def test_the_page_of_performance_is_made_from_the_committed_files(script: Scripts) -> None:
    performance = script("performance")
    for results, path in performance.PAGES.items():
        page = path.read_text()
        assert performance.with_block(page, performance.block(results)) == page


def test_every_method_has_a_formula_of_what_its_compaction_takes(script: Scripts) -> None:
    event_cost = script("event_cost")
    assert set(event_cost.evicting()) <= event_cost.FORMULAS.keys()


def test_a_run_is_the_sum_of_its_steps(script: Scripts) -> None:
    lengths, ms = (10, 20, 40), [2.0, 3.0, 7.0]  # 0.1 and then 0.2 ms a token
    step = {n: 1 + 0.1 * n if n <= 20 else 3 + 0.2 * (n - 20) for n in range(5, 60)}
    for first, tokens in ((10, 10), (5, 50), (30, 1)):
        want = sum(step[n] for n in range(first, first + tokens)) / 1e3
        assert script("decoding").run_seconds(lengths, ms, first, tokens) == pytest.approx(want)


def test_steps_with_a_compaction_count_once_an_interval(script: Scripts) -> None:
    steady = script("decoding").Steady([1.0, 3.0, 2.0], [50.0], [40.0], 0, 20)
    assert steady.mean_ms == 2.0 + 40 / 20 and steady.share == pytest.approx(50)
    assert (steady.percentile(50), steady.percentile(94), steady.percentile(99)) == (2.0, 3.0, 50.0)
    turns = script("decoding").Steady([1.0, 3.0, 2.0], [50.0], [40.0], 0, 20, turns=4)
    assert turns.mean_ms == 2.0 + 4 * 40 / 20 and (turns.percentile(79), turns.percentile(81)) == (3.0, 50.0)


def test_a_bounded_cache_is_timed_up_to_its_compaction_at_the_length_asked_for(script: Scripts) -> None:
    decoding = script("decoding")
    subject = decoding.load("testbed")
    budget = script("reasonkv").Budget(32, interval=16, prompt="count")
    for length in (None, 5000):
        one = decoding.Bounded(subject, "expected", budget, steps=3, length=length)
        (after,), (before,) = one.after.stats().rows, one.before.stats().rows
        assert after.length == (length or 64) and after.physical_terminal == 32
        assert before.length == after.length + 16 - 3 - decoding.WARM_UP and before.events == after.events
        steady = one.measure(2)
        assert len(steady.plain_ms) == 5 and len(steady.event_ms) == 1 and steady.kv_bytes > 0


def test_layers_in_turns_are_timed_up_to_the_first_turn(script: Scripts) -> None:
    decoding = script("decoding")
    budget = script("reasonkv").Budget(64, interval=32, prompt="count", stagger=2)
    one = decoding.Bounded(decoding.load("testbed"), "random", budget, steps=3)
    assert one.before.stats().rows[0].length == 128 + 16 - 3 - decoding.WARM_UP
    steady = one.measure(2)
    assert steady.turns == 2 and len(steady.event_ms) == 1 and len(steady.compaction_ms) == 1


def test_no_further_round_begins_when_the_seconds_are_over(script: Scripts, monkeypatch: pytest.MonkeyPatch) -> None:
    timing, clock = script("timing"), iter(range(0, 1000, 10))
    monkeypatch.setattr(timing.time, "monotonic", lambda: next(clock))
    arms = {"a": lambda: {"x": 1.0}, "b": lambda: {"x": 2.0}}
    assert timing.by_turns(arms, 9, warm_up=0, seconds=45) == {"a": {"x": [1.0] * 3}, "b": {"x": [2.0] * 3}}


def test_both_sides_of_kvpress_compact_at_the_step_asked_for(script: Scripts) -> None:
    worker, decoding = script("kvpress_worker"), script("decoding")
    subject = decoding.load("testbed")
    order = {"method": "random", "batch": 2, "budget": 32, "interval": 16, "first": 5}
    order["prompt"] = decoding.text_ids(subject.tokenizer, 32 + 16 - 5)[0].tolist()
    found = worker.reasonkv_turn(subject.model, order)
    assert found["held"] == 32 + worker.AFTER and len(found["ms"]) == 5 + worker.AFTER


def test_a_model_that_is_not_there_is_one_sentence(script: Scripts, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^No model was there, so nothing was measured\.$"):
        script("decode").main(["--small", "--model", "./nowhere"])
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 and said[0].startswith("Without ./nowhere: ")


def test_kvpress_that_cannot_be_installed_is_one_sentence(
    tmp_path: Path, script: Scripts, monkeypatch: pytest.MonkeyPatch
) -> None:
    against = script("against_kvpress")
    failed = subprocess.CompletedProcess([], 1, "", "looking\nERROR: No matching distribution\n")
    monkeypatch.setattr(against.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(SystemExit, match=r"^kvpress could not be installed: ERROR: No matching distribution$"):
        against.main(["--small", "--venv", str(tmp_path / "venv")])


def finished(commit: str, **more: object) -> str:
    return json.dumps({"environment": {"commit": commit}, **more})


def test_what_was_measured_at_this_commit_is_not_measured_again(
    tmp_path: Path, script: Scripts, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench, ran = script("bench"), list[str]()
    monkeypatch.setattr(bench, "commit", lambda: "abc")
    monkeypatch.setattr(bench, "finishes", lambda command, seconds: ran.append(Path(command[1]).stem) or True)
    (tmp_path / "decode.json").write_text(finished("abc"))
    (tmp_path / "rates.json").write_text(finished("old"))
    (tmp_path / "scaling.json").write_text(finished("abc", left_out=["a cell"]))
    words = ["--results", str(tmp_path), "--vllm", str(tmp_path)]
    for more, want in (
        ([], {"against_kvpress", "prefill", "rates", "scaling"}),
        (["decode"], set()),
        (["--again", "decode"], {"decode"}),
    ):
        with pytest.raises(SystemExit) as ended:
            bench.main([*words, *more])
        assert ended.value.code == 0 and set(ran) == want
        ran.clear()
    said = capsys.readouterr().out
    assert "decode: measured at this commit already" in said and "serving_load: left out" in said


def test_a_script_that_takes_too_long_is_stopped_and_said(script: Scripts, capfd: pytest.CaptureFixture[str]) -> None:
    bench = script("bench")
    assert not bench.finishes([sys.executable, "-c", "import time; time.sleep(60)"], 0.2)
    assert "stopped after 0.0 minutes" in capfd.readouterr().out
    assert not bench.finishes([sys.executable, "-c", "raise SystemExit(3)"], 60)
    assert bench.finishes([sys.executable, "-c", "pass"], 60)


def test_a_folder_is_recorded_by_its_name_alone(tmp_path: Path, script: Scripts) -> None:
    (tmp_path / "model").mkdir()
    shown, folder = script("timing").shown, str(tmp_path / "model")
    given = [folder, "Qwen/Qwen3", "", 3, ["1", folder]]
    assert [shown(one) for one in given] == ["model", "Qwen/Qwen3", "", 3, ["1", "model"]]


def test_targets_say_yes_no_or_not_measured(script: Scripts) -> None:
    judged = script("performance").judged
    assert judged("a", [], 1.0)["met"] == "not measured"
    assert judged("a", [("x", 1.2), ("y", 0.9)], 1.0) == {
        "target": "a",
        "met": "no",
        "worst": "0.9 (y)",
        "of": "1 of 2",
    }
    assert judged("a", [("x", 1.2), ("y", 0.9)], 1.5, least=False)["met"] == "yes"


def test_the_gpu_script_continues_and_says_what_was_not_run(
    tmp_path: Path, script: Scripts, capsys: pytest.CaptureFixture[str]
) -> None:
    main, rows = script("gpu").main, tmp_path / "rows.jsonl"
    asked = ["--small", "--device", "cpu", "--methods", "random", "forecast", "--batches", "1", "--rows", str(rows)]
    main(asked)
    first = rows.read_text()
    left = capsys.readouterr().out.split("Not run:\n")[1].splitlines()
    assert left[0] == "tiny, forecast, 1, 128: no file of a fit; give --forecast FILE"
    assert len(left) == 4 and all("vllm is not installed" in one for one in left[1:])
    rows.write_text("".join(first.splitlines(keepends=True)[:-1]))
    main(asked)
    assert [json.loads(line)["kept"] for line in rows.read_text().splitlines()] == [
        json.loads(line)["kept"] for line in first.splitlines()
    ]
    assert capsys.readouterr().out.count("tokens/s\n") == 1
    rows.unlink()
    main([*asked, "--minutes", "0"])
    assert "no time left" in capsys.readouterr().out and not rows.exists()


def test_rows_of_different_lengths_are_padded_on_the_left(script: Scripts) -> None:
    decoding = script("decoding")
    mask = decoding.ragged_mask(3, 8)
    assert mask[:, :4].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0]] and mask[:, 4:].all()
    cache = decoding.plain(decoding.load("testbed").model, "full", 3, 8, mask)
    assert [row.length for row in cache.stats().rows] == [8, 6, 4]


def test_the_readme_says_what_was_measured() -> None:
    readme = " ".join((ROOT / "README.md").read_text().replace("**", "").split())
    stock, rates, ratios, beside = of_large_cell(ROOT / "benchmarks" / "results")
    load = json.loads((ROOT / "benchmarks" / "results" / "serving_load.json").read_text())["rows"]
    (at_256,) = [row["over stock"] for row in load if (row["requests"], row["cache"]) == (256, "random@128")]
    assert (
        f"{min(rates):.0f} to {max(rates):.0f} tokens per second against {stock:.0f} of transformers' stock cache, "
        f"{min(ratios):.1f} to {max(ratios):.1f} times as many, and {beside} times as many as kvpress"
    ) in readme
    assert f"`random` serves {at_256:.1f} times as many" in readme
    with_amx, _, ratios, beside = of_large_cell(ROOT / "benchmarks" / "results" / "amx")
    assert (
        f"where stock is {with_amx / stock:.1f} times as fast, it is {min(ratios):.1f} to {max(ratios):.1f} times stock "
        f"and {beside} times kvpress"
    ) in readme


def of_large_cell(results: Path) -> tuple[float, list[float], list[float], str]:
    """Answers of 4,096 of the larger model: stock's rate, ours, ours over stock; and over kvpress, from its least to its most."""
    decode, kvpress = (
        json.loads((results / f"{one}.json").read_text())["rows"] for one in ("decode", "against_kvpress")
    )
    cell = [row for row in decode if (row["batch"], row["budget"]) == (32, 512) and row["cache"] != "static"]
    stock, *ours = cell
    assert stock["cache"] == "stock" and len(ours) >= 3
    rate, ratio = "tokens/s, answers of 4096", "over stock, answers of 4096"
    beside = [row["ours over kvpress"] for row in kvpress if (row["batch"], row["budget"]) == (32, 512)]
    ends = dict.fromkeys(f"{end:.1f}" for end in (min(beside), max(beside)))
    return stock[rate], [row[rate] for row in ours], [row[ratio] for row in ours], " to ".join(ends)
