"""What goes wrong on the command line is one sentence and an exit code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import replay, run, sentence
from cyclopts import App
from tiny import save_tiny

from reasonkv import cli


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("models") / "tiny"))


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"methods": "full,snapvk"}, "Unknown method 'snapvk'; did you mean 'snapkv'?"),
        ({"methods": "snapkv:windw=3"}, "Unknown option of snapkv 'windw'; did you mean 'window'?"),
        ({"methods": "snapkv:window=many"}, "window"),
        ({"methods": ","}, "names separated by commas, not ','"),
        ({"budgets": 9}, "9 tokens cannot hold 2 sinks and 8 recent"),
        ({"methods": "snapkv:window=30"}, "24 tokens cannot hold 2 sinks and 30 recent"),
        ({"budgets": "many"}, "--budgets takes whole numbers"),
        ({"mean_slots": 200}, "Give one of tokens and mean_slots"),
        ({"budgets": 0}, "tokens must be a whole number of at least 1"),
        ({"task": "programme"}, "There is no task 'programme'"),
        ({"task": "program:lines=999"}, "from 4 to 96"),
        ({"limit": 0}, "limit must be a whole number of at least 1"),
        ({"prompt_policy": "keepit"}, '"keepit" for --prompt-policy; choose from: "count", "keep", "on_top"'),
        ({"traces": "stored"}, "traces must be one of greedy, sampled, reference, or a file"),
        ({"dtype": "int8"}, "Unknown dtype 'int8'"),
        ({"device": "tpu:9"}, "The device 'tpu:9' is not available here"),
        ({"model": "/no/such/folder"}, "There is no folder /no/such/folder"),
        ({"prompt_policy": "keep", "budgets": 60}, "leave no room in 60 tokens"),
        ({"config": "/no/such/file"}, "--config cannot read /no/such/file"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    model: str, tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    assert words in sentence(replay(model, tmp_path / "out", **changes))


def test_statistics_that_are_read_are_not_measured(tmp_path: Path) -> None:
    for flag in ("--forecast", "--horizon", "--layer-shares"):
        assert "leave --forecast, --horizon" in sentence(run("calibrate", "--import", tmp_path / "stats.pt", flag))


def empty(folder: Path) -> None:
    folder.mkdir()


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def torn_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])


def torn_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": ')


def other_architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 48}))


def missing_layers(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_hidden_layers": 5, "layer_types": ["full_attention"] * 5}
    (folder / "config.json").write_text(json.dumps(config))


def unknown_type(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "abacus"}')


def no_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


@pytest.mark.parametrize(
    "damage",
    [empty, no_weights, torn_weights, torn_config, other_architecture, missing_layers, unknown_type, no_tokenizer],
)
def test_a_wrong_model_folder_is_one_sentence_and_exit_code_2(
    model: str, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    folder = tmp_path / "model"
    if damage is not empty:
        shutil.copytree(model, folder)
    damage(folder)
    assert str(folder) in sentence(replay(str(folder), tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_model_given_as_a_file_is_one_sentence(model: str, tmp_path: Path) -> None:
    assert "is a file" in sentence(replay(f"{model}/config.json", tmp_path / "out"))


def test_a_folder_of_another_command_is_one_sentence_and_a_corrupt_record_names_its_line(
    model: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert replay(model, out).exit_code == 0
    assert "holds results of another command (limit 2, not 3)" in sentence(replay(model, out, limit=3))
    lines = (out / "records.jsonl").read_bytes().splitlines(keepends=True)
    (out / "records.jsonl").write_bytes(b"".join([lines[0], lines[1][:50] + b"\n", *lines[2:]]))
    assert "records.jsonl, line 2" in sentence(replay(model, out), code=1)
    (out / "records.jsonl").write_bytes(b"".join([lines[0], *lines[2:]]))
    assert replay(model, out).exit_code == 0  # what the sentence advised
    assert len((out / "records.jsonl").read_text().splitlines()) == len(lines)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "Give either a prompt or --task NAME"),
        (["a", "--task", "program"], "Give either a prompt or --task NAME"),
        (["a", "--prompt", "b"], "Give either a prompt or --task NAME"),
        (["--prompt", " "], "The prompt is empty"),
        (["-"], "The prompt is empty"),
        (["a", "--method", "rkv"], "rkv needs one budget"),
        (["a", "--method", "rkv", "--budgets", "128,256"], "rkv needs one budget"),
        (["a", "--method", "full", "--budget", "128"], "full takes no budget"),
        (["a", "--method", "snapkv", "--budget", "20", "--recent", "40"], "20 tokens cannot hold"),
        (["a", "--chat"], "no chat template"),
        (["--task", "maths"], "There is no task 'maths'"),
        (["a", "--max-new-tokens", "0"], "--max-new-tokens must be at least 1, not 0"),
        (["a", "--temperature", "-1"], "temperature must be a number of at least 0, not -1.0"),
    ],
)
def test_generate_says_what_is_wrong_in_one_sentence(model: str, arguments: list[str], words: str) -> None:
    assert words in sentence(run("generate", "--model", model, *arguments))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["replya"], 'Unknown command "replya"; did you mean "replay"; see `reasonkv --help`.'),
        (["replay", "--task", "program"], "Give --out a value; see `reasonkv replay --help`."),
        (["evaluate", "--tsk", "program"], "did you mean --task instead of --tsk; see `reasonkv evaluate --help`."),
        (["replay", "--task"], "Give --task a value"),
        (["demo", "--limit", "many"], 'Invalid value for --limit: unable to convert "many" into int'),
        (["methods", "rkv", "snapkv"], "Unexpected argument 'snapkv'"),
        (["train-testbed"], "python -m tools.testbed"),
        (["frontier", "--task", "program", "--methods", "rkv"], "`reasonkv tune` searches for budgets now"),
    ],
)
def test_a_mistyped_command_line_is_one_sentence_too(arguments: list[str], words: str) -> None:
    assert words in sentence(run(*arguments))


def _raising(error: BaseException) -> Callable[[], App]:
    def command() -> None:
        raise error

    def make_app() -> App:
        return App(default_command=command, suppress_keyboard_interrupt=False)

    return make_app


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(), 130, "Stopped; the same command continues where it stopped."),
        (PermissionError(13, "Permission denied", "/locked"), 1, "Permission denied: '/locked'"),
        (ModuleNotFoundError("No module named 'pandas'", name="pandas"), 1, "pip install 'reasonkv[eval]'"),
    ],
)
def test_what_goes_wrong_outside_is_one_line(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, words: str
) -> None:
    monkeypatch.setattr(cli, "make_app", _raising(error))
    result = run()
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (code, "", 1)
    assert words in result.stderr


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "make_app", _raising(ZeroDivisionError("a defect")))
    with pytest.raises(ZeroDivisionError, match="a defect"):
        run()
