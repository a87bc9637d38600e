"""`evaluate --endpoint`: a server answers, and the folder is that of a model of this process.

The servers here are a few lines of Python; tests/vllm has a real one.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run as command
from command_line import sentence
from tiny import TASK, tiny_loaded

from reasonkv import Budget, CompressedCache, Window
from reasonkv.evaluate import endpoint as endpoint_module
from reasonkv.evaluate.endpoint import Endpoint, EndpointError
from reasonkv.evaluate.job import BudgetOptions, GenerateJob, JobError
from reasonkv.evaluate.records import AnswerRecord, read_lines
from reasonkv.evaluate.remote import held, run_remote
from reasonkv.evaluate.settings import Sampling
from reasonkv.methods import get_method
from reasonkv.schedule import row_budget
from reasonkv.tasks import TaskOptions

Reply = Callable[[str, dict[str, Any]], tuple[int, Any]]
"""From a path and a body to a status and an answer."""


@contextmanager
def server(reply: Reply, owner: str = "someone", names: tuple[str, ...] = ("model",)) -> Iterator[str]:
    """A server that answers by a function; None as an answer cuts the connection."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send(200, {"data": [{"id": name, "owned_by": owner, "max_model_len": 200} for name in names]})

        def do_POST(self) -> None:
            self.send(*reply(self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))

        def send(self, status: int, answer: Any) -> None:
            if answer is None:
                self.connection.close()
                return
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            pass

    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{made.server_port}"
    finally:
        made.shutdown()
        made.server_close()


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module, "PAUSES", (0.0, 0.0))


@pytest.fixture
def job(tmp_path: Path) -> GenerateJob:
    """Eight questions, whose answers are their numbers."""
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(json.dumps({"question": f"Say {n}.", "answer": n}) for n in range(8)))
    options = TaskOptions(prompt="{question}", answer="answer", grade="number", system="Be short.", thinking="on")
    return GenerateJob(task=[str(path)], options=options, limit=8, max_new_tokens=12)


def said(text: str, **more: Any) -> tuple[int, Any]:
    usage = {"prompt_tokens": 9, "completion_tokens": 5}
    return 200, {"choices": [{"message": {"content": text}, "finish_reason": "stop"} | more], "usage": usage}


def number_of(body: dict[str, Any]) -> int:
    return int(body["messages"][-1]["content"].removeprefix("Say ").removesuffix("."))


def test_any_server_answers_a_chat_and_is_recorded_as_full_kv(job: GenerateJob, tmp_path: Path) -> None:
    bodies: list[dict[str, Any]] = []

    def reply(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        assert path == "/v1/chat/completions"
        bodies.append(body)
        return said(f"It is {number_of(body) % 6}.")

    with server(reply) as url:
        records = run_remote(job, Endpoint.connect(url), tmp_path / "out")
    assert {record.method for record in records} == {"full"} and len(records) == 8
    assert sum(record.correct for record in records) == 6 and not records[0].truncated
    assert (records[0].prompt_tokens, records[0].output_tokens, records[0].physical_terminal) == (9, 5, 13)
    body = next(one for one in bodies if number_of(one) == 3)
    assert body == {
        "model": "model", "max_tokens": 12, "temperature": 0.0, "top_p": 1.0,  # no field that OpenAI does not know
        "messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Say 3."}],
        "chat_template_kwargs": {"enable_thinking": True},
    }  # fmt: skip


