"""What the command line promises: flags from the API's dataclasses, an example in every help, JSON on stdout, and one
sentence for every mistake."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest
from command_line import SMALL, replay, run, sentence
from tiny import TASK, save_tiny

import reasonkv
from reasonkv import cli
from reasonkv.calibration.job import CalibrateJob
from reasonkv.evaluate.job import GenerateJob, ReplayJob, TuneJob
from reasonkv.methods import CATALOGUE, get_method
from reasonkv.runtimes.vllm.config import EngineConfig, ServingError

COMMANDS = (
    "demo", "methods", "doctor", "generate", "replay", "evaluate", "tune", "frontier", "report", "inspect", "calibrate",
    "train-gate", "serve", "run", "compare", "plan-capacity",
)  # fmt: skip


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("models") / "tiny"))


# -- flags ------------------------------------------------------------------------------------------------------------


def _fields(cls: type) -> list[str]:
    hints = get_type_hints(cls)
    own = [one.name for one in fields(cls) if not is_dataclass(hints[one.name])]
    return own + [name for one in fields(cls) if is_dataclass(hints[one.name]) for name in _fields(hints[one.name])]


@pytest.mark.parametrize(
    ("command", "job"),
    [("replay", ReplayJob), ("evaluate", GenerateJob), ("tune", TuneJob), ("calibrate", CalibrateJob)],
)
def test_every_field_of_a_job_is_a_flag_with_help(command: str, job: type) -> None:
    renamed = {"tokens": "budgets", "prompt": "prompt-policy", "source": "traces", "import_": "import"}
    renamed |= {"preset": "sampling"}
    given = cli.make_app()[command].assemble_argument_collection(parse_docstring=True)
    shown = {name: argument for argument in given for name in argument.names}
    searched = {"tokens", "keep", "mean_slots"} if job is TuneJob else set()
    for name in set(_fields(job)) - searched:
        flag = f"--{renamed.get(name, name) if job is not CalibrateJob or name != 'tokens' else name}".replace("_", "-")
        assert shown[flag].parameter.help, flag


def test_a_file_gives_options_and_the_command_line_wins(model: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        f"model: {model}\ntask: ['{TASK}']\nmethods: [full, random]\nbudgets: [24, 32]\nout: {tmp_path / 'out'}\n"
        "prompt-policy: count\ninterval: 12\nsinks: 2\nrecent: 8\nmax-new-tokens: 40\nlimit: 1\njson: true\n"
    )
    result = run("replay", "--config", file, "--budgets", "28")
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert [(row["method"], row["tokens"]) for row in data["rows"]] == [("full", None), ("random", 28)]
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["arguments"]["budgets"][0]["prompt"] == "count"
    again = run("replay", "--config", "-", "--budgets", "28", stdin=file.read_text())
    assert again.stdout == result.stdout
    wrong = run("replay", "--config", "-", stdin="tsk: program")
    assert "[tsk]" in sentence(wrong)
    assert "has none" in sentence(run("replay", "--config", "-", stdin="- program"))


def test_the_version_and_a_completion_script_are_at_hand(tmp_path: Path) -> None:
    assert run("--version").stdout.strip() == reasonkv.__version__
    script = tmp_path / "completion"
    assert run("--install-completion", "--shell", "fish", "--output", script).exit_code == 0
    assert "prompt-policy" in script.read_text()


# -- what works -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_begins_with_one_sentence_and_an_example_and_groups_flags(command: str) -> None:
    code, stdout, _ = run(command, "--help", env={"COLUMNS": "200"})
    lines = [line.strip() for line in stdout.splitlines() if line.strip()]
    assert code == 0
    assert lines[0].startswith(f"Usage: reasonkv {command}")
    assert lines[1].endswith(".") and lines[1].count(". ") == 0
    assert lines[2].startswith(f"Example: reasonkv {command}")
    if command in {"replay", "evaluate", "tune", "generate", "inspect"}:
        assert all(f"─ {group} ─" in stdout for group in ("What to run", "Budget", "Model", "Output"))


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["methods"], ["replay", "--help"]])
def test_what_only_prints_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        f"import sys, reasonkv.cli; reasonkv.cli.run({arguments!r}); "
        "print([m for m in ('torch', 'transformers', 'pandas', 'pydantic', 'scipy', 'altair') if m in sys.modules])"
    )
    environment = {"PYTHONPATH": ":".join(sys.path)}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert found.stdout.splitlines()[-1] == "[]"


def test_replay_leaves_table_figure_and_records(model: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, stdout, stderr = replay(model, out)
    assert code == 0
    for word in ("full", "random", "rkv", "top-1 %", "saved bytes %", "± is one standard error"):
        assert word in stdout
    assert "rkv @ 24" in stderr
    assert (out / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert {"manifest.json", "records.jsonl", "frontier.png"} < {path.name for path in out.iterdir()}
    code, stdout, _ = replay(model, out, json=True)
    data = json.loads(stdout)
    assert code == 0
    assert [(row["method"], row["tokens"], row["n"]) for row in data["rows"]] == [
        ("full", None, 2), ("random", 24, 2), ("rkv", 24, 2),
    ]  # fmt: skip
    assert data["rows"][2]["versus_random"]["top1"]["pairs"] == 2


def test_the_demo_shows_every_method_at_every_budget_and_where_results_are(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from reasonkv.evaluate import demo

    monkeypatch.setattr("reasonkv.testbed.testbed_path", lambda: Path(model))
    monkeypatch.setattr("reasonkv.evaluate.demo.TASKS", (TASK,))
    monkeypatch.setattr("reasonkv.evaluate.demo.INSPECTED_TASK", TASK)
    monkeypatch.setattr("reasonkv.evaluate.demo.LONGEST_TRACE", 120)
    monkeypatch.setattr("reasonkv.evaluate.run.FULL_LIMIT", 60)  # random weights never come to an end
    monkeypatch.chdir(tmp_path)
    code, stdout, stderr = run("demo", "--limit", "2", "--no-open")
    assert code == 0, stderr
    for word in (*demo.METHODS, "slots read", "What to look at:"):
        assert word in stdout
    assert "Report:  reasonkv-demo/report.html" in stdout
    folder = tmp_path / "reasonkv-demo"
    assert (folder / "report.html").read_text().startswith("<!doctype html>")
    assert (folder / "replay" / "frontier.png").read_bytes().startswith(b"\x89PNG")
    for kind, budgets in (("replay", 3), ("answers", 2)):
        records = [json.loads(line) for line in (folder / kind / "records.jsonl").read_text().splitlines()]
        methods = len(demo.METHODS) - 1
        assert len(records) == 2 * (1 + methods * budgets)
        policies = {json.dumps({**record["budget"], "tokens": 0}) for record in records if record["budget"]}
        assert len(policies) == 1  # equal protection: nothing but the method and the budget's size differs
        assert list((folder / kind / "inspections").glob("*.json"))


def test_methods_lists_the_catalogue() -> None:
    code, stdout, _ = run("methods", "--json")
    rows = {row["name"]: row for row in json.loads(stdout)}
    assert code == 0
    assert {"full", "streaming", "random", "knorm", "keydiff", "snapkv", "rkv", "oracle"} <= set(rows)
    assert list(rows) == list(CATALOGUE)
    assert rows["oracle"]["needs"] == ["the future (replay only)"]
    for name, row in rows.items():
        needs, said = get_method(name).needs, " ".join(row["needs"])
        assert row["title"]
        assert row["paper"]
        assert row["runtimes"][0] == "transformers"
        assert row["options"] == get_method(name).options()
        for words, wanted in {
            f"{needs.queries} newest quer": needs.queries, f"{needs.recent} newest slot": needs.recent,
            "every query": needs.observes, f"per {needs.scope}": needs.scope != "head", "merges": needs.merges,
            "mass": needs.log_mass, "calibration": needs.calibration, "rotary": needs.rotary,
            "token ids": needs.token_ids, "output projection": needs.output_projection, "future": needs.future,
            "state per slot": needs.slot_state, "summaries": needs.selects,
        }.items():  # fmt: skip
            assert (words in said) == bool(wanted), (name, words)


def test_methods_says_of_every_method_what_an_engine_of_vllm_would() -> None:
    rows = {row["name"]: row for row in json.loads(run("methods", "--json")[1])}
    for name, row in rows.items():
        if len(row["runtimes"]) == 1:
            with pytest.raises(ServingError) as error:
                EngineConfig.parse({"method": name, **({} if name == "full" else {"tokens": 512})})
            assert row["not_on"] == {"vllm": str(error.value)}
            continue
        spec = row["runtimes"][1].replace("vllm with ", f"{name}:").replace("vllm", name)
        EngineConfig.parse({"method": spec, "tokens": 512})
        assert row["not_on"] == {}
        if spec != name:
            with pytest.raises(ServingError, match=re.escape(spec.partition(":")[2])):
                EngineConfig.parse({"method": name, "tokens": 512})
    served = {name: row["runtimes"][1] for name, row in rows.items() if len(row["runtimes"]) > 1}
    assert served["cask"] == "vllm with mass=none"
    assert served["snapkv"] == "vllm"
    assert set(rows) - set(served) == {
        "d2o",
        "full",
        "h2o",
        "importance",
        "keyformer",
        "pyramidkv",
        "quest",
        "seer",
        "oracle",
    }


def test_the_list_of_methods_fits_100_columns_and_one_method_has_its_options() -> None:
    text = run("methods")[1]
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text
    for name in CATALOGUE:
        assert re.search(rf"^ {name} ", text, re.M)
    assert "2404.14469" in text
    code, one, _ = run("methods", "snapkv")
    assert code == 0
    for words in ("arXiv 2404.14469, section 4", "kernel: slots pooled together", "window=64,kernel=5,pooling=avg"):
        assert words in one
    assert "it has no options" in run("methods", "full")[1]
    assert json.loads(run("methods", "rkv", "--json")[1])[0]["name"] == "rkv"
    assert "did you mean 'snapkv'?" in sentence(run("methods", "snapvk"))


def test_doctor_says_whether_a_model_is_supported(model: str, tmp_path: Path) -> None:
    _, stdout, _ = run("doctor", "--model", model, "--json")
    report = json.loads(stdout)
    assert report["model"]["supported"] == "yes"
    assert report["versions"]["torch"]
    shutil.copytree(model, tmp_path / "sliding")
    config = json.loads((tmp_path / "sliding" / "config.json").read_text())
    config |= {
        "layer_types": ["sliding_attention"] * config["num_hidden_layers"],
        "use_sliding_window": True,
        "sliding_window": 8,
    }
    (tmp_path / "sliding" / "config.json").write_text(json.dumps(config))
    code, stdout, _ = run("doctor", "--model", tmp_path / "sliding")
    assert code == 1
    assert "problem: " in stdout
    assert "sliding" in stdout
    code, stdout, _ = run("doctor", "--model", tmp_path / "nowhere")
    assert code == 1
    assert "There is no folder" in stdout


def test_generate_prints_text_verdict_and_what_was_held(model: str) -> None:
    arguments = ["--model", model, "--method", "rkv", "--budget", "24", *SMALL]
    code, stdout, stderr = run("generate", *arguments, "--task", TASK, "--limit", "2")
    assert code == 0
    assert "0 of 2 right." in stdout
    assert stderr.count("compactions") == 2
    code, stdout, _ = run("generate", *arguments, "--prompt", "a 1 b 2 c 3", "--json")
    (row,) = json.loads(stdout)["rows"]
    assert code == 0
    assert row["output_tokens"] == 40
    assert row["truncated"] is True
    assert row["correct"] is None
    assert row["physical_peak"] <= 6 + 24 + 12
    assert row["events"] >= 1


def test_generate_with_a_budget_that_is_never_reached_equals_full_kv(model: str) -> None:
    outputs = [
        json.loads(run("generate", "--model", model, "--task", TASK, "--max-new-tokens", "40", "--json", *extra)[1])
        for extra in ([], ["--method", "rkv", "--budget", "400"])
    ]
    assert outputs[0]["rows"][0]["output"] == outputs[1]["rows"][0]["output"]


def test_a_prompt_is_an_argument_an_option_or_standard_input(model: str) -> None:
    short = ["--model", model, "--max-new-tokens", "4"]
    argument, option = (run("generate", *words, *short).stdout for words in (["a 1 b 2"], ["--prompt", "a 1 b 2"]))
    assert argument == option == run("generate", "-", *short, stdin="a 1 b 2").stdout != ""


def test_values_separated_by_commas_are_lists_and_options_stay_with_their_method() -> None:
    words = [
        "--task",
        "a, b:x=1:2,y=3",
        "--methods",
        "rkv:variant=vase,window=8,snapkv",
        "--budgets",
        "1_024, 2048,2048",
    ]
    _, bound, *_ = cli.make_app().parse_known_args(["replay", *words, "--out", "x"])
    job = bound.arguments["job"]
    assert job.task == ("a", "b:x=1:2,y=3")
    assert job.methods == ("rkv:variant=vase,window=8", "snapkv")
    assert job.budget.tokens == (1024, 2048, 2048)  # BudgetOptions keeps each once
