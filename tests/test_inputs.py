"""What no input can do: end in a traceback. Every file that is read is damaged in every field, and options are hostile."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import damaged_bytes, damaged_tensors, damaged_value, read_header, tensors_of
from good_files import ROWS, Good, is_one_sentence, read_everything, write_lines
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from reasonkv.calibration import import_pt, load_calibration
from reasonkv.cli import make_app
from reasonkv.cli.config import check_flat, parse_options, read_options
from reasonkv.cli.plan import make_groups
from reasonkv.evaluate.cells import check_job
from reasonkv.evaluate.job import GenerateJob
from reasonkv.evaluate.manifest import ResultsError
from reasonkv.evaluate.traces import encode_given
from reasonkv.inputs import read_json
from reasonkv.seer.gate import find_gate
from reasonkv.tasks import TaskOptions, get_task

TRACES = [
    {"prompt": "a 1 b", "output": "a 1 </think> 1"},
    {"prompt_token_ids": [4, 5, 6], "output_token_ids": [7, 8]},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b 2"}]},
    {"request": {"prompt": "a"}, "response": {"choices": [{"text": "b", "message": {"content": "c"}}]}},
    {"resps": [["b 1"]], "arguments": {"gen_args_0": {"arg_0": "a"}}, "filter": "none"},
    {"outputs": [{"text": "a"}, "b"], "prompt": "c"},
]  # fmt: skip
DECLARED = {
    "title": "t", "dataset": "rows.jsonl", "prompt": "{{ question }}", "answer": "answer", "grade": "number", "shots": 1,
    "extract": r"(\d+)", "ignore": [","], "chat": True, "sampling": {"temperature": 0.5, "top_k": 4}, "stop": ["."],
    "shots_from": "rows.jsonl", "max_new_tokens": 4, "length": 64, "rename": {"a": "b"}, "split": "test",
    "shuffle_choices": {"right": "question", "wrong": ["wrong"]}, "subsets": {},
}  # fmt: skip
OPTIONS = {"task": ["program:lines=8"], "methods": ["full", "random"], "budgets": [24, 32], "limit": 2, "seed": 1,
           "interval": 8, "recent": 4, "prompt-policy": "keep", "temperature": 0.5, "retention": [0.3], "chat": "off"}  # fmt: skip
LONGEST = 5.0  # seconds of the processor; more is a hang
PLAN = {"models": ["testbed", {"model": "testbed", "dtype": "float32"}], "tasks": ["program"], "methods": ["random"],
        "budgets": [32], "seeds": [0, 1], "runs": [{"command": "replay", "name": "a"}, {"command": "evaluate"}],
        "name": "x", "out": "here", "interval": 16, "recent": 8}  # fmt: skip


def a_results_folder(draw: Callable[[Any], Any], good: Good, place: Path) -> None:
    kind = draw(st.sampled_from(("replay", "answers")))
    folder = place / kind
    shutil.copytree(good.place / kind, folder)
    names = sorted(one.name for one in folder.rglob("*") if one.suffix in {".json", ".jsonl", ".safetensors"})
    path = next(folder.rglob(draw(st.sampled_from(["records.jsonl", "manifest.json", *names]))))
    if draw(st.integers(0, 9)) == 0:
        path.write_bytes(draw(damaged_bytes(path.read_bytes())))
    elif path.suffix == ".safetensors":
        path.write_bytes(draw(damaged_tensors(path.read_bytes(), tensors_of(path), None)))
    elif path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        at = draw(st.integers(0, len(rows) - 1))
        write_lines(path, [*rows[:at], draw(damaged_value(rows[at])), *rows[at + 1 :]])
    else:
        path.write_text(json.dumps(draw(damaged_value(json.loads(path.read_text())))))
    read_everything(folder, good.loaded)


def a_calibration(draw: Callable[[Any], Any], good: Good, place: Path) -> None:
    path = place / "stats.safetensors"
    path.write_bytes(draw(damaged_tensors(
        good.calibration.read_bytes(), tensors_of(good.calibration), read_header(good.calibration)
    )))  # fmt: skip
    is_one_sentence(lambda: load_calibration(path).check(good.loaded.model.config))
    if is_one_sentence(lambda: load_calibration(path)):
        json.dumps(load_calibration(path).layer_concentrations(), allow_nan=False)


def a_public_calibration(draw: Callable[[Any], Any], good: Good, place: Path) -> None:
    path, whole = place / "a.pt", torch.load(good.place / "a.pt", weights_only=True)
    odd = (torch.rand(4).to_sparse(), torch.rand(9), torch.zeros(0), torch.zeros(2, 2), torch.zeros(4, dtype=torch.int32),
           torch.full((4,), float("nan")), torch.zeros(4, dtype=torch.complex64))  # fmt: skip
    if draw(st.booleans()):
        torch.save(draw(damaged_value(whole)), path)
    elif draw(st.booleans()):
        name = draw(st.sampled_from(sorted(whole["stats"])))
        head = dict(whole["stats"].pop(name))
        head[draw(st.sampled_from(sorted(head)))] = draw(st.sampled_from(odd))
        names = (name, "layer999999999_head00", "layer00_head99999", "x", "layer0_head00")
        torch.save({**whole, "stats": {**whole["stats"], draw(st.sampled_from(names)): head}}, path)
    else:
        path.write_bytes(draw(damaged_bytes((good.place / "a.pt").read_bytes())))
    is_one_sentence(lambda: import_pt(path))


def a_gate(draw: Callable[[Any], Any], good: Good, place: Path) -> None:
    path = place / "gate.safetensors"
    path.write_bytes(draw(damaged_tensors(good.gate.read_bytes(), tensors_of(good.gate), read_header(good.gate))))
    is_one_sentence(lambda: find_gate(good.loaded.model, path))


def a_task(draw: Callable[[Any], Any], good: Good, place: Path) -> None:
    shutil.copy(good.place / "rows.jsonl", place)
    kind = draw(st.sampled_from(("rows.jsonl", "rows.json", "mine.yaml", "bytes")))
    path = place / kind
    if kind == "mine.yaml":
        path.write_text(json.dumps(draw(damaged_value(DECLARED))))
    elif kind == "bytes":
        path = place / draw(st.sampled_from(("rows.json", "rows.jsonl", "rows.csv", "rows.parquet", "mine.yml")))
        path.write_bytes(draw(damaged_bytes((good.place / "rows.jsonl").read_bytes())))
    elif kind == "rows.json":
        path.write_text(json.dumps(draw(damaged_value(ROWS))))
    else:
        write_lines(path, draw(damaged_value(ROWS)))

    def use() -> None:
        task = get_task(str(path), TaskOptions())
        problem = task.problem(0)
        good.loaded.tokenizer(problem.prompt)
        task.grade(problem, "</think> 4")
        check_job(GenerateJob(task=(str(path),), methods=("full",)))

    is_one_sentence(use)


def a_file_of_traces(draw: Callable[[Any], Any], good: Good, place: Path) -> None:
    path = place / "traces.jsonl"
    write_lines(path, draw(damaged_value(TRACES)))

    def use() -> None:
        task = get_task(f"traces:{path}")
        for one in task.traces:  # type: ignore[attr-defined]
            is_one_sentence(lambda one=one: encode_given(good.loaded.tokenizer, one, TaskOptions()))

    is_one_sentence(use)


def a_configuration(draw: Callable[[Any], Any], good: Good, place: Path) -> None:
    path, is_plan = place / "run.yaml", draw(st.booleans())
    text = json.dumps(draw(damaged_value(PLAN if is_plan else OPTIONS)))
    path.write_text(text if draw(st.integers(0, 5)) else draw(damaged_bytes(text.encode())).decode(errors="replace"))

    def use() -> None:
        given = read_options(str(path))
        if is_plan:
            make_groups(given, place, "run.yaml")
        else:
            parse_options(make_app(), "replay", check_flat(given, "run.yaml"), "run.yaml")

    is_one_sentence(use)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Good:
    return Good(tmp_path_factory.mktemp("good"))


KINDS = (a_results_folder, a_calibration, a_public_calibration, a_gate, a_task, a_file_of_traces, a_configuration)


@pytest.fixture(autouse=True)
def _no_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Vega's script, 800 kB, is the same in every page."""
    monkeypatch.setattr("reasonkv.report.report.chart_script", lambda: "")


def damage(good: Good, kind: Callable[..., None], examples: int) -> None:
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        derandomize=examples < 100,
    )
    @given(st.data())
    def one(data: st.DataObject) -> None:
        began = time.process_time()
        with tempfile.TemporaryDirectory(dir=good.place) as place:
            kind(data.draw, good, Path(place))
        assert time.process_time() - began < LONGEST

    one()


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_one_sentence(good: Good, kind: Callable[..., None]) -> None:
    damage(good, kind, 25 if kind is a_results_folder else 40)


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
def test_five_thousand_damaged_files_are_one_sentence_each(good: Good, kind: Callable[..., None]) -> None:
    damage(good, kind, 1500 if kind is a_results_folder else 700)


@pytest.mark.parametrize("text", ['{"a": [NaN]}', '{"a": Infinity}', '{"a": 1e999}'])
def test_json_whose_numbers_are_not_finite_is_refused_even_where_any_type_fits(text: str, tmp_path: Path) -> None:
    (tmp_path / "file.json").write_text(text)
    with pytest.raises(ResultsError, match="cannot be read as a file of tests"):
        read_json(tmp_path / "file.json", TypeAdapter(dict[str, Any]), "a file of tests", ResultsError, "delete it")
