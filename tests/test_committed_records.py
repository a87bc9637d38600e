"""The records that are committed make the tables of `docs/results` again, number by number."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
from report_folders import make_answer, make_folder, make_record

from reasonkv.evaluate.table import read_results
from reasonkv.report import charts

ROOT = Path(__file__).parent.parent
REPLAY, ANSWERS = "replay-program-on_top", "answers-program-on_top"


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("tables")


@pytest.mark.parametrize(
    "name",
    [
        "claims",
        "families",
        "cask",
        "league",
        "prompt_share",
        "pretrained",
        "pretrained_league",
        "lead",
        "answers",
        "breadth",
        "layers",
        "leaderboard",
        "equal_bytes",
        "sensitivity",
    ],
)
def test_the_committed_tables_come_out_equal(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    build = importlib.import_module("results").BUILDERS[name]
    for drawing in ("save_png", "facets", "_heat"):  # figures take most of the time
        monkeypatch.setitem(getattr(build, "func", build).__globals__, drawing, lambda *_, **__: None)
    build(ROOT / "docs" / "results" / name, tmp_path)
    assert (tmp_path / "tables.md").read_text() == (ROOT / "docs" / "results" / name / "tables.md").read_text()


def test_a_claims_cells_are_drawn_on_the_side_they_speak_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    claims, drawn = importlib.import_module("claims"), []
    monkeypatch.setattr(claims, "save_png", lambda chart, *_, **__: drawn.append(chart.to_dict()))
    claims.build(ROOT / "docs" / "results" / "claims", tmp_path)
    [chart] = drawn
    rows = [row for data in chart["datasets"].values() for row in data if "verdict" in row]
    assert {row["verdict"] for row in rows} == {"for", "undecided", "against"}
    for row in rows:
        assert row["verdict"] == ("for" if row["low"] > 0 else "against" if row["high"] < 0 else "undecided")


@pytest.mark.parametrize("name", ["cask", "families"])
def test_no_two_methods_of_a_figure_share_colour_and_marker(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    module, drawn = importlib.import_module(name), []
    monkeypatch.setattr(charts, "save_png", lambda chart, *_, **__: drawn.append(chart.to_dict()))
    monkeypatch.setattr(module, "save_png", lambda *_, **__: None, raising=False)
    module.build(ROOT / "docs" / "results" / name, tmp_path)
    assert len(drawn) >= 2
    for chart in drawn:
        text = json.dumps(chart)
        scales = [re.search(rf'"{channel}": {{"field": "method".*?"domain": (\[.*?\]), "range": (\[.*?\])', text)
                  for channel in ("color", "shape")]  # fmt: skip
        (names, colours), (_, markers) = (map(json.loads, found.groups()) for found in scales if found)
        assert len(set(zip(colours, markers, strict=True))) == len(names) > 5


def test_the_readme_says_what_shares_of_layers_save(tables: ModuleType) -> None:
    kl = tables.means(tables.load(ROOT / "docs" / "results" / "layers")["replay"], "kl")["kl", "mean"]
    found = {(group, method): f"{value:.4f}"[1:] for (group, method, _), value in kl.items()}
    small, large = (f"Qwen/Qwen2.5-Coder-{size}B-Instruct, gym:gsm_symbolic" for size in ("0.5", "1.5"))
    readme = " ".join((ROOT / "README.md").read_text().split())
    for group, method in (
        *((f"{small},per_prompt=4", one) for one in ("forecast:window=0", "random")),
        (small, "forecast:window=0"),
        (large, "forecast:window=0"),
    ):
        group += ", prompt kept"
        name = method.partition(":")[0]
        alike, shared = found[group, method], found[group, method + tables.SHARES]
        assert f"`{name}` {shared} instead of {alike}" in readme


def test_the_readme_says_how_many_answers_are_right(tables: ModuleType) -> None:
    answers = tables.load(ROOT / "docs" / "results" / "breadth")["answers"]
    right = {method: f"{100 * value:.0f}" for (_, method, _), value in
             tables.means(answers, "correct")["correct", "mean"].items()}  # fmt: skip
    fitted = "forecast:window=0"
    assert right[fitted] == right[fitted + tables.SHARES]
    words = f"{right[fitted]}, with or without shares of the layers, where full KV had {right['full']}, "
    words += f"`streaming` {right['streaming']}, `random` {right['random']} and `expected` {right['expected']}"
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert words in readme
    second = tables.load(ROOT / "docs" / "results" / "answers")["answers"]
    right = {method: f"{100 * mean:.0f}" for method, mean in second.groupby("method")["correct"].mean().items()}
    words = f"it has {right[fitted]}, full KV {right['full']}, `random` {right['random']} "
    assert words + f"and `triattention` {right['triattention']}." in readme
    folder = ROOT / "docs" / "results" / "answers"
    page = [line.replace("*", "") for line in (folder / "README.md").read_text().splitlines()]
    for line in (folder / "tables.md").read_text().splitlines()[8:]:
        _, _, method, _, hits, to_full, to_random, *_ = (cell.strip() for cell in line.split("|"))
        name = "... with" if tables.SHARES in method else f"`{method}`"
        (row,) = (one for one in page if one.startswith(f"| {name}"))
        assert [cell.strip() or "-" for cell in row.split("|")[2:5]] == [hits, to_full, to_random], method


def test_the_records_are_small_and_keep_their_manifests(tables: ModuleType) -> None:
    folders = [path.parent for path in (ROOT / "docs" / "results").glob("*/records.parquet")]
    assert len(folders) == 14
    assert sum((folder / "records.parquet").stat().st_size for folder in folders) < 2 * 2**20
    for folder in folders:
        about = tables.manifests(folder)
        assert set(read_results([folder])["folder"]) == set(about)
        for manifest in about.values():
            assert {"command", "arguments", "model", "device", "versions", "date", "run"} <= set(manifest)


def experiment(folder: Path, methods: tuple[str, ...], limit: int = 3) -> Path:
    """What `run.py --out` leaves: a replay and an evaluation."""
    folder.mkdir()
    make_folder(folder / REPLAY, "replay", make_record, ["program"], methods, (64, 128), limit)
    make_folder(folder / ANSWERS, "evaluate", make_answer, ["program"], methods, (64,), limit)
    return folder


def test_kept_records_give_the_means_of_the_results_without_their_texts(tmp_path: Path, tables: ModuleType) -> None:
    folder, to = experiment(tmp_path / "run", ("random", "snapkv")), tmp_path / "kept"
    tables.keep([folder], to)
    kept = read_results([to])
    assert "output" not in kept
    assert tables.manifests(to)[f"run/{REPLAY}"] == json.loads((folder / REPLAY / "manifest.json").read_text())
    for name, metric in ((REPLAY, "top1"), (ANSWERS, "correct")):
        own, back = read_results([folder / name]), kept[kept["folder"] == f"run/{name}"]
        for column in {metric, "kl", "tokens", "example", "events"} & set(own):
            assert back[column].astype(float).tolist() == pytest.approx(own[column].astype(float).tolist(), rel=1e-6)
        for column in ("label", "regime"):
            assert back[column].tolist() == own[column].tolist()
    cells = set(tables.load(to)["replay"][tables.CELL].itertuples(index=False, name=None))
    group = "program, prompt kept"
    assert cells == {(group, "full", ""), *((group, m, s) for m in ("random", "snapkv") for s in ("64", "128"))}


def test_a_later_folder_replaces_an_earlier_one_cell_by_cell(tmp_path: Path, tables: ModuleType) -> None:
    old, new, to = experiment(tmp_path / "a", ("random", "snapkv")), tmp_path / "b", tmp_path / "kept"
    new.mkdir()
    make_folder(new / REPLAY, "replay", make_record, ["program"], ("snapkv",), (64,), 2)
    tables.keep([old], to)
    tables.keep([new], to)  # what was kept stays
    many = tables.load(to)["replay"].groupby(["method", "size"])["example"].nunique()
    assert many["snapkv", "64"] == 2  # whole: an example that only the first has is gone
    assert many["snapkv", "128"] == many["random", "64"] == many["full", ""] == 3


def test_a_folder_without_results_is_named(tmp_path: Path, tables: ModuleType) -> None:
    with pytest.raises(SystemExit, match="no results folders there"):
        tables.keep([tmp_path], tmp_path / "to")


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module(name)


def test_an_experiment_of_one_small_part_runs_and_its_records_can_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = script("run", monkeypatch)
    plan = {"methods": ["full", "random"], "parts": [
        {"kind": kind, "policies": ["on_top"], "tasks": ["program:lines=4"], "tokens": [32]} for kind in ("replay", "answers")
    ]}  # fmt: skip
    (tmp_path / "tiny.yaml").write_text(json.dumps(plan))
    run.main([str(tmp_path / "tiny.yaml"), "--out", str(tmp_path / "tiny"), "--limit", "2"])
    tables = script("tables", monkeypatch)
    tables.keep([tmp_path / "tiny"], tmp_path / "kept")
    found = tables.means(tables.load(tmp_path / "kept")["replay"], "top1")
    assert found.index.tolist() == [
        ("program:lines=4, prompt kept", *cell) for cell in (("full", ""), ("random", "32"))
    ]
    assert found["top1", "mean"].iloc[0] == 1