def test_thinking_that_a_server_takes_out_of_the_text_is_put_back(job: GenerateJob, tmp_path: Path) -> None:
    def reply(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        return said("", message={"content": f"So {number_of(body)}.", "reasoning_content": "Or is it 99?"})

    with server(reply) as url:
        records = run_remote(job, Endpoint.connect(url), tmp_path / "out")
    assert all(record.correct for record in records)
    assert records[0].output.startswith("<think>Or is it 99?</think>So ")


def test_a_busy_server_is_asked_again_and_one_that_dies_loses_nothing(job: GenerateJob, tmp_path: Path) -> None:
    asked: dict[int, int] = {}

    def reply(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        number = number_of(body)
        asked[number] = asked.get(number, 0) + 1
        if number == 5 and asked[5] <= 3:  # as often as it is asked
            return 200, None
        return (429, {"error": "slow down"}) if asked[number] == 1 else said(f"{number}")

    with server(reply) as url:
        found, folder = Endpoint.connect(url), tmp_path / "out"
        with pytest.raises(
            EndpointError, match=r"does not answer .*; see that the server runs, and repeat the command"
        ):
            run_remote(job, found, folder)
        before = read_lines(folder / "records.jsonl", AnswerRecord)
        done = {record.example for record in before}
        assert 5 not in done
        asked.update(dict.fromkeys(asked, 1))
        asked[5] = 3
        records = run_remote(job, found, folder)
        assert len(records) == 8 and all(record.correct for record in records)
        assert records[: len(before)] == before
        assert all(asked[number] == 1 for number in done)  # what is there is not asked for again


def test_refused_requests_are_counted_in_one_sentence_and_the_others_recorded(job: GenerateJob, tmp_path: Path) -> None:
    def reply(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        number = number_of(body)
        refusal = {"error": {"message": "prompt too long.\nSend less"}}
        return (400, refusal) if number in (2, 6) else said(f"{number}")

    with (
        server(reply) as url,
        pytest.raises(EndpointError, match=r"refused 2 of 8 .*400 \(prompt too long. Send less\)"),
    ):
        run_remote(job, Endpoint.connect(url), tmp_path / "out")
    assert {record.example for record in read_lines(tmp_path / "out" / "records.jsonl", AnswerRecord)} == {
        0,
        1,
        3,
        4,
        5,
        7,
    }


def test_all_requests_are_with_the_server_at_once(job: GenerateJob, tmp_path: Path) -> None:
    together = threading.Barrier(8, timeout=20)

    def reply(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        together.wait()
        return said(f"{number_of(body)}")

    with server(reply) as url:
        assert len(run_remote(job, Endpoint.connect(url), tmp_path / "out")) == 8


OURS = {"method": "random", "budget": Budget(24, interval=8, sinks=2, recent=8, prompt="count").to_dict(), "seed": 3}


def our_reply(path: str, body: dict[str, Any]) -> tuple[int, Any]:
    """As vLLM under `reasonkv serve`: one word is one token, and compressed requests answer 7."""
    if path == "/tokenize":
        words = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
        return 200, {"count": len(words.split()), "tokens": list(range(len(words.split())))}
    if path == "/detokenize":
        ends = "so 4 </think> is 4" if body["tokens"][2:3] == [2] else "<think> 7"
        return 200, {"prompt": ends if len(body["tokens"]) == 30 else "Say 4."}
    wish = json.loads(body.get("vllm_xargs", {}).get("reasonkv", "{}"))
    tokens = list(range(30)) if wish.get("enabled") is False else [0, 1, *range(50, 78)]
    choice = {"text": "so 4 </think> is 4" if wish.get("enabled") is False else "7", "finish_reason": "length"}
    return 200, {
        "choices": [choice | {"token_ids": tokens}],
        "usage": {"prompt_tokens": 2, "completion_tokens": 30},
        "kv_transfer_params": {"reasonkv": OURS | {"tokens": 31, "slots": 31, "slot_bytes": 100}},
    }


def test_our_server_answers_twice_and_says_what_it_runs(job: GenerateJob, tmp_path: Path) -> None:
    bodies: list[dict[str, Any]] = []

    def reply(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        bodies.append(body)
        return our_reply(path, body)

    with server(reply, owner="vllm") as url:
        records = run_remote(job, Endpoint.connect(url), tmp_path / "out")
    full, random = ({one.example: one for one in records if one.method == name} for name in ("full", "random"))
    assert len(full) == len(random) == 8 and full[4].correct and full[4].thinking_tokens == 3
    assert (full[4].physical_terminal, full[4].bytes_full, full[4].events) == (31, 3100, 0)
    assert random[4].thinking_tokens == 30  # it never ends
    assert random[4].first_divergence == 2 and random[4].budget == OURS["budget"]
    assert random[4].events == 0 and random[4].physical_peak == 31  # 32 slots would be compacted
    wishes = [one["vllm_xargs"]["reasonkv"] for one in bodies if "vllm_xargs" in one]
    assert {json.dumps({"enabled": False}), json.dumps({"seed": 5})} < set(wishes)
    sent = [one for one in bodies if "return_token_ids" in one]
    assert all(one["prompt"] == [0, 1] and one["repetition_penalty"] == 1.0 and one["top_k"] == 0 for one in sent)


def test_a_job_for_another_method_or_budget_than_the_servers_is_refused(job: GenerateJob) -> None:
    with server(our_reply, owner="vllm") as url:
        found = Endpoint.connect(url)
    same = GenerateJob(task=job.task, methods=["random", "full"], budget=found.served.options(), options=job.options)
    assert found.fitted(same).methods == found.fitted(job).methods == ("full", "random")
    runs = r"runs random @ .*, and full KV; leave --methods and --budgets out"
    for methods, budget in ((["snapkv"], BudgetOptions(tokens=[24])), (["random"], BudgetOptions(tokens=[25]))):
        with pytest.raises(JobError, match=runs):
            found.fitted(GenerateJob(task=job.task, methods=methods, budget=budget, options=job.options))
    with pytest.raises(JobError, match="decides the shares of its layers; leave --layer-shares out"):
        found.fitted(GenerateJob(task=job.task, budget=BudgetOptions(layer_shares="1/2"), options=job.options))
    with pytest.raises(JobError, match="no --think-budget"):
        found.fitted(GenerateJob(task=job.task, sampling=Sampling(think_budget=5), options=job.options))


@pytest.mark.parametrize(
    "budget",
    [
        Budget(24, interval=8, sinks=2, recent=8, prompt="count"),
        Budget(24, interval=8, sinks=2, recent=8),
        Budget(keep=0.5, interval=8, sinks=2, recent=8),
        Budget(24, interval=8, sinks=2, recent=8, layer_shares="0.3/1.7"),
        Budget(24, interval=8, sinks=2, recent=8, layer_shares="0.3/1.7", stagger=4),
        Window(size=24, buffer=8, retention=0.25),
    ],
    ids=str,
)
def test_what_a_request_held_is_computed_as_a_cache_measures_it(budget: Budget) -> None:
    model = tiny_loaded().model
    ids = torch.arange(40)[None] % 50 + 5
    with CompressedCache(model, "random", row_budget(budget, 40, 3)) as cache:  # a server's requests take turns
        model.generate(ids, past_key_values=cache, max_new_tokens=61, min_new_tokens=61, do_sample=False)
        found = cache.stats().rows[0]
    computed = held(get_method("random"), budget, 40, 100, 1, seed=3)
    for name in ("physical_mean", "physical_peak", "physical_terminal", "events", "tokens_dropped"):
        assert computed[name] == pytest.approx(getattr(found, name)), name


def test_mistakes_on_the_command_line_are_one_sentence(job: GenerateJob, tmp_path: Path) -> None:
    def evaluate(url: str, *more: str) -> str:
        arguments = ["--task", TASK, "--out", str(tmp_path / "out"), "--endpoint", url, *more]
        return sentence(command("evaluate", *arguments), code=1)

    assert "does not answer" in evaluate("127.0.0.1:9")
    with server(lambda path, body: (401, {"error": {"message": "no key"}}), names=("a", "b")) as url:
        assert "has no model testbed; give --model one of a, b" in evaluate(url)
        assert "wants a key (no key); set OPENAI_API_KEY" in evaluate(url, "--model", "a", "--limit", "1")
    with server(lambda path, body: (200, {"hello": 1}), names=("a",)) as url:
        assert "no text" in evaluate(url, "--limit", "1")


def test_the_command_prints_the_table_of_both_methods(job: GenerateJob, tmp_path: Path) -> None:
    with server(our_reply, owner="vllm") as url:
        found = command(
            "evaluate", "--task", job.task[0], "--prompt", "{question}", "--answer", "answer", "--grade", "number",
            "--limit", 8, "--endpoint", url, "--out", tmp_path / "out",
        )  # fmt: skip
    assert found.exit_code == 0, found.output
    assert "random" in found.stdout and f"model at {url}/v1: full, random" in found.stderr
