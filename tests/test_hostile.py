"""Hostile command lines, and results folders of strangers: one sentence, and nothing is run or written elsewhere."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from command_line import run
from good_files import JOBS, ROWS, Good, is_one_sentence, read_everything, write_lines

from reasonkv.evaluate.run import run as run_job
from reasonkv.models import load_model
from reasonkv.report.inspector import inspector_page
from reasonkv.report.report import report_html
from reasonkv.report.sources import inspect_folder


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Good:
    return Good(tmp_path_factory.mktemp("good"))


# -- command lines ----------------------------------------------------------------------------------------------------

SMALL = ["--task", "program:lines=8", "--limit", "1", "--interval", "8", "--recent", "4"]
HUGE = "1" + "0" * 30


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (f"evaluate {{small}} --methods random --budgets 16 --samples {HUGE} --out OUT", "--samples cannot be used"),
        ("evaluate {small} --methods random --budgets 16 --samples 999999999 --out OUT", "samples must be at most"),
        (f"replay {{small}} --methods random --budgets {HUGE} --out OUT", "--budgets cannot be used"),
        ("replay {small} --methods random --budgets 9999999999 --out OUT", "tokens must be below 2^31"),
        (f"replay {{small}} --methods snapkv:window={HUGE} --budgets 16 --out OUT", "window must be below 2^31"),
        (f"replay --task program --limit {HUGE} --methods full --out OUT", "--limit cannot be used"),
        ("replay {small} --methods random --keep nan --out OUT", "--keep cannot be used: nan"),
        ("train-gate --task program --rate nan --out OUT.safetensors", "--rate cannot be used: nan"),
        ("train-gate --task program --rate -1 --out OUT.safetensors", "rate must be a number above 0"),
        (f"calibrate --task program --tokens {HUGE}", "--tokens cannot be used"),
        ("generate a --device meta", "The device 'meta' is not available here"),
        ("generate a --device lazy", "The device 'lazy' is not available here"),
        ("generate \udcff", "is no valid Unicode"),
        ("replay {small} --methods random --budgets 16 --out LOOP", "cannot be used for results"),
        ("frontier LOOP", "There is no results folder"),
        ("report LOOP", "There is no results folder"),
        ("inspect LOOP", "There is no results folder"),
        ("run /dev/zero", "it is a device, not a file"),
        ("replay --config /dev/zero", "it is a device, not a file"),
        ("inspect --prompt @/dev/zero --budget 64", "it is a device, not a file"),
        ("inspect --text /dev/zero --budget 64", "it is a device, not a file"),
        ("evaluate {small} --endpoint http://[::1 --out OUT", "is no address such as http://"),
        ("evaluate {small} --endpoint http://h:x --out OUT", "is no address such as http://"),
        ("evaluate {small} --endpoint file:///etc/passwd --out OUT", "is no address such as http://"),
        ("frontier OUT --figure x.unknown", "--figure draws a PNG"),
    ],
)
def test_a_hostile_command_line_is_one_sentence(tmp_path: Path, line: str, words: str) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop.name)
    given = line.format(small=" ".join(SMALL)).replace("OUT", str(tmp_path / "out")).replace("LOOP", str(loop))
    result = run(*given.split())
    assert result.exit_code in {1, 2} and words in result.stderr.splitlines()[-1]
    assert not result.stdout


def test_no_command_at_all_shows_the_commands() -> None:
    result = run()
    assert result.exit_code == 0 and "replay" in result.stdout and "Start here" in result.stdout


@pytest.mark.parametrize("ends", ["abc", ["abc"], {"a": 1}, 1.5])
def test_a_model_whose_end_tokens_are_no_numbers_is_one_sentence(good: Good, tmp_path: Path, ends: Any) -> None:
    folder = tmp_path / "model"
    shutil.copytree(good.place / "tiny", folder)
    for name in ("config.json", "generation_config.json"):
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | {"eos_token_id": ends}))
    result = run("generate", "a 1", "--model", folder)
    assert result.exit_code == 2 and str(folder) in result.stderr.splitlines()[-1]


# -- folders of strangers ---------------------------------------------------------------------------------------------


def test_a_folder_of_a_stranger_cannot_write_outside_itself(good: Good, tmp_path: Path) -> None:
    folder, outside = tmp_path / "answers", tmp_path / "outside"
    shutil.copytree(good.place / "answers", folder)
    outside.mkdir()
    (outside / "note").write_text("no newline at its end")
    (outputs,) = folder.glob("outputs-*")
    outputs.unlink()
    outputs.symlink_to(outside / "note")
    for name in (".records.jsonl.tmp", ".manifest.json.tmp"):
        (folder / name).symlink_to(outside / "note")
    (folder / "inspections").symlink_to(outside)
    read_everything(folder, good.loaded)
    shutil.copy(next((good.place / "answers").glob("outputs-*")), tmp_path / "whole")
    outputs.unlink()
    shutil.move(tmp_path / "whole", outputs)
    made = inspect_folder(folder, good.loaded, {})
    assert not is_one_sentence(lambda: made.save(folder))
    for name in ("records.jsonl", ".lock"):
        (folder / name).unlink()
        (folder / name).symlink_to(outside / "note")
        assert not is_one_sentence(lambda: run_job(JOBS["answers"], good.loaded, folder))
    assert [one.name for one in outside.iterdir()] == ["note"]
    assert (outside / "note").read_text() == "no newline at its end"


@pytest.mark.parametrize(
    ("name", "words"), [("records.jsonl", "it is a device, not a file"), ("manifest.json", "it has no manifest.json")]
)
def test_a_device_in_the_place_of_a_file_is_not_read_for_ever(
    good: Good, tmp_path: Path, name: str, words: str
) -> None:
    folder = tmp_path / "replay"
    shutil.copytree(good.place / "replay", folder)
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    result = run("report", folder)
    assert result.exit_code in {1, 2} and words in result.stderr.splitlines()[-1]


def test_a_folder_of_a_stranger_runs_no_code(good: Good, tmp_path: Path) -> None:
    folder = tmp_path / "answers"
    shutil.copytree(good.place / "answers", folder)
    code = tmp_path / "evil.py"
    code.write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\ndef grade(*_): return 1\n")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["arguments"]["options"] = {"grade": f"{code}:grade"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(Exception, match=r"The grader is code, .*give --grade"):
        inspect_folder(folder, good.loaded, {})
    yaml, rows = tmp_path / "mine.yaml", tmp_path / "rows.jsonl"
    write_lines(rows, ROWS)
    yaml.write_text(json.dumps({"dataset": "rows.jsonl", "grade": f"{code}:grade"}))
    lines = [json.loads(line) | {"task": str(yaml)} for line in (folder / "records.jsonl").read_text().splitlines()]
    manifest["arguments"]["options"] = {}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    write_lines(folder / "records.jsonl", lines)
    with pytest.raises(Exception, match=r"give --task .*mine\.yaml if you trust it"):
        inspect_folder(folder, good.loaded, {})
    assert not os.path.exists(tmp_path / "ran")


def test_pages_escape_what_a_vocabulary_holds(good: Good, tmp_path: Path) -> None:
    hostile = "</script><script>alert(1)</script>"
    folder = tmp_path / "tiny"
    shutil.copytree(good.place / "tiny", folder)
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text())
    text = data["model"]["vocab"]
    old = next(name for name in text if name.startswith("n0"))
    path.write_text(path.read_text().replace(json.dumps(old), json.dumps(hostile)))
    loaded = load_model(str(folder), device="cpu")
    assert hostile in loaded.tokenizer.get_vocab()
    shutil.copytree(good.place / "replay", tmp_path / "replay")
    made = inspect_folder(tmp_path / "replay", loaded, {})
    made.data["pieces"][0] = made.data["scores"]["top"][0] = hostile  # whatever the trace holds
    made.save(tmp_path / "replay")
    for page in (inspector_page(made.data), report_html([tmp_path / "replay"], title=hostile), made._repr_html_()):
        assert "alert(1)" in page and hostile not in page and "<script>alert" not in page
