"""Output tokens per second through vLLM on CPU, stock against compressed, on the same blocks.

    python benchmarks/serving.py --parts benchmarks/results/serving_parts.jsonl    # measures what is not there yet
    python benchmarks/serving.py --small                                           # shows that it works

The cache is given as many blocks as full KV needs for 8 sequences of 2,000 output tokens. 64 requests ask for 2,000
tokens each: full KV starts more of them while they are short and preempts as they grow, a compressed cache runs as many
as its blocks allow throughout. A round has an engine for every arm in one process, and whichever has said least so far
takes the next steps: all begin and end together, so a machine that is slower for a while is so for all. Rounds compare
stock with the arms at 256, and one more with all others. Then, on engines of the same kind, the time of a step by how
many requests run and how much each holds, and the time to the first and second token of a lone request.

The model is the bundled one, or with `--kv-heavy` one of random weights whose steps consist of reading keys and values,
as those of large models with long texts do. It runs compiled, as vLLM runs it unless told otherwise, or with `--eager`
operation by operation.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from timing import environment, publish, random_model, ratio, script

BLOCK, PROMPT, LONG_PROMPT = 128, 40, 1000
METHODS = ("random", "vase-dkv", "kara", "cask:mass=none")
WINDOW = {"size": 128, "buffer": 32, "retention": 0.3}
SCHEDULES = {"threshold": WINDOW, "period": WINDOW | {"period": 129, "most": 8}}
"""Kara's windows, cut in a request as each is full, or in the 8 fullest requests at once (KvLLM's policy)."""
ARMS = [
    "stock",
    *(f"{method}@{tokens}" for tokens in (256, 512) for method in METHODS),
    *(f"kara@{schedule}" for schedule in SCHEDULES),
]
REPEATED = tuple(f"{method}@256" for method in METHODS)
"""Arms of the rounds; others have one of their own."""
TURN = 100
"""Steps that an engine takes at a time."""
BATCHES = (1, 2, 4, 8, 16, 32, 42)
HELD = {"stock": (LONG_PROMPT, 220), "random@256": (LONG_PROMPT,)}
"""Prompts before the steps that are timed by batch: half of a full text, and one after which 320 slots are held."""
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
}  # fmt: skip
WORKER = "reasonkv.runtimes.vllm.worker.Worker"
SCHEDULER = "reasonkv.runtimes.vllm.scheduler.Scheduler"


def configuration(arm: str, policy: str = "on_top") -> dict[str, Any] | None:
    """What `--additional-config` gets under "reasonkv"; None for stock vLLM. `policy` is the prompt's."""
    if arm == "stock":
        return None
    from reasonkv.testbed import testbed_path

    method, _, tokens = arm.rpartition("@")
    if tokens in SCHEDULES:
        return {"method": method, "window": SCHEDULES[tokens]}
    given: dict[str, Any] = {"method": method, "tokens": int(tokens), "interval": 128, "prompt": policy}
    if method.startswith("cask"):
        given["calibration"] = str(testbed_path() / "reasonkv_calibration.safetensors")
    return given


def make_kv_heavy(folder: str) -> None:
    """2 layers of 8 KV heads and 16 query heads of 128, narrow otherwise, with the bundled model's tokenizer."""
    from reasonkv.testbed import testbed_path

    torch.manual_seed(0)
    model = random_model(
        2, 16, 8, vocab_size=186, hidden_size=256, intermediate_size=512, max_position_embeddings=4096,
        tie_word_embeddings=True, eos_token_id=2,
    )  # fmt: skip
    model.save_pretrained(folder)
    for file in testbed_path().glob("tokenizer*"):
        shutil.copy(file, folder)


