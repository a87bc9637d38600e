"""`reasonkv run`: a plan's cells resume after kills, run on Ray, fail alone, and merge into ordinary results folders."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from command_line import run, sentence
from processes import kill, run_command, start
from tiny import TASK, save_tiny

from reasonkv.cli.plan import make_groups
from reasonkv.evaluate.cells import make_budgets
from reasonkv.evaluate.job import GenerateJob, ReplayJob
from reasonkv.evaluate.plan import Cell, run_on_ray
from reasonkv.evaluate.progress import Progress, silent
from reasonkv.evaluate.run import run as run_job
from reasonkv.models import LoadedModel, load_model

PLAN = {
    "tasks": [TASK], "methods": ["random", "keydiff"], "budgets": 24, "seeds": [0, 1], "limit": 2,
    "batch-size": 2, "interval": 12, "sinks": 2, "recent": 8, "max-new-tokens": 40,
    "runs": [{"command": "replay"}, {"command": "evaluate", "methods": "keydiff", "budgets": [24, 32]}],
}  # fmt: skip
EXAMPLES = Path(__file__).parent.parent / "examples"
CELLS = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("models") / "tiny"))


def plan(folder: Path, model: str, **changes: object) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / "plan.yaml"
    file.write_text(yaml.safe_dump({**PLAN, "models": [model], **changes}))
    return file


def records(out: Path) -> dict[str, list[str]]:
    """Every records file of a plan without `seconds`, by its place in the folder."""
    found = {}
    for path in sorted(out.rglob("records.jsonl")):
        lines = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
        assert all(line.pop("seconds") >= 0 for line in lines)
        found[str(path.relative_to(out))] = sorted(json.dumps(line) for line in lines)
    return found


@pytest.fixture(scope="module")
def whole(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan that was never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    result = run("run", plan(folder, model), "--out", folder / "out", "--ray", "off", "--json")
    assert result.exit_code == 0, result.stderr
    assert "One cell after the other." in result.stderr
    assert len(json.loads(result.stdout)["folders"]) == 4
    return folder / "out"


def test_every_cell_is_a_results_folder_with_full_kv_which_ran_once(whole: Path) -> None:
    cells = [path.parent for path in whole.glob("cells/**/records.jsonl")]
    assert len(cells) == CELLS
    full = {path.name: path for path in whole.glob("cells/full/*")}
    assert len(full) == 4  # of replay and evaluate, for each seed
    for cell in cells:
        lines = [json.loads(line) for line in (cell / "records.jsonl").read_text().splitlines()]
        assert {line["run"] for line in lines} == {json.loads((cell / "manifest.json").read_text())["run"]}
        own = [line for line in lines if line["budget"]]
        assert len(lines) == 2 * (1 + bool(own))
        seconds = {line["seconds"] for line in lines if not line["budget"]}
        assert any(seconds == _seconds(path) for path in full.values())  # taken, not computed again


def _seconds(folder: Path) -> set[float]:
    return {json.loads(line)["seconds"] for line in (folder / "records.jsonl").read_text().splitlines()}


def test_the_merged_folder_is_what_one_command_would_leave(whole: Path, model: str) -> None:
    group, *_ = make_groups({**PLAN, "models": model}, whole, "plan")
    before = (group.folder / "records.jsonl").read_bytes()
    found = run_job(group.job, load_model(model), group.folder)
    assert len(found) == 2 * 3
    assert (group.folder / "records.jsonl").read_bytes() == before  # nothing was missing
    for command in ("report", "frontier"):
        words = ["--out", whole / "page.html"] if command == "report" else []
        result = run(command, group.folder, *words)
        assert result.exit_code == 0, result.stderr
    assert run("compare", whole, "--encoder", "none").exit_code == 0
    again = run("run", plan(whole.parent, model), "--out", whole, "--ray", "off")
    assert again.exit_code == 0 and "12 of them done" in again.stderr
    assert "so accuracies at any budget mean nothing" in again.stdout  # an untrained model answers nothing right


def test_three_random_kills_leave_the_records_of_an_uninterrupted_plan(whole: Path, model: str, tmp_path: Path) -> None:
    file, out = plan(tmp_path, model), tmp_path / "out"
    words = ["run", str(file), "--out", str(out), "--ray", "off"]
    draw = random.Random(5)
    for third in range(3):
        wanted = draw.randrange(third * CELLS // 3 + 1, (third + 1) * CELLS // 3)
        process = start(run_command, words)
        while process.is_alive() and len(list(out.glob("cells/**/records.jsonl"))) < wanted:
            time.sleep(0.02)
        time.sleep(draw.uniform(0, 0.05))
        kill(process, "the plan")
    assert run("run", file, "--out", out, "--ray", "off").exit_code == 0
    assert records(out) == records(whole)
    again = run("run", file, "--out", out, "--ray", "off")
    assert f"{CELLS} cells, {CELLS} of them done" in again.stderr


def test_a_killed_ray_worker_leaves_the_records_of_an_uninterrupted_plan(
    whole: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
    groups = make_groups({**PLAN, "models": model}, tmp_path / "out", "plan")
    cells = list({cell.folder: cell for group in groups for cell in group.cells}.values())
    victim = cells[3]
    ended: list[str | None] = []
    cells = [KilledOnce(one) if one is victim else one for one in cells]
    run_on_ray(cells, lambda cell, cause: ended.append(cause), cores=os.cpu_count() or 1)
    assert ended == [None] * CELLS
    assert (victim.folder / ".killed").exists()
    assert all([group.merge() for group in groups])
    assert records(tmp_path / "out") == records(whole)


class KilledOnce(Cell):
    """A cell whose worker is killed after its first batch, the first time."""

    def __init__(self, cell: Cell) -> None:
        super().__init__(cell.source, cell.job, cell.folder, cell.full, cell.label)

    def run(self, model: LoadedModel, progress: Progress = silent) -> list[object]:
        def die(*counts: object, **facts: object) -> None:
            mark = self.folder / ".killed"
            if not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)

        return super().run(model, die)


def test_a_cell_that_fails_stops_no_other_and_is_listed_with_its_cause(model: str, tmp_path: Path) -> None:
    file = plan(tmp_path, model, runs=[], seeds=0, tasks=["nowhere", TASK], methods="keydiff", budgets=24)
    result = run("run", file, "--out", tmp_path / "out", "--ray", "off")
    assert result.exit_code == 1
    failed = [line for line in result.stdout.splitlines() if line.startswith("Failed: ")]
    assert len(failed) == 2
    assert "There is no task 'nowhere'" in failed[0]
    assert "full KV's cell of this task failed" in failed[1]
    assert "keydiff" in result.stdout.split("Failed: ")[0]  # the other task's table
    data = json.loads(run("run", file, "--out", tmp_path / "out", "--ray", "off", "--json").stdout)
    assert len(data["failed"]) == 2
    assert len(data["folders"]) == 1


def test_a_defect_in_a_cell_is_listed_and_keeps_its_traceback(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object, **more: object) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr("reasonkv.evaluate.plan.run", broken)
    file = plan(tmp_path, model, runs=[], seeds=0, methods="keydiff", budgets=24)
    result = run("run", file, "--out", tmp_path / "out", "--ray", "off")
    assert result.exit_code == 1
    assert "ZeroDivisionError: a defect (details in" in result.stdout
    (text,) = (tmp_path / "out").rglob(".traceback.txt")
    assert "a defect" in text.read_text()


def test_a_dry_run_says_what_is_left_and_runs_nothing(whole: Path, model: str, tmp_path: Path) -> None:
    file, out = plan(tmp_path, model), tmp_path / "out"
    result = run("run", file, "--out", out, "--ray", "off", "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert "hours on 1 worker" in result.stdout
    assert not list(out.rglob("records.jsonl"))
    data = json.loads(run("run", file, "--out", out, "--ray", "off", "--dry-run", "--json").stdout)
    replay = data["groups"][0]
    assert (replay["cells"], replay["output_tokens"]) == (3, 2 * 40)
    assert replay["bytes_peak"] > 0
    assert data["hours"] > 0
    done = json.loads(run("run", plan(tmp_path, model), "--out", whole, "--ray", "off", "--dry-run", "--json").stdout)
    assert done["hours"] == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda one: one | {"command": "measure", "runs": []}, "command in"),
        (lambda one: one | {"tsks": ["program"]}, "[tsks]"),
        (lambda one: one | {"methods": ["rvk"]}, "did you mean 'rkv'"),
        (
            lambda one: {key: value for key, value in one.items() if key not in ("runs", "budgets")},
            "has bounded methods and no budget",
        ),
        (lambda one: one | {"seeds": ["first"], "runs": []}, "seeds in"),
        (lambda one: one | {"runs": ["replay"]}, "takes a list of options"),
        (lambda one: one | {"runs": [{}, {}]}, "would write one folder"),
        (lambda one: ["replay"], "has none"),
    ],
)
def test_a_wrong_plan_is_one_sentence(
    change: Callable[[dict[str, object]], object], words: str, tmp_path: Path
) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(yaml.safe_dump(change(dict(PLAN))))
    assert words in sentence(run("run", file, "--out", tmp_path / "out"))


def test_the_prompt_heavy_pack_has_the_eight_sets_with_both_baselines(tmp_path: Path) -> None:
    pack = yaml.safe_load((EXAMPLES / "prompt_heavy.yaml").read_text())
    groups = make_groups(pack, tmp_path, "pack")
    tasks = {str(cell.job.task[0]) for group in groups for cell in group.cells}
    names = ("qasper", "hotpotqa", "multi_news", "musique", "2wikimqa", "vcsum", "qmsum", "gov_report")
    assert tasks == {f"longbench:{name}" for name in names}
    for kind in (ReplayJob, GenerateJob):
        own = [cell for group in groups for cell in group.cells if isinstance(cell.job, kind)]
        labels = {cell.label for cell in own}
        assert len(own) == 8 * (1 + 7 * 3)
        assert {f"{name} @ {size}" for name in ("triattention", "triattention:variant=paper", "cask") for size in
                (256, 384, 512)} < labels  # fmt: skip
        budgets = [make_budgets(cell.job.budget)[0] for cell in own if cell.full]
        assert {(one.prompt, one.sinks, one.recent, one.cut_prompt) for one in budgets} == {
            ("count", 0, 0, "first_event")
        }


def test_the_example_plan_is_a_plan(tmp_path: Path) -> None:
    groups = make_groups(yaml.safe_load((EXAMPLES / "plan.yaml").read_text()), tmp_path, "plan")
    assert len({cell.folder for group in groups for cell in group.cells}) == 2 * (1 + 3 * 2)
