"""What result files promise: records come back as they were written, a kill loses at most one line, and a folder
belongs to one command."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
from pathlib import Path

import pytest

from reasonkv.budget import Budget
from reasonkv.evaluate.manifest import Manifest, ResultsError, open_results
from reasonkv.evaluate.records import (
    AnswerRecord,
    RecordError,
    RecordFile,
    ReplayRecord,
    append_records,
    read_lines,
)
from reasonkv.files import write_atomically

CONTRACT = [
    "run",
    "method",
    "options",
    "budget",
    "task",
    "example",
    "seed",
    "prompt_tokens",
    "output_tokens",
    "top1",
    "top5",
    "nll",
    "kl",
    "first_mismatch",
    "physical_mean",
    "physical_peak",
    "physical_terminal",
    "saved_ratio_terminal",
    "bytes_held",
    "bytes_full",
    "events",
    "guards",
    "seconds",
]


def record(example: int = 0, **changes: object) -> ReplayRecord:
    values: dict[str, object] = {
        "run": "0123456789ab", "method": "snapkv", "options": {"window": 16}, "budget": Budget(128, prompt="count").to_dict(),
        "task": "program", "example": example, "seed": 0, "prompt_tokens": 90, "output_tokens": 800, "trace_correct": True, "top1": 0.75,
        "top5": 0.9, "nll": 0.1 + 0.2, "kl": 1e-9, "first_mismatch": None, "physical_mean": 170.25,
        "physical_peak": 255.0, "physical_terminal": 200.0, "saved_ratio_terminal": 0.8, "bytes_held": 10,
        "bytes_peak": 12, "bytes_full": 100, "events": 5, "tokens_dropped": 640, "guards": {}, "seconds": 0.5,
    }  # fmt: skip
    return ReplayRecord(**(values | changes))  # type: ignore[arg-type]


def test_a_record_has_every_field_of_the_contract_and_comes_back_exactly(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    written = [record(0), record(1, budget=None, method="full", first_mismatch=7, guards={"prefix": 2})]
    append_records(path, written[:1])
    append_records(path, written[1:])
    assert read_lines(path, ReplayRecord) == written
    assert set(CONTRACT) <= set(json.loads(path.read_text().splitlines()[0]))


def test_fields_of_a_later_version_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text(json.dumps(record().model_dump() | {"new": 1}) + "\n")
    assert read_lines(path, ReplayRecord) == [record()]


def test_a_record_that_is_not_a_number_is_not_written(tmp_path: Path) -> None:
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite number"):
            append_records(tmp_path / "records.jsonl", [record(nll=wrong)])
    assert read_lines(tmp_path / "records.jsonl", ReplayRecord) == []


@pytest.mark.parametrize("cut", [1, 40, -1])
def test_a_last_line_that_a_kill_tore_is_left_out_and_cut_off(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "records.jsonl"
    append_records(path, [record(0), record(1)])
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + second[:cut])
    assert read_lines(path, ReplayRecord) == [record(0)]
    file = RecordFile(path, ReplayRecord)
    assert path.read_bytes() == first
    file.append([record(0), record(1)])  # the first is there already
    assert (
        read_lines(path, ReplayRecord)
        == [record(0), record(1)]
        == list(RecordFile(path, ReplayRecord).records.values())
    )


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{torn", "invalid JSON"),
        ("[]", "should be an object"),
        ("", "invalid JSON"),
        (json.dumps({"run": "x"}), "'method' is wrong \\(field required"),
        (json.dumps(record(1).model_dump() | {"nll": "low"}), "'nll' is wrong .* valid number"),
        (json.dumps(record(1).model_dump() | {"example": 1.5}), "'example' is wrong .* valid integer"),
        (json.dumps(record(1).model_dump() | {"trace_correct": "yes"}), "'trace_correct' is wrong .* valid boolean"),
        (json.dumps(record(0).model_dump()), "repeats line 1"),
    ],
)
def test_a_damaged_line_is_named_by_file_and_number(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text(f"{record(0).model_dump_json()}\n{line}\n{record(2).model_dump_json()}\n")
    with pytest.raises(RecordError, match=reason) as caught:
        read_lines(path, ReplayRecord)
    assert "records.jsonl, line 2" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_binary_line_is_damage_and_not_a_traceback(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_bytes(b"\xff\xfe\n")
    with pytest.raises(RecordError, match="line 1"):
        read_lines(path, ReplayRecord)


def answer(example: int = 0, **changes: object) -> AnswerRecord:
    values = record(example).model_dump() | {
        "sample": 0, "correct": True, "truncated": False, "repetition": 0.0, "first_divergence": None, "output": "a",
    }  # fmt: skip
    return AnswerRecord(**(values | changes))


def test_an_answer_comes_back_exactly_also_from_a_packed_file(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    written = [answer(0), answer(0, sample=1, first_divergence=3, output="x\ny \u2028 “z”"), answer(1, budget=None)]
    append_records(path, written)
    packed = tmp_path / "records.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert read_lines(path, AnswerRecord) == read_lines(packed, AnswerRecord) == written
    assert len({one.key for one in written}) == 3
    assert "top1" not in json.loads(path.read_text().splitlines()[0])


def manifest(**changes: object) -> Manifest:
    values: dict[str, object] = {
        "command": "replay", "arguments": {"limit": 4, "methods": ["full", "rkv"]},
        "model": {"name": "testbed", "hash": "abc"}, "device": "CPU",
    }  # fmt: skip
    return Manifest(**(values | changes))  # type: ignore[arg-type]


def test_the_same_command_may_use_its_folder_again_from_another_device(tmp_path: Path) -> None:
    with open_results(tmp_path / "out", manifest()):
        pass
    with open_results(tmp_path / "out", manifest(device="GPU")) as folder:
        assert Manifest.read(folder / "manifest.json").run == manifest().run


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"command": "demo"}, "replay, not demo"),
        ({"arguments": {"limit": 8, "methods": ["full", "rkv"]}}, "limit 4, not 8"),
        ({"arguments": {"limit": 4, "methods": ["full"]}}, "methods full,rkv, not full"),
        ({"model": {"name": "testbed", "hash": "xyz"}}, "other weights"),
    ],
)
def test_a_folder_of_another_command_is_refused_with_what_differs(tmp_path: Path, changes: dict, words: str) -> None:
    with open_results(tmp_path, manifest()):
        pass
    with pytest.raises(ResultsError, match=words), open_results(tmp_path, manifest(**changes)):
        pass
    assert manifest(**changes).run != manifest().run


def test_a_folder_of_an_older_version_is_not_continued_because_its_records_have_other_options(tmp_path: Path) -> None:
    with open_results(tmp_path, manifest()):
        pass
    path = tmp_path / "manifest.json"
    written = json.loads(path.read_text())
    assert written.pop("format") == manifest().format
    path.write_text(json.dumps(written))
    with pytest.raises(ResultsError, match="older version of reasonkv"), open_results(tmp_path, manifest()):
        pass
    path.write_text(json.dumps(written | {"format": manifest().format + 1}))
    with pytest.raises(ResultsError, match="later version of reasonkv"), open_results(tmp_path, manifest()):
        pass


def test_a_folder_with_other_files_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ResultsError, match="not results"), open_results(tmp_path, manifest()):
        pass
    with pytest.raises(ResultsError, match="cannot be used"), open_results(tmp_path / "thesis.tex", manifest()):
        pass


def test_a_damaged_manifest_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ResultsError, match="manifest"), open_results(tmp_path, manifest()):
        pass


def _hold(folder: Path, ready: object, die: object) -> None:
    with open_results(folder, manifest()):
        ready.set()  # type: ignore[attr-defined]
        die.wait()  # type: ignore[attr-defined]
        os.kill(os.getpid(), 9)


def test_two_processes_never_write_one_folder_and_a_killed_one_leaves_no_lock(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready, die = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path, ready, die))
    other.start()
    assert ready.wait(20)
    with pytest.raises(ResultsError, match="Another process"), open_results(tmp_path, manifest()):
        pass
    die.set()
    other.join(20)
    assert other.exitcode == -9
    with open_results(tmp_path, manifest()):
        pass


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a", b"one")
    write_atomically(tmp_path / "a", b"two")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"two"
