"""`reasonkv inspect` and `cache.inspect()`: traces of tasks, prompts, texts, results folders and caches."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import run, sentence
from safetensors import safe_open
from test_inspector import array
from tiny import TASK, save_tiny, tiny_loaded

from reasonkv import CompressedCache, ReasonKVError
from reasonkv.evaluate.fates import EventPlan, PlanRecorder, fates
from reasonkv.report.inspector import load_inspections

SMALL = ["--interval", "12", "--sinks", "2", "--recent", "8", "--prompt-policy", "on_top", "--max-new-tokens", "40"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


def read_plans(path: Path) -> list[EventPlan]:
    with safe_open(path, "pt") as file:
        names, index = set(file.keys()), json.loads(file.metadata()["plans"])
        return [
            EventPlan(
                layer=layer, row=row, event=event, length=length, positions_HN=file.get_tensor(f"{i}.positions"),
                kept_HK=file.get_tensor(f"{i}.kept"),
                into_HN=file.get_tensor(f"{i}.into") if f"{i}.into" in names else None,
            )
            for i, (layer, row, event, length) in enumerate(index)
        ]  # fmt: skip


def inspection(model: Path, folder: Path) -> list[object]:
    """The command that the tests add a source to."""
    rule = ["--method", "random", "--budget", 24, *SMALL]
    return ["inspect", "--model", model, *rule, "--out", folder / "page.html"]


def test_the_command_writes_a_page_two_lines_and_what_proves_its_fates(tmp_path: Path, model: Path) -> None:
    html = tmp_path / "one.html"
    code, stdout, _ = run(
        "inspect", "--model", model, "--task", TASK, "--example", 2, "--method", "random", "--budget", 24, *SMALL,
        "--generate", "--out", html, "--save", tmp_path / "kept",
    )  # fmt: skip
    assert code == 0
    assert len(stdout.splitlines()) == 3
    assert "random at 24 slots" in stdout and html.read_text().startswith("<!doctype html>")
    (data,) = load_inspections(tmp_path / "kept").values()
    (plans,) = (tmp_path / "kept" / "inspections").glob("*.plans.safetensors")
    found = fates(read_plans(plans), len(data["pieces"]))
    assert array(data["fates"]["dropped"], "<i2").tolist() == found.dropped_GHN.flatten().tolist()


def test_the_oracle_may_be_inspected_in_a_replay(tmp_path: Path, model: Path) -> None:
    code, stdout, _ = run(
        "inspect", "--model", model, "--task", TASK, "--method", "oracle", "--budget", 24, *SMALL,
        "--out", tmp_path / "page.html",
    )  # fmt: skip
    assert code == 0 and "oracle at 24 slots" in stdout


def test_a_results_folder_gives_the_example_that_went_wrong_first(tmp_path: Path, model: Path) -> None:
    folder = tmp_path / "results"
    basis = ["--model", model, "--task", TASK, "--methods", "full,random", "--budgets", "24", "--limit", "2", *SMALL]
    for command in ("replay", "evaluate"):
        assert run(command, *basis, "--out", folder / command)[0] == 0
        code, stdout, _ = run("inspect", folder / command, "--out", tmp_path / "page.html")
        assert code == 0 and "random at 24 slots" in stdout
        (data,) = load_inspections(folder / command).values()
        lines = [json.loads(line) for line in (folder / command / "records.jsonl").read_text().splitlines()]
        bounded = [line for line in lines if line["budget"]]
        name = "first_mismatch" if command == "replay" else "first_divergence"
        assert data[name] == min(line[name] for line in bounded if line[name] is not None)


def test_a_prompt_of_ones_own_is_answered_by_full_kv_and_inspected(tmp_path: Path, model: Path) -> None:
    common = inspection(model, tmp_path)
    for extra in ([], ["--generate"]):
        place = tmp_path / f"kept{len(extra)}"
        done = run(*common, "--prompt", "n08 5 : n08 q ;", *extra, "--save", place)
        assert done.exit_code == 0 and "random at 24 slots on a prompt" in done.stdout
        assert "right" not in done.stdout and "wrong" not in done.stdout  # nobody knows
        (data,) = load_inspections(place).values()
        assert data["expected"] is None and "".join(data["pieces"]).startswith("n08 5 : n08 q ;")


def test_a_text_is_fed_as_it_stands_after_a_prompt_or_alone(tmp_path: Path, model: Path) -> None:
    text = tmp_path / "trace.txt"
    text.write_text(" ".join(f"n{i % 90:02d} q ;" for i in range(40)))
    common = inspection(model, tmp_path)
    (tmp_path / "question.txt").write_text("n08 5 : n08 q ;")
    for extra, prompt in ([], 1), (["--prompt", f"@{tmp_path / 'question.txt'}"], 6):
        place = tmp_path / f"kept{len(extra)}"
        assert run(*common, "--text", text, *extra, "--save", place).exit_code == 0
        (data,) = load_inspections(place).values()
        assert data["prompt"] == prompt and len(data["pieces"]) - (0 if not extra else prompt) == 120
        assert data["source"] == "the text of the file" and data["answer"] == {"full": None}
    assert "leave the folder" in sentence(run(*common, "--text", text, "--generate"))
    assert "cannot be read as text" in sentence(run(*common, "--text", tmp_path / "none.txt"))
    text.write_text("")
    assert "no tokens" in sentence(run(*common, "--text", text))


def test_a_trace_of_another_engine_is_taken_from_its_file(tmp_path: Path, model: Path) -> None:
    file = tmp_path / "traces.jsonl"
    lines = [{"prompt": "n08 5 : n08 q ;", "output": " n09 q ;" * n} for n in (4, 20)]
    file.write_text("\n".join(map(json.dumps, lines)))
    common = inspection(model, tmp_path)
    done = run(*common, "--traces", file, "--example", 1, "--save", tmp_path / "kept")
    assert done.exit_code == 0 and "traces.jsonl, example 1: 66 tokens" in done.stdout, done.output
    (data,) = load_inspections(tmp_path / "kept").values()
    assert data["source"] == "the output of the file" and data["answer"] == {"full": None}
    assert "no trace 2" in sentence(run(*common, "--traces", file, "--example", 2))
    assert "has its own prompts" in sentence(run(*common, "--traces", file, "--task", "recall"))


def test_a_cache_shows_what_it_did_and_goes_on(model: Path) -> None:
    loaded = tiny_loaded()
    tokenizer, own = loaded.tokenizer, loaded.model
    ids = torch.tensor(tokenizer("n08 5 : n08 q ; n09 3 ;", add_special_tokens=False)["input_ids"])
    pads = torch.zeros(4, dtype=torch.long)
    batch = torch.stack([torch.cat([pads, ids[:-4]]), ids])
    mask = torch.stack([torch.cat([pads, torch.ones(len(ids) - 4, dtype=torch.long)]), torch.ones_like(ids)])
    plans = PlanRecorder()
    with CompressedCache(
        own, "random", 16, interval=6, sinks=2, recent=4, seed=3, row_seeds=[5, 6], observer=plans
    ) as cache:
        output = own.generate(batch, attention_mask=mask, past_key_values=cache, max_new_tokens=40, min_new_tokens=40)
        for row, prompt in ((0, len(ids) - 4), (1, len(ids))):
            made = cache.inspect(output, tokenizer, row=row)
            assert made.data["prompt"] == prompt and len(made.data["pieces"]) == prompt + 40
            found = fates([plan for plan in plans.plans if plan.row == row], prompt + 40, row=row)
            shown = array(made.data["fates"]["dropped"], "<i2").reshape(found.dropped_GHN.shape)
            assert np.array_equal(shown, found.dropped_GHN.numpy())
        assert made._repr_html_().startswith("<iframe srcdoc=") and "random at 16 slots on generate" in repr(made)
        before = cache.columns_seen
        longer = torch.cat([mask, torch.ones(2, 40, dtype=torch.long)], 1)
        with torch.no_grad():
            own(output[:, -1:], past_key_values=cache, attention_mask=longer)
        assert cache.columns_seen == before + 1
        with pytest.raises(ReasonKVError, match="give what generate returned"):
            cache.inspect(output[:, :-5], tokenizer)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "rkv"], "rkv needs one budget"),
        (["--method", "full", "--budget", "64"], "takes no budget"),
        (["--method", "oracle", "--budget", "128", "--generate"], "oracle"),
        (["--budget", "9", "--recent", "16"], "cannot hold"),
        (["--budget", "128", "--task", "programme"], "There is no task"),
        (["--budget", "128", "--example", "-1"], "counted from 0"),
        (["/no/such/folder"], "There is no results folder"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(tmp_path: Path, arguments: list[str], words: str) -> None:
    assert words in sentence(run("inspect", *arguments, "--out", tmp_path / "page.html"))
