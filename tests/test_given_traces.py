"""What `replay --traces FILE` promises: every known shape is read, and what is replayed is what the engine wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import run as command
from command_line import sentence
from safetensors.torch import load_file
from tiny import TASK, save_tiny, tiny_loaded
from transformers import PreTrainedTokenizerFast

from reasonkv.evaluate.generate import encode_given
from reasonkv.evaluate.job import BudgetOptions, JobError, ReplayJob, TraceSettings
from reasonkv.evaluate.manifest import ResultsError
from reasonkv.evaluate.run import run
from reasonkv.evaluate.table import to_frame
from reasonkv.report.terminal import replay_caption
from reasonkv.tasks import TaskError, TaskOptions, get_task
from reasonkv.tasks.given import GivenTrace, given_traces

CHAT = [{"role": "user", "content": "What is 2 + 3?"}]
CHOICE = {"message": {"role": "assistant", "content": "5", "reasoning_content": "2 + 3"}, "finish_reason": "stop"}
SHAPES: dict[str, tuple[dict[str, Any], list[GivenTrace]]] = {
    "text": ({"prompt": "a", "output": "b"}, [GivenTrace("a", "b")]),
    "token ids": ({"prompt_token_ids": [5, 6], "output_token_ids": [7]}, [GivenTrace([5, 6], [7])]),
    "CASK's merged.jsonl": (
        {"id": "x", "question": "q", "prompt": "a", "answer": "5", "index": 0, "output": "b", "prefill_tokens": 3,
         "output_tokens": 4, "total_tokens": 7, "sample_idx": 0, "draw_idx": 0},
        [GivenTrace("a", "b")],
    ),
    "vLLM's RequestOutput": (
        {"request_id": "0", "prompt": "a", "prompt_token_ids": [5], "finished": True,
         "outputs": [{"index": 0, "text": "b", "token_ids": [7, 8]}, {"index": 1, "text": "c", "token_ids": [9]}]},
        [GivenTrace([5], [7, 8]), GivenTrace([5], [9])],
    ),
    "chat completion": (
        {"request": {"model": "m", "messages": CHAT}, "response": {"id": "1", "choices": [CHOICE]}},
        [GivenTrace(CHAT, "5", "2 + 3")],
    ),
    "completion": (
        {"prompt": ["a"], "choices": [{"index": 0, "text": "b"}, {"index": 1, "text": "c"}]},
        [GivenTrace("a", "b"), GivenTrace("a", "c")],
    ),
    "batch API": (
        {"custom_id": "1", "body": {"messages": CHAT}, "response": {"status_code": 200, "body": {"choices": [CHOICE]}}},
        [GivenTrace(CHAT, "5", "2 + 3")],
    ),
    "completion with token ids": (
        {"messages": CHAT, "prompt_token_ids": [5], "choices": [{**CHOICE, "token_ids": [7]}]},
        [GivenTrace([5], [7], "2 + 3")],
    ),
    "conversation": ({"messages": [*CHAT, {"role": "assistant", "content": "5"}]}, [GivenTrace(CHAT, "5")]),
    "lm-eval sample": (
        {"doc_id": 0, "doc": {"question": "q"}, "target": "5", "filter": "strict-match", "resps": [["b", "c"]],
         "arguments": {"gen_args_0": {"arg_0": "a", "arg_1": {"until": ["\n"]}}}, "filtered_resps": ["b"]},
        [GivenTrace("a", "b"), GivenTrace("a", "c")],
    ),
    "older lm-eval sample": ({"arguments": [["a", {"until": []}]], "resps": [["b"]]}, [GivenTrace("a", "b")]),
}  # fmt: skip


def save(path: Path, *rows: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(row + "\n" if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_is_known_by_its_keys(name: str, tmp_path: Path) -> None:
    row, expected = SHAPES[name]
    path = save(tmp_path / "traces.jsonl", row, row)
    assert list(given_traces(str(path), TaskOptions()).traces) == expected * 2


def test_folders_and_the_filters_of_lm_eval_give_every_trace_once(tmp_path: Path) -> None:
    row, _ = SHAPES["lm-eval sample"]
    save(tmp_path / "samples_a.jsonl", row, row | {"filter": "flexible-extract"})
    save(tmp_path / "samples_b.jsonl", row)
    assert len(given_traces(str(tmp_path), TaskOptions()).traces) == 2 + 2
    save(tmp_path / "merged" / "merged.jsonl", SHAPES["text"][0])
    assert given_traces(str(tmp_path), TaskOptions()).traces == (GivenTrace("a", "b"),)


def test_lines_that_are_no_traces_are_named_and_the_others_read(tmp_path: Path) -> None:
    rows = ({"prompt": "a", "output": "b"}, "{", {"question": "q"}, {"prompt": "a", "output": ""}, {"resps": 3})
    found = given_traces(str(save(tmp_path / "t.jsonl", *rows)), TaskOptions())
    assert found.traces == (GivenTrace("a", "b"),)
    words = ("line 2 is no JSON", "no trace; its keys are question", "empty prompt or output", "keys are resps")
    assert all(any(one in text for text in found.skipped) for one in words)
    assert len(found.skipped) == 4
    for path in (tmp_path / "none.jsonl", save(tmp_path / "empty.jsonl"), tmp_path / "folder"):
        with pytest.raises(TaskError, match=r"There is no file|holds no traces") as caught:
            given_traces(str(path), TaskOptions())
        assert "\n" not in str(caught.value)


def test_text_is_tokenized_as_one_and_reasoning_stands_where_the_model_wrote_it(
    word_tokenizer: PreTrainedTokenizerFast,
) -> None:
    def ids(trace: GivenTrace) -> tuple[list[int], list[int]]:
        prompt_P, output_T = encode_given(word_tokenizer, trace, TaskOptions())
        return prompt_P.tolist(), output_T.tolist()

    assert ids(GivenTrace("w5 w6", " w7 w8")) == ([5, 6], [7, 8])
    assert ids(GivenTrace("w5 w6", "w7 w8")) == ([5, 6], [7, 8])  # as one it would be a word w6w7
    assert ids(GivenTrace([5, 6], [7])) == ([5, 6], [7])
    word_tokenizer.chat_template = "{% for one in messages %}w9 {{ one.content }}{% endfor %} w3"
    assert ids(GivenTrace([{"role": "user", "content": "w4"}], " w8")) == ([9, 4, 3], [8])
    closed = GivenTrace(CHAT, "5", "2 + 3")
    assert closed.output_text("<|assistant|>", "</think>") == "<think>\n2 + 3\n</think>\n\n5"
    assert closed.output_text("<|assistant|><think>\n", "</think>") == "2 + 3\n</think>\n\n5"


BUDGET = BudgetOptions(tokens=(24,), interval=12, sinks=2, recent=8)


def test_replaying_token_ids_of_full_kv_s_own_traces_gives_the_records_of_the_replay_that_made_them(
    tmp_path: Path,
) -> None:
    loaded = tiny_loaded()
    shared: dict[str, Any] = {"methods": "full,keydiff", "budget": BUDGET, "limit": 3, "batch_size": 2}
    own = run(ReplayJob(task=TASK, traces=TraceSettings(max_new_tokens=40), **shared), loaded, tmp_path / "own")
    found = load_file(next((tmp_path / "own").glob("traces-*.safetensors")))
    rows = [{"prompt_token_ids": found[f"{i}.prompt"].tolist(), "token_ids": found[f"{i}.output"].tolist()}
            for i in range(3)]  # fmt: skip
    path = save(tmp_path / "elsewhere.jsonl", *rows)
    job = ReplayJob(traces=TraceSettings(source=str(path)), **shared)
    given = run(job, loaded, tmp_path / "given")
    names = ("method", "example", "prompt_tokens", "output_tokens", "top1", "nll", "kl", "events", "physical_mean")
    pick = lambda records: [[getattr(one, name) for name in names] for one in records]  # noqa: E731
    assert pick(given) == pick(own)
    assert {(one.task, one.trace_correct) for one in given} == {(f"traces:{path}", None)}
    assert "not graded" in replay_caption(to_frame(given))
    before = (tmp_path / "given" / "records.jsonl").read_bytes()
    run(job, loaded, tmp_path / "given")
    assert (tmp_path / "given" / "records.jsonl").read_bytes() == before
    save(path, *rows, rows[0])
    with pytest.raises(ResultsError, match="another command"):
        run(job, loaded, tmp_path / "given")


def test_the_command_line_replays_a_file_without_a_task_and_without_generating(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "tiny")
    problem = get_task(TASK).problem(0)
    path = save(tmp_path / "t.jsonl", {"prompt": problem.prompt, "output": " " + problem.trace}, {"x": 1})
    arguments = ["--model", model, "--methods", "full,keydiff", "--budgets", "24", "--recent", "8", "--json"]
    code, out, err = command("replay", "--traces", path, "--out", tmp_path / "out", *arguments)
    assert code == 0, err
    assert "skipped, object 2 is no trace" in err
    rows = json.loads(out)["rows"]
    assert [row["method"] for row in rows] == ["full", "keydiff"]
    assert rows[0]["nll"]["mean"] > 1  # the text is not what this model would write
    wrong = command("replay", "--traces", path, "--task", TASK, "--out", tmp_path / "no", *arguments)
    assert "bring their own prompts" in sentence(wrong)
    assert "needs a task" in sentence(command("replay", "--out", tmp_path / "no", *arguments))
    with pytest.raises(JobError, match="or a file such as"):
        ReplayJob(task=TASK, traces=TraceSettings(source="elsewhere"))
