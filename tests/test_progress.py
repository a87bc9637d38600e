"""What a run tells while it runs: every step, every sequence that ends, and a line in 30 seconds without a terminal."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import TASK, tiny_loaded

from reasonkv.cli.console import progress_bars
from reasonkv.evaluate.job import BudgetOptions, GenerateJob, ReplayJob, TraceSettings
from reasonkv.evaluate.run import run

BUDGET = BudgetOptions(tokens=(24,), interval=12, sinks=2, recent=8)


def test_a_record_is_written_the_moment_its_sequence_ends_and_every_step_is_told(tmp_path: Path) -> None:
    loaded = tiny_loaded()
    job = GenerateJob(task=TASK, methods="keydiff", budget=BUDGET, limit=3, batch_size=3, max_new_tokens=40)
    whole = run(job, loaded, tmp_path / "first")
    # the commonest token of some outputs, so that sequences end at different steps
    loaded.model.generation_config.eos_token_id = loaded.tokenizer(whole[0].output.split()[9])["input_ids"]
    told: list[tuple[str, int, int, int]] = []

    def progress(what: str, done: int, total: int, *, tokens: int = 0, right: float | None = None) -> None:
        path = tmp_path / "out" / "records.jsonl"
        lines = path.read_bytes().count(b"\n") if path.exists() else 0
        told.append((what, done, lines, tokens))
        assert total == 3
        assert (right is None) == (done == 0)

    records = run(job, loaded, tmp_path / "out", progress)
    full = [one for one in told if one[0].endswith("full")]
    lengths = [record.output_tokens for record in records if record.method == "full"]
    assert len(set(lengths)) > 1
    assert [tokens for _, _, _, tokens in full][-1] == sum(lengths)
    steps = {tokens for _, _, _, tokens in full}
    assert len(steps) >= max(lengths), "every decode step is told"
    assert all(lines == done for _, done, lines, _ in full), "what is done is in the file"
    assert {done for _, done, _, _ in full} == {0, 1, 2, 3}


def test_a_replay_tells_the_tokens_of_its_traces_and_of_every_chunk(tmp_path: Path) -> None:
    told: list[tuple[str, int]] = []

    def progress(what: str, done: int, total: int, *, tokens: int = 0, right: float | None = None) -> None:
        told.append((what, tokens))

    traces = TraceSettings(max_new_tokens=40)
    job = ReplayJob(task=TASK, methods="full,keydiff", budget=BUDGET, limit=2, batch_size=2, traces=traces)
    records = run(job, tiny_loaded(), tmp_path, progress)
    tokens = sum(record.output_tokens for record in records if record.method == "full")
    for name in ("traces", "full", "keydiff @ 24"):
        own = [count for what, count in told if what.endswith(name)]
        assert own == sorted(own)
        assert own[-1] == tokens
        assert len(set(own)) > 3 or name == "full"


def test_without_a_terminal_a_line_comes_every_30_seconds_and_when_a_step_ends(
    capsys: pytest.CaptureFixture[str],
) -> None:
    times = iter([0.0, 0, 10, 29, 31, 40, 100, 200])
    with progress_bars(4, clock=lambda: next(times)) as progress:
        for done, tokens in ((0, 0), (1, 100), (1, 290), (2, 310), (2, 400), (4, 1000)):
            progress("program: rkv @ 64", done, 4, tokens=tokens, right=0.5 if done else None)
        progress("program: rkv @ 64", 4, 4, tokens=1000, right=0.5)  # once more, with its batch
        progress("program: rkv @ 128", 4, 4)
    assert capsys.readouterr().err.splitlines() == [
        "program: rkv @ 64: 2 of 4, 10 tokens/s, 50% right, 4 min left",
        "program: rkv @ 64: 4 in 100.0 s, 10 tokens/s, 50% right, 5 min left",
        "program: rkv @ 128: 4 in 0.0 s, 3 min left",
    ]
