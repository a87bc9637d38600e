"""The records that are committed make the tables of `docs/results` again, without the folders they came from."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from report_folders import make_answer, make_folder, make_record

from reasonkv.evaluate.records import RECORDS
from reasonkv.evaluate.results import load_results

ROOT = Path(__file__).parent.parent
REPLAY, ANSWERS = "replay-program-on_top", "answers-program-on_top"


@pytest.fixture
def cells(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("cells")


@pytest.fixture
def kept_records(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("kept_records")


def experiment(folder: Path, methods: tuple[str, ...], limit: int = 3) -> Path:
    """What `run --out` leaves: a replay and an evaluation."""
    folder.mkdir()
    make_folder(folder / REPLAY, "replay", make_record, ["program"], methods, (64, 128), limit)
    make_folder(folder / ANSWERS, "evaluate", make_answer, ["program"], methods, (64,), limit)
    return folder


def test_kept_records_are_the_results_without_their_texts(tmp_path: Path, kept_records: ModuleType) -> None:
    folder, to = experiment(tmp_path / "run", ("random", "snapkv")), tmp_path / "kept"
    for path in kept_records.result_paths([folder]):
        kept_records.keep(kept_records.load(path), to)
    assert {path.name.partition(".")[2] for path in to.iterdir()} == {"jsonl.gz", "manifest.json"}
    answers, replay = (kept_records.load(path) for path in kept_records.result_paths([to]))
    assert replay.records == load_results(folder / REPLAY).records
    assert replay.manifest == load_results(folder / REPLAY).manifest
    assert answers.answers == [replace(one, output="") for one in load_results(folder / ANSWERS).answers]


def test_kept_records_give_the_cells_and_are_not_copied(
    tmp_path: Path, cells: ModuleType, kept_records: ModuleType
) -> None:
    folder, records = experiment(tmp_path / "run", ("random", "snapkv")), tmp_path / "records"
    first = cells.load_cells(kept_records.result_paths([folder]), records)
    written = {path: path.read_bytes() for path in (records / "run").iterdir()}
    for to in (records, tmp_path / "elsewhere"):
        again = cells.load_cells(kept_records.result_paths([records / "run"]), to)
        assert again.replays == first.replays
        assert again.answers.keys() == first.answers.keys()
    assert not (tmp_path / "elsewhere").exists()
    assert {path: path.read_bytes() for path in (records / "run").iterdir()} == written


def test_keeping_never_drops_a_record_that_is_kept(tmp_path: Path, kept_records: ModuleType) -> None:
    path, to = experiment(tmp_path / "run", ("random",)) / REPLAY, tmp_path / "kept"
    kept_records.keep(load_results(path), to)
    whole = kept_records.load(to / REPLAY).records
    lines = (path / RECORDS).read_bytes().splitlines(keepends=True)
    (path / RECORDS).write_bytes(b"".join(lines[:-2]))
    with pytest.raises(SystemExit, match="2 records"):
        kept_records.keep(load_results(path), to)
    assert kept_records.load(to / REPLAY).records == whole


def test_a_later_folder_replaces_an_earlier_one_cell_by_cell(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], cells: ModuleType, kept_records: ModuleType
) -> None:
    old = experiment(tmp_path / "old", ("random", "snapkv"))
    new = tmp_path / "new"
    new.mkdir()
    make_folder(new / REPLAY, "replay", make_record, ["program"], ("snapkv",), (64,), 2)
    for first, last in ((old, new), (new, old)):
        found = cells.load_cells(kept_records.result_paths([first, last]), tmp_path / "records")
        (group,) = found.replays
        wanted = {
            line.example: line
            for line in load_results(last / REPLAY).records
            if line.method == "snapkv" and line.budget["tokens"] == 64
        }
        assert found.replays[group]["snapkv", "64"] == wanted  # whole: an example that only the first has is gone
        assert len(found.replays[group]["snapkv", "128"]) == len(found.replays[group]["random", "64"]) == 3
        said = capsys.readouterr().out
        assert said.count("\n") == 1 and f"{last / REPLAY}: {len(wanted)} records of snapkv at 64 slots" in said


def test_the_league_reads_committed_records_from_where_they_lie(
    tmp_path: Path, cells: ModuleType, kept_records: ModuleType
) -> None:
    folder = ROOT / "docs" / "results" / "league" / "records"
    paths = kept_records.result_paths([folder / "uneven", folder / "selection"])
    found = cells.load_cells(paths, tmp_path / "records")
    recall = next(lines for group, lines in found.replays.items() if str(group) == "recall, prompt kept")
    assert set(cells.methods(recall)) == {"pyramidkv:window=16", "adakv:base=snapkv:window=16", "quest", "seer"}
    assert all(len(lines) == 64 for lines in recall.values())
    assert found.answers and all(len(lines["full", ""]) == 64 for lines in found.answers.values())
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_results_is_named(tmp_path: Path, kept_records: ModuleType) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(SystemExit, match="neither results folders nor kept records"):
            kept_records.result_paths([path])
