"""Tokens per second of `replay` and `evaluate` beside what the model does without them, and the start of the command.

Replay is compared with the model's plain prompt rate: the same traces in one forward a batch through the stock cache,
with the logits of every output token, which replay scores. `evaluate` is compared with `model.generate`. The command's
start is the CPU seconds of a process, its imports included.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from decoding import Floor, Subject, load, text_ids
from timing import Found, Measures, Row, by_turns, interval, median, ratio, script
from transformers import DynamicCache

from reasonkv import Budget, CompressedCache, get_method
from reasonkv.evaluate.cells import RunConfig
from reasonkv.evaluate.chunks import feed
from reasonkv.evaluate.decoding import Request, decode_batch
from reasonkv.evaluate.replay import replay_batch
from reasonkv.evaluate.traces import Trace, reference_logprobs
from reasonkv.tasks import get_task

PROMPT_RATE, GENERATE = "the plain prompt rate", "model.generate"
COMMANDS = (("--help",), ("methods",))


def traces_of(subject: Subject, lines: int, limit: int, tokens: int | None = None) -> list[Trace]:
    """Return generated problems with their reference traces, and full KV's log-probabilities of them."""
    assert subject.tokenizer is not None
    problems = [get_task(f"program:lines={lines}").problem(example) for example in range(limit)]
    prompts, outputs = (
        [torch.tensor(subject.tokenizer(text, add_special_tokens=False).input_ids[:most]) for text in texts]
        for texts, most in (([one.prompt for one in problems], None), ([one.trace for one in problems], tokens))
    )
    teachers = reference_logprobs(subject.model, prompts, outputs)
    return [Trace(*one, correct=True) for one in zip(range(limit), prompts, outputs, teachers, strict=True)]


def timed(work: Callable[[], int]) -> dict[str, float]:
    """Measure the tokens per second of work that returns how many there were."""
    start = time.perf_counter()
    return {"rate": work() / (time.perf_counter() - start)}


def replay(subject: Subject, traces: Sequence[Trace], config: RunConfig | None) -> int:
    """Replay traces, or only feed them through the stock cache, with every logit that replay would score."""
    if config is None:
        for _ in feed(subject.model, DynamicCache(config=subject.model.config), [trace.row for trace in traces]):
            pass
    else:
        replay_batch(subject.model, traces, config)
    return sum(trace.row.fed for trace in traces)


def generate(subject: Subject, method: str | None, budget: Budget | None, batch: int, prompt: int, tokens: int) -> int:
    """Generate as `evaluate` does, or as transformers does; return the tokens."""
    assert subject.tokenizer is not None
    ids = text_ids(subject.tokenizer, prompt)
    if method is None:
        subject.model.generate(ids.expand(batch, -1), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        return batch * tokens
    requests = [Request(ids[0], tokens, row) for row in range(batch)]
    with CompressedCache(subject.model, method, budget, prompt_lengths=[prompt] * batch) as cache:
        return sum(len(one.tokens) for one in decode_batch(subject.model, cache, requests))


def cpu_seconds(words: Sequence[str]) -> dict[str, float]:
    """Measure the CPU seconds of a `reasonkv` command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "reasonkv", *words], capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}


def beside(what: str, base: str, floor: Callable[[str], float], found: Mapping[str, Measures]) -> list[Row]:
    """Return a row an arm: tokens per second, its ratio to the base's, and the floor's rate over its own."""
    return [
        {"what": what, "cache": arm, "tokens/s": median(own["rate"]), "beside": base,
         **interval(ratio(own["rate"], found[base]["rate"]), "of it"),
         "time over the floor's": floor(arm) / median(own["rate"])}
        for arm, own in found.items()
    ]  # fmt: skip


@script
def main(given: argparse.Namespace) -> Found:
    torch.manual_seed(0)
    if (subject := load(given.model)) is None:
        return
    budget, batch = Budget(given.budget, interval=given.interval), given.batch
    traces = traces_of(subject, given.lines, given.limit, given.trace)
    floor, fed = Floor(subject), sum(trace.row.fed for trace in traces)
    configs = {PROMPT_RATE: None, **{one: RunConfig(get_method(one), budget) for one in given.methods}}
    replays = {arm: partial(timed, partial(replay, subject, traces, one)) for arm, one in configs.items()}
    answers = {
        method or GENERATE: partial(timed, partial(generate, subject, method, own, batch, given.prompt, given.tokens))
        for method, own in ((None, None), ("full", None), *((method, budget) for method in given.methods))
    }

    def replay_floor(arm: str) -> float:
        return fed / floor.prompt_seconds(given.limit, fed // given.limit)

    def generation_floor(arm: str) -> float:
        half = given.tokens / 2
        slots = given.prompt + (min(half, given.budget + given.interval / 2) if arm in given.methods else half)
        decoded = given.tokens * floor.step_ms(batch, slots) / 1e3
        return batch * given.tokens / (floor.prompt_seconds(batch, given.prompt) + decoded)

    turns = {"rounds": given.rounds, "seconds": given.seconds}
    rows = beside("replay", PROMPT_RATE, replay_floor, by_turns(replays, **turns))
    rows += beside("evaluate", GENERATE, generation_floor, by_turns(answers, **turns))
    starts = by_turns({f"reasonkv {one[0]}": partial(cpu_seconds, one) for one in COMMANDS}, 3, warm_up=1)
    title = (
        f"{subject.name} {subject.dtype}: replay of {given.limit} traces of {traces[0].row.fed} tokens, generation of "
        f"{batch} x {given.tokens}, budget {given.budget} beside the prompt"
    )
    yield {"title": title, "rows": rows,
           "start": [{"command": name, "CPU s": median(own["cpu"])} for name, own in starts.items()]}  # fmt: skip