@contextlib.contextmanager
def engine_of(run: argparse.Namespace, arm: str, blocks: int, longest: int, requests: int) -> Iterator[Any]:
    """vLLM in this process, with so many blocks."""
    from vllm import LLM

    from reasonkv.testbed import testbed_path

    given, model = configuration(arm, getattr(run, "policy", "on_top")), run.model or str(testbed_path())
    options = {} if given is None else {"worker_cls": WORKER, "additional_config": {"reasonkv": given}}
    if given is not None and "window" in given:
        options["scheduler_cls"] = SCHEDULER
    llm = LLM(
        model, max_model_len=-(-longest // BLOCK) * BLOCK, max_num_seqs=requests, dtype="float32",
        enforce_eager=run.eager, block_size=BLOCK, num_gpu_blocks_override=blocks + 1,
        enable_prefix_caching=False, disable_log_stats=True, **options,
    )  # fmt: skip
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def prompts(llm: Any, count: int, length: int) -> list[list[int]]:
    """Token ids of problems and their reference traces, all of one length."""
    from reasonkv.tasks import get_task

    tokenizer, task, found = llm.get_tokenizer(), get_task("program"), []
    for number in range(count):
        problem = task.problem(number)
        ids = tokenizer(f"{problem.prompt} {problem.trace}", add_special_tokens=False)["input_ids"]
        found.append((ids * -(-length // len(ids)))[:length])
    return found


class Serving:
    """An engine that serves all prompts at once.

    Args:
        llm: the engine.
        ids: the prompts.
        tokens: output tokens of every request.
        whole: a request's tokens are reported when it ends, as `LLM.generate` has it; otherwise at every step.
    """

    def __init__(self, llm: Any, ids: list[list[int]], tokens: int, *, whole: bool = False) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self.engine, self.core = llm.llm_engine, llm.llm_engine.engine_core.engine_core
        self.steps: list[tuple[int, int, float]] = []
        """Running and waiting requests after every step, and its seconds."""
        self.first: list[float] = []
        """Seconds until each request's first token, where it is reported."""
        self.said = 0
        """Tokens so far, but for those that a request ended with."""
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        sampling.output_kind = RequestOutputKind.FINAL_ONLY if whole else RequestOutputKind.CUMULATIVE
        for number, prompt in enumerate(ids):
            self.engine.add_request(str(number), {"prompt_token_ids": prompt}, sampling)

    @property
    def is_done(self) -> bool:
        """All requests have ended."""
        return not self.engine.has_unfinished_requests()

    @property
    def seconds(self) -> float:
        """Of all steps so far."""
        return sum(taken for *_, taken in self.steps)

    def step(self) -> list[Any]:
        """One step of the engine; what it reports."""
        before = time.perf_counter()
        outputs: list[Any] = self.engine.step()
        taken = time.perf_counter() - before
        self.steps.append((len(self.core.scheduler.running), len(self.core.scheduler.waiting), taken))
        self.said += self.steps[-1][0]
        self.first += [self.seconds for output in outputs if len(output.outputs[0].token_ids) == 1]
        return outputs


def serve(llm: Any, ids: list[list[int]], tokens: int) -> Serving:
    """Serve all prompts to the end."""
    serving = Serving(llm, ids, tokens)
    while not serving.is_done:
        serving.step()
    return serving


def serve_by_turns(servings: Sequence[Serving], turn: int = TURN) -> None:
    """Serve all to the end; whichever has said least so far takes the next steps."""
    while going := [one for one in servings if not one.is_done]:
        behind = min(going, key=lambda one: one.said)
        for _ in range(turn):
            if not behind.is_done:
                behind.step()


def throughput(run: argparse.Namespace, arms: list[str], number: int) -> list[dict[str, Any]]:
    """All requests on the blocks of a few full ones, in an engine of each arm, by turns; `number` is the round's."""
    requests, tokens = run.requests, run.tokens
    blocks = run.at_once * -(-(PROMPT + tokens) // BLOCK)
    meters, servings = {}, {}
    with contextlib.ExitStack() as stack:
        for arm in arms:
            llm = stack.enter_context(engine_of(run, arm, blocks, PROMPT + tokens, requests))
            serve(llm, prompts(llm, 4, PROMPT), 8)  # warms up
            worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
            runtime = getattr(worker, "runtime", None)
            if runtime is not None:
                runtime.meter.seconds = runtime.meter.step_seconds = 0.0
                meters[arm] = runtime.meter
            servings[arm] = Serving(llm, prompts(llm, requests, PROMPT), tokens, whole=True)
        serve_by_turns(list(servings.values()))
    return [summary(arm, one, requests * tokens, blocks, meters.get(arm)) for arm, one in servings.items()]


def summary(arm: str, serving: Serving, tokens: int, blocks: int, meter: Any) -> dict[str, Any]:
    """What a table says of an arm."""
    taken = sorted(one for *_, one in serving.steps)
    busy = [(running, one) for running, waiting, one in serving.steps if waiting]
    return {
        "arm": arm, "blocks": blocks, "running_peak": max(running for running, *_ in serving.steps),
        "running_mean": statistics.mean(running for running, *_ in serving.steps),
        "tokens_per_second": tokens / serving.seconds,
        "busy_tokens_per_second": sum(running for running, _ in busy) / sum(one for _, one in busy) if busy else None,
        "step_p50_ms": 1e3 * statistics.median(taken), "step_p99_ms": 1e3 * taken[int(0.99 * len(taken))],
        "step_longest_ms": 1e3 * taken[-1],
        "event_share": 0.0 if meter is None else meter.seconds / meter.step_seconds, "seconds": serving.seconds,
    }  # fmt: skip


def steps_by_batch(run: argparse.Namespace, arms: list[str], prompt: int) -> dict[str, Any]:
    """Median milliseconds of a decode step by running requests, after prompts of one length."""
    (arm,), tokens, most = arms, min(200, run.tokens), min(max(BATCHES), run.requests)
    longest, found = prompt + tokens, dict[int, float]()
    with engine_of(run, arm, most * -(-longest // BLOCK), longest, most) as llm:
        for batch in (one for one in BATCHES if one <= most):
            taken = serve(llm, prompts(llm, batch, prompt), tokens).steps
            whole = [one for running, _, one in taken if running == batch]  # the first steps fill, the last ones drain
            found[batch] = 1e3 * statistics.median(whole[tokens // 2 :])
    return {"arm": arm, "prompt": prompt, "step_ms": found}


def first_tokens(run: argparse.Namespace, arms: list[str], number: int) -> dict[str, Any]:
    """Milliseconds to the first token of a lone request, and from it to the second, which waits for the prompt's cut;
    stock and compressed by turns in one process.
    """
    (arm,) = arms
    took: dict[str, list[tuple[float, float]]] = {"stock": [], arm: []}
    longest = LONG_PROMPT + 8
    with contextlib.ExitStack() as stack:
        blocks = 2 * -(-longest // BLOCK)
        engines = {name: stack.enter_context(engine_of(run, name, blocks, longest, 2)) for name in took}
        for repeat in range(run.repeats + 1):
            for name, llm in engines.items():
                served = serve(llm, prompts(llm, 1, LONG_PROMPT), 2)
                (first,) = served.first
                if repeat:
                    took[name].append((1e3 * first, 1e3 * (served.seconds - first)))
    middle, low, high = ratio(*([one[0] for one in took[name]] for name in (arm, "stock")))
    first_ms, second_ms = ({name: statistics.median(one[i] for one in took[name]) for name in took} for i in (0, 1))
    return {"arm": arm, "stock_ms": first_ms["stock"], "ms": first_ms[arm], "ratio": middle, "ratio_low": low,
            "ratio_high": high, "stock_second_ms": second_ms["stock"], "second_ms": second_ms[arm]}  # fmt: skip


PARTS: dict[str, Callable[[argparse.Namespace, list[str], int], Any]] = {
    "steps": steps_by_batch, "first": first_tokens, "throughput": throughput,
}  # fmt: skip


def measured(given: argparse.Namespace, part: str, arms: list[str], number: int) -> Any:
    """Return one measurement, made in a process of its own, or read from `--parts` if an earlier run finished it."""
    key = [part, arms, number, given.kv_heavy, given.eager, given.requests, given.tokens, given.at_once, given.repeats]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return kept(given.parts, key, lambda: pool.submit(PARTS[part], given, arms, number).result())


def kept(parts: str, key: list[Any], measure: Callable[[], Any]) -> Any:
    """Return what a file of measurements has under a key, or measure it and add it there."""
    lines = Path(parts).read_text().splitlines() if parts and Path(parts).exists() else ()
    for line in map(json.loads, lines):
        if line["key"] == key:
            return line["found"]
    found = json.loads(json.dumps(measure()))
    print(key[0], found, flush=True)
    if parts:
        with Path(parts).open("a") as out:
            out.write(json.dumps({"key": key, "found": found}) + "\n")
    return found


def median_of(arm: str, rounds: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """An arm over its rounds: the median of everything, and its rate over that of stock in the same round."""
    pairs = [(one, line[0]) for line in rounds for one in line if one["arm"] == arm]  # stock comes first
    names = [name for name, value in pairs[0][0].items() if isinstance(value, int | float)]
    found = {name: statistics.median(one[name] for one, _ in pairs) for name in names}
    ours, stock = ([pair[side]["tokens_per_second"] for pair in pairs] for side in (0, 1))
    found |= zip(("over_stock", "over_stock_low", "over_stock_high"), ratio(ours, stock), strict=True)
    return {"arm": arm, **found, "rounds": [one for one, _ in pairs]}


# at_once: sequences of full KV that the blocks hold; rounds: of stock against the arms at 256; repeats: of the time
# to the first token; parts: a file that finished measurements are kept in, and read from
@script(
    small={"arms": ["stock", "random@256"], "requests": 4, "tokens": 300, "at_once": 2, "rounds": 1, "repeats": 1,
           "eager": True},
    arms=tuple(ARMS), requests=64, tokens=2000, at_once=8, rounds=3, repeats=30, parts="", kv_heavy=False, eager=False,
)  # fmt: skip
def main(given: argparse.Namespace) -> None:
    if given.out is not None and (given.kv_heavy or given.eager) and not given.small:
        given.out = given.out.with_stem(given.out.stem + "_kv_heavy" * given.kv_heavy + "_eager" * given.eager)
    os.environ |= ENVIRONMENT
    with tempfile.TemporaryDirectory() as folder:
        given.model = folder if given.kv_heavy else ""
        if given.kv_heavy:
            make_kv_heavy(folder)
        compressed = [arm for arm in given.arms if arm != "stock"]
        where = kept(given.parts, ["environment"], environment)
        held = {arm: every for arm, every in HELD.items() if arm in given.arms}
        steps = [measured(given, "steps", [arm], prompt) for arm, every in held.items() for prompt in every]
        first = [measured(given, "first", [arm], 0) for arm in compressed[:2]]
        repeated = [arm for arm in compressed if arm in REPEATED]
        lines = [repeated] * given.rounds + [[arm for arm in compressed if arm not in REPEATED]]
        rounds = [measured(given, "throughput", ["stock", *arms], n) for n, arms in enumerate(lines) if arms]
    columns = {
        "arm": "arm", "running, peak": "running_peak", "running, mean": "running_mean", "tokens/s": "tokens_per_second",
        "over stock": "over_stock", "95 % low": "over_stock_low", "95 % high": "over_stock_high",
        "tokens/s while requests wait": "busy_tokens_per_second", "step p50 ms": "step_p50_ms",
        "step p99 ms": "step_p99_ms", "longest ms": "step_longest_ms", "compactions, share of step time": "event_share",
    }  # fmt: skip
    found = [median_of(arm, rounds) for arm in given.arms]
    rows: list[Mapping[str, Any]] = [{name: one.get(key) for name, key in columns.items()} for one in found]
    title = (
        f"{given.requests} requests of {given.tokens} output tokens on the blocks of {given.at_once} full sequences, "
        f"{'a KV-heavy' if given.kv_heavy else 'the bundled'} model, float32, {'eager' if given.eager else 'compiled'}"
    )
    publish(given, title, rows, arms=found, steps_by_batch=steps, first_token=first, prompt=PROMPT, block=BLOCK,
            measured_on=where)  # fmt: skip
