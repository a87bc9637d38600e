"""The records that are committed make the tables of `docs/results` again, number by number."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
from report_folders import make_answer, make_folder, make_record

from reasonkv.evaluate.table import read_results

ROOT = Path(__file__).parent.parent
REPLAY, ANSWERS = "replay-program-on_top", "answers-program-on_top"


@pytest.fixture
def cells(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("cells")


@pytest.mark.parametrize("name", ["claims", "families", "cask", "league"])
def test_the_committed_tables_come_out_equal(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    module = importlib.import_module(f"{name}_tables")
    for drawing in ("save_png", "facets", "_heat"):  # figures take most of the time
        if hasattr(module, drawing):
            monkeypatch.setattr(module, drawing, lambda *_, **__: None)
    module.build(ROOT / "docs" / "results" / name, tmp_path)
    for path in tmp_path.glob("*.md"):
        assert path.read_text() == (ROOT / "docs" / "results" / name / path.name).read_text()


def test_the_records_are_small_and_keep_their_manifests(cells: ModuleType) -> None:
    folders = [path.parent for path in (ROOT / "docs" / "results").glob("*/records.parquet")]
    assert len(folders) == 5
    assert sum((folder / "records.parquet").stat().st_size for folder in folders) < 2 * 2**20
    for folder in folders:
        about = cells.manifests(folder)
        assert set(read_results([folder])["folder"]) == set(about)
        for manifest in about.values():
            assert {"command", "arguments", "model", "device", "versions", "date", "run"} <= set(manifest)


def experiment(folder: Path, methods: tuple[str, ...], limit: int = 3) -> Path:
    """What `run.py --out` leaves: a replay and an evaluation."""
    folder.mkdir()
    make_folder(folder / REPLAY, "replay", make_record, ["program"], methods, (64, 128), limit)
    make_folder(folder / ANSWERS, "evaluate", make_answer, ["program"], methods, (64,), limit)
    return folder


def test_kept_records_give_the_means_of_the_results_without_their_texts(tmp_path: Path, cells: ModuleType) -> None:
    folder, to = experiment(tmp_path / "run", ("random", "snapkv")), tmp_path / "kept"
    cells.keep([folder], to)
    kept = read_results([to])
    assert "output" not in kept
    assert cells.manifests(to)[f"run/{REPLAY}"] == json.loads((folder / REPLAY / "manifest.json").read_text())
    for name, metric in ((REPLAY, "top1"), (ANSWERS, "correct")):
        own, back = read_results([folder / name]), kept[kept["folder"] == f"run/{name}"]
        for column in {metric, "kl", "tokens", "example", "events"} & set(own):
            assert back[column].astype(float).tolist() == pytest.approx(own[column].astype(float).tolist(), rel=1e-6)
        for column in ("label", "regime"):
            assert back[column].tolist() == own[column].tolist()
    found = cells.load_cells(to)
    (group,) = found.replays
    assert str(group) == "program, prompt kept"
    assert set(found.replays[group]) == {("full", ""), *((m, s) for m in ("random", "snapkv") for s in ("64", "128"))}


def test_a_later_folder_replaces_an_earlier_one_cell_by_cell(tmp_path: Path, cells: ModuleType) -> None:
    old, new, to = experiment(tmp_path / "a", ("random", "snapkv")), tmp_path / "b", tmp_path / "kept"
    new.mkdir()
    make_folder(new / REPLAY, "replay", make_record, ["program"], ("snapkv",), (64,), 2)
    cells.keep([old], to)
    cells.keep([new], to)  # what was kept stays
    found = cells.load_cells(to)
    (group,) = found.replays
    assert len(found.replays[group]["snapkv", "64"]) == 2  # whole: an example that only the first has is gone
    assert len(found.replays[group]["snapkv", "128"]) == len(found.replays[group]["random", "64"]) == 3


def test_a_folder_without_results_is_named(tmp_path: Path, cells: ModuleType) -> None:
    with pytest.raises(SystemExit, match="no results folders there"):
        cells.keep([tmp_path], tmp_path / "to")
