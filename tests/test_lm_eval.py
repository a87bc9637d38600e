"""The model `reasonkv` of lm-evaluation-harness, on a local fixture in gsm8k's schema."""

from __future__ import annotations

import json
import runpy
import sys
import tomllib
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.registry import model_registry  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from reasonkv.calibration import load_calibration, save_calibration  # noqa: E402
from reasonkv.calibration.files import FILE  # noqa: E402
from reasonkv.errors import ReasonKVError  # noqa: E402
from reasonkv.lm_eval.model import BoundedLM  # noqa: E402
from reasonkv.tasks import get_task  # noqa: E402
from reasonkv.testbed import testbed_path  # noqa: E402

SMALL = {"method": "random", "tokens": 24, "interval": 8, "recent": 8}
TASKS = Path(lm_eval.__file__).parent / "tasks"


@pytest.fixture(scope="module")
def declared(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """lm-eval's own gsm8k, and log-likelihoods of the same answers, over a local file."""
    problems = [get_task("program:lines=12,constants=2,report=1").problem(example) for example in range(5)]
    path = tmp_path_factory.mktemp("data") / "test.jsonl"
    rows = [{"question": one.prompt, "answer": f"{one.trace[:300]} #### {one.answer.split()[-1]}"} for one in problems]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": {"test": str(path)}}}
    gsm8k = yaml.safe_load((TASKS / "gsm8k" / "gsm8k.yaml").read_text()) | data
    gsm8k |= {"task": "local_gsm8k", "num_fewshot": 0, "fewshot_split": None, "training_split": None}
    gsm8k["generation_kwargs"]["max_gen_toks"] = 64
    likely = {"task": "local_likely", "output_type": "loglikelihood", "test_split": "test", **data}
    likely |= {"doc_to_text": "{{question}}", "doc_to_target": " {{answer}}", "num_fewshot": 0}
    likely["metric_list"] = [{"metric": "perplexity"}, {"metric": "acc"}]
    return [gsm8k, likely]


def evaluated(declared: list[dict[str, Any]], model: str, batch_size: int, **given: Any) -> dict[str, Any]:
    """Run lm-eval; return its results."""
    return lm_eval.simple_evaluate(
        model=model, model_args={"pretrained": str(testbed_path()), "dtype": "float32", **given},
        tasks=[dict(one) for one in declared], batch_size=batch_size, bootstrap_iters=0, device="cpu",
        task_manager=TaskManager(include_defaults=False),
    )  # fmt: skip


def responses(results: dict[str, Any]) -> list[Any]:
    """Return what the model wrote and the log-likelihoods it gave, by document."""
    return [
        one["resps"] for name in sorted(results["samples"]) for one in sorted(results["samples"][name], key=lambda x: x["doc_id"])
    ]  # fmt: skip


@pytest.fixture(scope="module")
def full(declared: list[dict[str, Any]]) -> dict[str, Any]:
    return evaluated(declared, "reasonkv", 3)


def test_full_kv_writes_what_lm_evals_own_model_writes_token_for_token(
    declared: list[dict[str, Any]], full: dict[str, Any]
) -> None:
    theirs = evaluated(declared, "hf", 3)
    assert responses(full) == responses(theirs)
    assert full["results"] == theirs["results"]


def test_a_bounded_cache_changes_answers_and_the_results_say_what_it_held(
    declared: list[dict[str, Any]], full: dict[str, Any]
) -> None:
    batch, alone = evaluated(declared, "reasonkv", 3, **SMALL), evaluated(declared, "reasonkv", 1, **SMALL)
    assert responses(batch) != responses(full)
    held, full_held = batch["config"]["reasonkv"], full["config"]["reasonkv"]
    assert held["sequences"] == 10 and full_held["sequences"] == 5  # full KV's log-likelihoods are lm-eval's own
    assert held["mean_compactions"] > 2 and full_held["mean_compactions"] == 0
    assert held["mean_kept_tokens"] < held["mean_tokens_seen"]
    assert full_held["mean_kept_tokens"] == full_held["mean_tokens_seen"]
    # a sequence that ended is not measured while the batch goes on
    assert held["mean_compactions"] == alone["config"]["reasonkv"]["mean_compactions"]
    generated = [len(responses(one)[:5]) for one in (batch, alone)]
    assert generated == [5, 5] and responses(batch)[:5] == responses(alone)[:5]


def test_log_likelihoods_of_a_budget_that_holds_everything_are_those_of_full_kv() -> None:
    problem = get_task("program:lines=8,constants=2,report=1").problem(0)
    lm = BoundedLM(str(testbed_path()), dtype="float32", method="random", tokens=2000, device="cpu")
    tokens = [lm.tok_encode(text) for text in (problem.prompt, problem.trace)]
    request = (("", ""), *tokens)
    (found, is_greedy), (wanted, was_greedy) = lm._replay([request])[0], super(BoundedLM, lm)._loglikelihood_tokens(
        [request], disable_tqdm=True
    )[0]  # fmt: skip
    assert found == pytest.approx(wanted, abs=1e-3) and is_greedy == was_greedy
    assert lm.measured[-1].length == sum(map(len, tokens)) - 1


def test_options_of_a_method_are_separated_by_semicolons() -> None:
    lm = BoundedLM(str(testbed_path()), method="snapkv:window=8;kernel=3", tokens=64, device="cpu")
    assert lm.method.spec() == "snapkv:window=8,kernel=3"


def test_every_cache_has_the_budget_that_was_given_with_calibrated_shares_as_numbers(tmp_path: Path) -> None:
    selecting = BoundedLM(str(testbed_path()), method="quest", tokens=64, device="cpu")
    selecting.open_cache().detach()
    assert selecting.get_model_info()["reasonkv"]["budget"]["tokens"] == 64
    known = load_calibration(testbed_path() / FILE)
    shares = "/".join(f"{1 + layer}" for layer in range(known.layers))
    save_calibration(tmp_path / "stats.safetensors", replace(known, layer_shares=shares))
    calibrated = BoundedLM(
        str(testbed_path()), method="random", tokens=200, layer_shares="calibrated", device="cpu",
        calibration=str(tmp_path / "stats.safetensors"),
    )  # fmt: skip
    assert calibrated.get_model_info()["reasonkv"]["budget"]["layer_shares"] == shares


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"method": "snapkv"}, "needs a budget"),
        ({"tokens": 64}, "takes no budget"),
        ({"method": "nothing", "tokens": 64}, "nothing"),
        ({"method": "oracle", "tokens": 64}, "future"),
    ],
)
def test_a_wrong_choice_is_one_sentence_before_the_model_is_loaded(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ReasonKVError, match=words):
        BoundedLM("nowhere/at-all", **given)


def test_the_entry_point_names_the_model() -> None:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    home, _, name = project["entry-points"]["lm_eval.models"]["reasonkv"].partition(":")
    assert getattr(import_module(home), name) is BoundedLM


def test_lm_evals_command_line_finds_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    # as in a process that has not imported the model yet, for lm-eval need not read entry points
    monkeypatch.delitem(sys.modules, "reasonkv.lm_eval.model")
    monkeypatch.delitem(model_registry._objs, "reasonkv")
    command = ["lm_eval", "--model", "reasonkv", "--tasks", "gsm8k"]
    monkeypatch.setattr(sys, "argv", [*command, "--model_args", "pretrained=nowhere/at-all,method=snapkv"])
    with pytest.raises(SystemExit, match=r"^Error: snapkv needs a budget"):  # which Python prints, with exit code 1
        runpy.run_module("reasonkv.lm_eval", run_name="__main__")


def test_a_dataset_without_network_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable() -> None:
        raise ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub")

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", unreachable)
    with pytest.raises(SystemExit, match=r"^Error: Couldn't reach 'openai/gsm8k' on the Hub$"):
        runpy.run_module("reasonkv.lm_eval", run_name="__main__")
