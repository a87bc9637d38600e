"""What the command line promises: examples in every help, JSON on stdout, and one sentence for every mistake."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from tiny import TASK, save_tiny
from typer.testing import CliRunner

import reasonkv.evaluate.demo
from reasonkv.cli import app
from reasonkv.cli.common import UsageError, split_specs, whole_numbers
from reasonkv.methods import CATALOGUE, get_method
from reasonkv.methods.sparse_read import SelectionMethod
from reasonkv.runtimes.vllm.config import EngineConfig, ServingError

COMMANDS = (
    "demo", "methods", "doctor", "generate", "replay", "evaluate", "frontier", "report", "inspect", "train-testbed",
    "calibrate", "train-gate", "serve",
)  # fmt: skip
SMALL = ["--interval", "12", "--sinks", "2", "--recent", "8", "--prompt-policy", "on_top", "--max-new-tokens", "40"]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("models") / "tiny"))


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def replay(model: str, out: Path, *extra: object) -> tuple[int, str, str]:
    basis = ["--task", TASK, "--methods", "full,random,rkv", "--budgets", "24", "--limit", "2", "--batch-size", "2"]
    # the last of a repeated option counts, so `extra` overrides
    return run("replay", "--model", model, *basis, *SMALL, "--out", out, *extra)


# -- mistakes ---------------------------------------------------------------------------------------------------------


def sentence(code: int, stdout: str, stderr: str) -> str:
    """The one line on stderr, after checking that it is one."""
    assert stdout == ""
    lines = [line for line in stderr.splitlines() if line]
    assert lines[-1].startswith("Error: ")
    assert [line for line in lines if line.startswith("Error")] == lines[-1:]
    assert "Traceback" not in stderr
    assert lines[-1].endswith((".", "?)", ")"))
    return lines[-1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--methods", "full,snapvk"], "Unknown method 'snapvk'; did you mean 'snapkv'?"),
        (["--methods", "rkv:from=port"], "Unknown option of rkv 'from'; did you mean 'form'?"),
        (["--methods", "snapkv:window=many"], "window takes a whole number, not 'many'"),
        (["--methods", ","], "names nothing"),
        (["--budgets", "9"], "9 tokens cannot hold 2 sinks and 8 recent"),
        (["--budgets", "24", "--methods", "snapkv:window=30"], "24 tokens cannot hold 2 sinks and 30 recent"),
        (["--budgets", "many"], "--budgets takes whole numbers"),
        (["--mean-slots", "200"], "Give either --budgets or --mean-slots."),
        (["--budgets", "0"], "tokens must be a whole number of at least 1"),
        (["--task", "programme"], "There is no task 'programme'"),
        (["--task", "program:lines=999"], "from 4 to 96"),
        (["--limit", "0"], "--limit must be at least 1"),
        (["--prompt-policy", "keepit"], "prompt must be one of count, keep, on_top, not 'keepit'"),
        (["--traces", "stored"], "--traces must be one of greedy, sampled, reference"),
        (["--dtype", "int8"], "Unknown dtype 'int8'"),
        (["--device", "tpu:9"], "The device 'tpu:9' is not available here"),
        (["--model", "/no/such/folder"], "There is no folder /no/such/folder"),
        (["--prompt-policy", "keep", "--budgets", "60"], "leave no room in 60 tokens"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    model: str, tmp_path: Path, arguments: list[str], words: str
) -> None:
    code, stdout, stderr = replay(model, tmp_path / "out", *arguments)
    assert words in sentence(code, stdout, stderr)
    assert code == 2


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
    code, stdout, stderr = replay(str(folder), tmp_path / "out")
    assert str(folder) in sentence(code, stdout, stderr)
    assert code == 2
    assert not (tmp_path / "out").exists()


def test_a_model_given_as_a_file_is_one_sentence(model: str, tmp_path: Path) -> None:
    code, stdout, stderr = replay(f"{model}/config.json", tmp_path / "out")
    assert "is a file" in sentence(code, stdout, stderr)
    assert code == 2


def test_a_folder_of_another_command_is_one_sentence_and_a_corrupt_record_names_its_line(
    model: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert replay(model, out)[0] == 0
    code, stdout, stderr = replay(model, out, "--limit", "3")
    assert "holds results of another command (limit 2, not 3)" in sentence(code, stdout, stderr)
    assert code == 2
    lines = (out / "records.jsonl").read_bytes().splitlines(keepends=True)
    (out / "records.jsonl").write_bytes(b"".join([lines[0], lines[1][:50] + b"\n", *lines[2:]]))
    code, stdout, stderr = replay(model, out)
    assert "records.jsonl, line 2" in sentence(code, stdout, stderr)
    assert code == 1
    (out / "records.jsonl").write_bytes(b"".join([lines[0], *lines[2:]]))
    assert replay(model, out)[0] == 0  # what the sentence advised
    assert len((out / "records.jsonl").read_text().splitlines()) == len(lines)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "Give either --prompt TEXT or --task NAME."),
        (["--prompt", "a", "--task", "program"], "Give either --prompt TEXT or --task NAME."),
        (["--prompt", " "], "The prompt is empty"),
        (["--prompt", "a", "--method", "rkv"], "rkv needs a budget; give --budget TOKENS"),
        (["--prompt", "a", "--budget", "64"], "full takes no budget"),
        (["--prompt", "a", "--method", "rkv", "--budget", "20"], "20 tokens cannot hold 4 sinks and 64 recent"),
        (["--prompt", "a", "--chat"], "no chat template"),
        (["--task", "maths"], "There is no task 'maths'"),
    ],
)
def test_generate_says_what_is_wrong_in_one_sentence(model: str, arguments: list[str], words: str) -> None:
    code, stdout, stderr = run("generate", "--model", model, *arguments)
    assert words in sentence(code, stdout, stderr)
    assert code == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["replya"], "No such command 'replya'"),
        (["replay", "--task", "program"], "Missing option"),
        (["replay", "--tsk", "program"], "No such option"),
        (["demo", "--limit", "many"], "Invalid value for '--limit'"),
        (["generate", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["methods", "rkv", "snapkv"], "unexpected extra argument"),
    ],
)
def test_a_mistyped_command_line_is_one_sentence_too(arguments: list[str], words: str) -> None:
    code, stdout, stderr = run(*arguments)
    assert words in sentence(code, stdout, stderr)
    assert "--help`" in stderr
    assert code == 2


def test_train_testbed_refuses_a_folder_with_other_files(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    code, stdout, stderr = run("train-testbed", "--out", tmp_path, "--recipe", "smoke")
    assert "thesis" not in sentence(code, stdout, stderr)
    assert code == 1
    assert "--recipe must be one of" in sentence(*run("train-testbed", "--recipe", "grand"))


# -- what works -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str) -> None:
    code, stdout, _ = run(command, "--help")
    assert code == 0
    assert f"Example: reasonkv {command}" in " ".join(stdout.split())


def test_help_needs_no_heavy_import() -> None:
    code = "import sys, reasonkv.cli; print([m for m in ('torch', 'transformers', 'matplotlib') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={
        "PYTHONPATH": ":".join(sys.path)})  # fmt: skip
    assert found.stdout.strip() == "[]"


def test_replay_leaves_table_figure_and_records(model: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, stdout, stderr = replay(model, out)
    assert code == 0
    for word in ("full", "random", "rkv", "top-1 %", "saved bytes %", "± is one standard error"):
        assert word in stdout
    assert "rkv @ 24" in stderr
    assert (out / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert {"manifest.json", "records.jsonl", "frontier.png"} < {path.name for path in out.iterdir()}
    code, stdout, _ = replay(model, out, "--json")
    data = json.loads(stdout)
    assert code == 0
    assert [(row["method"], row["tokens"], row["n"]) for row in data["rows"]] == [
        ("full", None, 2), ("random", 24, 2), ("rkv", 24, 2),
    ]  # fmt: skip
    assert data["rows"][2]["versus_random"]["top1"]["pairs"] == 2


def test_the_demo_shows_every_method_at_every_budget_and_where_results_are(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reasonkv.testbed.testbed_path", lambda: Path(model))
    monkeypatch.setattr("reasonkv.evaluate.demo.TASKS", (TASK,))
    monkeypatch.setattr("reasonkv.evaluate.demo.INSPECTED_TASK", TASK)
    monkeypatch.setattr("reasonkv.evaluate.demo.LONGEST_TRACE", 120)
    monkeypatch.setattr("reasonkv.evaluate.evaluator.FULL_LIMIT", 60)  # random weights never come to an end
    monkeypatch.chdir(tmp_path)
    code, stdout, stderr = run("demo", "--limit", "2", "--no-open")
    assert code == 0, stderr
    for word in (*reasonkv.evaluate.demo.METHODS, "slots read", "What to look at:"):
        assert word in stdout
    assert "Report:  reasonkv-demo/report.html" in stdout
    folder = tmp_path / "reasonkv-demo"
    assert (folder / "report.html").read_text().startswith("<!doctype html>")
    assert (folder / "replay" / "frontier.png").read_bytes().startswith(b"\x89PNG")
    for kind, budgets in (("replay", 3), ("answers", 2)):
        records = [json.loads(line) for line in (folder / kind / "records.jsonl").read_text().splitlines()]
        methods = len(reasonkv.evaluate.demo.METHODS) - 1
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
            "every query": needs.observes, f"per {needs.scope}": needs.scope != "head", "merges": needs.folds,
            "mass": needs.log_mass, "calibration": needs.calibration, "rotary": needs.rotary,
            "token ids": needs.token_ids, "output projection": needs.output_projection, "future": needs.future,
            "state per slot": needs.slot_state, "summaries": isinstance(get_method(name), SelectionMethod),
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
    assert set(rows) - set(served) == {"full", "h2o", "pyramidkv", "quest", "seer", "oracle"}


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
    assert "did you mean 'snapkv'?" in sentence(*run("methods", "snapvk"))


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


def test_train_testbed_trains(tmp_path: Path) -> None:
    code, stdout, _ = run("train-testbed", "--recipe", "smoke", "--out", tmp_path / "run", "--json")
    assert code == 0
    assert Path(json.loads(stdout)["model"], "config.json").is_file()


def test_specs_keep_the_options_of_a_method_together() -> None:
    assert split_specs("full, rkv:variant=vase,window=8,snapkv") == ["full", "rkv:variant=vase,window=8", "snapkv"]
    assert split_specs("a,a,b:x=1:2,y=3") == ["a", "b:x=1:2,y=3"]
    assert whole_numbers("1_024, 2048,2048", "--budgets") == [1024, 2048]
    with pytest.raises(UsageError):
        whole_numbers("", "--budgets")


def test_the_app_is_a_typer_app() -> None:
    assert isinstance(app, typer.Typer)
