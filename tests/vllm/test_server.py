"""A real server, started by `reasonkv serve` and spoken to by the official client."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from engines import full_kv, prompts

from reasonkv.evaluate.endpoint import Endpoint
from reasonkv.evaluate.job import BudgetOptions, GenerateJob
from reasonkv.evaluate.records import AnswerRecord, FullOutput, read_lines
from reasonkv.evaluate.remote import run_remote
from reasonkv.evaluate.run import run
from reasonkv.models import load_model

GIVEN = ["--budget", "64", "--interval", "32", "--sinks", "4", "--recent", "16", "--prompt-policy", "count",
         "--seed", "7", "--log-requests"]  # fmt: skip
CHAT = "{% for message in messages %}{{ message.content }} {% endfor %}<think>"


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("log") / "server.log"


@contextmanager
def serving(method: str, log: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        str(Path(sys.executable).with_name("reasonkv")), "serve", "testbed", "--method", method, *GIVEN,
        "--max-model-len", "1024", "--max-num-seqs", "8", "--dtype", "float32", "--enforce-eager",
        "--chat-template", CHAT, "--port", str(port), "--host", "127.0.0.1",
    ]  # fmt: skip
    # as users have it: the engine is a process of its own
    env = os.environ | {"VLLM_LOGGING_LEVEL": "INFO", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    env.pop("PROMETHEUS_MULTIPROC_DIR", None)
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env)
        try:
            deadline = time.monotonic() + 400
            while True:
                try:
                    urllib.request.urlopen(f"{url}/health", timeout=2)
                    break
                except OSError:
                    assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
                    time.sleep(0.5)
            assert "reasonkv on vLLM 0.32" in log.read_text()  # one line says what is active
            yield url
        finally:
            process.terminate()
            process.wait(120)


@pytest.fixture(scope="module")
def server(log: Path) -> Iterator[str]:
    with serving("random", log) as url:
        yield url


@pytest.fixture
def client(server: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)


def counted(server: str, name: str) -> float:
    text = urllib.request.urlopen(f"{server}/metrics", timeout=10).read().decode()
    found = re.search(rf"^{re.escape(name)}(?:{{.*}})? (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def ask(client: openai.OpenAI, **options: Any) -> Any:
    fixed = {"model": "testbed", "prompt": prompts((60,))[0], "temperature": 0, "max_tokens": 120}
    extra = {"ignore_eos": True} | options.pop("extra_body", {})
    return client.completions.create(**(fixed | options), extra_body=extra)


def test_completions_and_chats_stream_and_their_events_are_counted(server: str, client: openai.OpenAI) -> None:
    before = counted(server, "reasonkv:events_total")
    whole = ask(client)
    assert whole.usage.completion_tokens == 120
    parts = [chunk.choices[0].text for chunk in ask(client, stream=True) if chunk.choices]
    assert len(parts) > 2 and "".join(parts) == whole.choices[0].text
    # 60 + 119 fed tokens: 96 are held after 36, then every 32 again
    assert counted(server, "reasonkv:events_total") - before == 2 * 3
    assert counted(server, "reasonkv:slots_dropped_total") >= 2 * 3 * 32
    assert 64 <= counted(server, "reasonkv:peak_slots") <= 96
    gauges = ("reasonkv:logical_tokens", "reasonkv:physical_tokens")
    for _ in range(100):  # of the newest step; an idle engine writes zeros
        if not any(counted(server, name) for name in gauges):
            break
        time.sleep(0.1)
    assert [counted(server, name) for name in gauges] == [0, 0]
    assert counted(server, "vllm:generation_tokens_total") >= 240
    chat = list(client.chat.completions.create(
        model="testbed", messages=[{"role": "user", "content": "<program> a = 1 ;"}], max_tokens=20, temperature=0,
        stream=True, stream_options={"include_usage": True}, extra_body={"ignore_eos": True},
    ))  # fmt: skip
    assert chat[-1].usage.completion_tokens == 20 and len(chat) > 2  # a slow reader gets several tokens at once


def test_a_request_that_opts_out_is_answered_with_full_kv(server: str, client: openai.OpenAI) -> None:
    from reasonkv.testbed import load_testbed

    before, ids = counted(server, "reasonkv:events_total"), prompts((60, 60, 90))[2]
    opted_out = {"vllm_xargs": {"reasonkv": '{"enabled": false}'}}
    text = ask(client, prompt=ids, extra_body=opted_out).choices[0].text
    expected = load_testbed()[1].decode(full_kv([ids], 120)[0], skip_special_tokens=True)
    assert text.split() == expected.split()
    assert counted(server, "reasonkv:events_total") == before
    assert ask(client, prompt=ids).choices[0].text != text


def test_a_wrong_request_is_answered_400_with_a_sentence_and_the_server_lives_on(client: openai.OpenAI) -> None:
    for given, sentence in (
        ('{"tokens": 5}', "cannot be set by a request"),
        ('{"seed": "x"}', "whole number"),
        ('{"options": {"redarw": false}}', "did you mean 'redraw'"),
        ('{"options": {"redraw": "no"}}', "redraw must be true or false"),
    ):
        with pytest.raises(openai.BadRequestError, match=sentence) as error:
            client.completions.create(
                model="testbed", prompt=[5, 6], max_tokens=4, extra_body={"vllm_xargs": {"reasonkv": given}}
            )
        assert error.value.status_code == 400
    seeded = client.completions.create(
        model="testbed",
        prompt=[5, 6],
        max_tokens=4,
        extra_body={"vllm_xargs": {"reasonkv": '{"seed": 4, "options": {"redraw": false}}'}},
    )
    assert seeded.usage.completion_tokens <= 4


def test_the_log_says_what_a_request_held(client: openai.OpenAI, log: Path) -> None:
    request = ask(client).id
    ask(client, max_tokens=1)  # the worker hears of a request's end with the next step
    said = f"Request {request}.* ended: 179 tokens, 60 of them its prompt's; 3 compactions; 83 slots held, 96 at most"
    assert re.search(said, log.read_text())


SAME = ("output_tokens", "truncated", "first_divergence", "correct", "score", "extracted", "thinking_tokens",
        "physical_mean", "physical_peak", "physical_terminal", "events", "tokens_dropped", "options", "budget")  # fmt: skip


def check_same_answers(url: str, method: str, folder: Path) -> None:
    """An evaluation by a server equals one in this process, record by record."""
    budget = BudgetOptions(tokens=[64], interval=32, sinks=4, recent=16, prompt="count")
    job = GenerateJob(
        task=["program", "recall"], methods=["full", method], budget=budget, limit=6, seed=7, max_new_tokens=250
    )
    theirs = run_remote(job, Endpoint.connect(url), folder / "server")
    mine = run(job, load_model("testbed", "float32", "cpu"), folder / "process")
    assert len(theirs) == len(mine) == 24 and isinstance(mine[0], AnswerRecord)
    for task in job.task:
        theirs_full, mine_full = (
            {one.key: one.tokens for one in read_lines(folder / where / f"outputs-{task}.jsonl", FullOutput)}
            for where in ("server", "process")
        )
        assert theirs_full == mine_full
    by_key = {one.key: one for one in theirs}
    for one in mine:
        assert isinstance(one, AnswerRecord)
        other = by_key[one.key]
        assert other.output.split() == one.output.split()
        assert {name: getattr(other, name) for name in SAME} == {name: getattr(one, name) for name in SAME}
    assert any(one.events for one in theirs) and any(one.first_divergence is not None for one in theirs)


def test_an_evaluation_by_the_server_is_that_of_the_transformers_runtime(server: str, tmp_path: Path) -> None:
    check_same_answers(server, "random", tmp_path)


def test_so_it_is_with_streaming(tmp_path: Path) -> None:
    with serving("streaming", tmp_path / "server.log") as url:
        check_same_answers(url, "streaming", tmp_path)


def test_a_response_says_what_its_request_held(client: openai.OpenAI) -> None:
    held = ask(client).model_dump()["kv_transfer_params"]["reasonkv"]
    assert (held["tokens"], held["slots"], held["method"], held["seed"]) == (179, 83, "random", 7)
    full = ask(client, extra_body={"vllm_xargs": {"reasonkv": '{"enabled": false}'}}).model_dump()
    assert full["kv_transfer_params"]["reasonkv"]["slots"] == 179
