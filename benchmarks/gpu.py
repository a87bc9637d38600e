"""Decoding on a GPU at Qwen3-8B and 14B shapes with random weights: one command, under 8 minutes, resumable.

Every finished row is appended to a JSON-lines file, and a row that is there is not run again. No row begins after
`--minutes`. What was not run is printed with the reason. `--small` shows on a CPU that it works, and measures nothing.

Rows are windows of steps, not whole answers. Full KV is timed at the middle of an answer of 1k, 4k or 16k tokens,
where a step takes what the mean step does; its cache is filled with random numbers. A bounded cache is prefilled until
it has compacted, and is timed over an interval with one compaction. Peak bytes are CUDA's; on a CPU, the cache's.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from calibrated import random_calibration
from decoding import SHAPES, plain, random_model, step_ms
from timing import RESULTS, Found, Row, median, script, store, stored
from transformers import Cache, PreTrainedModel, Qwen3Config

from reasonkv import CompressedCache, get_method
from reasonkv.floor import GPUS, decode_step, shape_of
from reasonkv.testbed import load_testbed

LOGICAL = (4, 16, 64)  # of a bounded row's logical length, in budgets
FULL_STEPS = 24


def layers_of(given: argparse.Namespace) -> dict[str, int]:
    """Return what stands in place of a shape's own number of layers."""
    return {"num_hidden_layers": given.layers} if given.layers else {}


def bounded(given: argparse.Namespace, method: str, model: PreTrainedModel, batch: int, logical: int) -> Cache:
    """Return a bounded cache of equal sequences that has seen so many tokens and compacted them, in chunks."""
    statistics = random_calibration(model.config) if get_method(method).needs.calibration else None
    cache = CompressedCache(
        model, method, tokens=given.budget, interval=given.interval, prompt="count", prefill_chunk=given.budget,
        prompt_lengths=[logical], max_length=logical + 8 * given.interval,
        calibration=given.forecast if method == "forecast" else statistics,
    )  # fmt: skip
    ids = torch.randint(5, 500, (1, logical), device=model.device)
    for chunk in ids.split(given.budget, 1):
        model(chunk, past_key_values=cache, logits_to_keep=1)
    cache.batch_repeat_interleave(batch)
    return cache


def row_of(model: PreTrainedModel, cache: Cache, batch: int, slots: float, steps: int) -> Row:
    """Return the row of a cache over so many steps, beside the floor at the GPU's published peaks if it is known."""
    on_gpu, ours = model.device.type == "cuda", isinstance(cache, CompressedCache)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    before = cache.stats().rows[0].events if ours else 0
    took = step_ms(model, cache, batch, steps, warm_up=3)
    here = cache.stats().bytes_allocated if ours else sum(one.keys.nbytes + one.values.nbytes for one in cache.layers)
    peak = torch.cuda.max_memory_allocated() if on_gpu else here
    name = torch.cuda.get_device_name() if on_gpu else ""
    known = next((gpu for key, gpu in sorted(GPUS.items(), reverse=True) if key.split("-")[0] in name.split()), None)
    floor = decode_step(shape_of(model.config), batch, slots, torch.bfloat16)
    events = cache.stats().rows[0].events - before if ours else 0
    longest = sorted(took)[len(took) - events :]  # compactions make the longest steps
    return {
        "slots": slots, "tokens/s": 1e3 * batch * len(took) / sum(took), "step ms p50": median(took),
        "step ms p99": float(np.percentile(took, 99)), "floor ms": 1e3 * floor.seconds(known.rates) if known else "",
        "peak GB": peak / 1e9, "ms per compaction": float(np.mean(longest)) - median(took) if events else 0.0,
    }  # fmt: skip


def full_row(given: argparse.Namespace, model: PreTrainedModel, kind: str, batch: int, answer: int) -> Row:
    """Return the row of full KV in the middle of an answer."""
    length = given.prompt + answer // 2
    cache = plain(model, "stock" if kind == "dynamic" else kind, batch, length, room=4 * FULL_STEPS)
    return row_of(model, cache, batch, length, FULL_STEPS)


def bounded_row(given: argparse.Namespace, model: PreTrainedModel, method: str, batch: int, logical: int) -> Row:
    """Return the row of a bounded cache over one interval."""
    cache = bounded(given, method, model, batch, logical)
    return row_of(model, cache, batch, given.budget + given.interval / 2, given.interval)


def serving_row(given: argparse.Namespace, shape: str, method: str) -> Row:
    """Return the row of vLLM with random weights: requests of one load at once, stock ("") or bounded."""
    from vllm import LLM, SamplingParams

    from reasonkv.runtimes.vllm.config import KEY, WORKER

    kept = {"method": method, "tokens": given.budget, "interval": given.interval, "prompt": "count"}
    ours = {"worker_cls": WORKER, "additional_config": {KEY: kept}} if method else {}
    with tempfile.TemporaryDirectory() as folder:
        fields = SHAPES[shape] | layers_of(given) | {"architectures": ["Qwen3ForCausalLM"]}
        Qwen3Config(**fields, dtype=torch.bfloat16).save_pretrained(folder)
        load_testbed()[1].save_pretrained(folder)  # any tokenizer will do
        llm = LLM(
            folder, load_format="dummy", dtype="bfloat16", enable_prefix_caching=False,
            max_model_len=given.prompt + given.serving_tokens, **ours,
        )  # fmt: skip
    asked = [{"prompt_token_ids": [7 + number] * given.prompt} for number in range(given.requests)]
    sampling = SamplingParams(temperature=0, max_tokens=given.serving_tokens, ignore_eos=True, detokenize=False)
    start = time.perf_counter()
    llm.generate(asked, sampling, use_tqdm=False)
    seconds = time.perf_counter() - start
    llm.llm_engine.engine_core.shutdown()
    return {"tokens/s": given.requests * given.serving_tokens / seconds}


def cells(given: argparse.Namespace) -> Iterator[tuple[str, str, Row, Callable[..., Row], str]]:
    """Yield the shape, the name, the key, the work and a reason not to run of every row, the most wanted first."""
    no_fit = "" if given.forecast else "no file of a fit; give --forecast FILE"
    batches, answers = given.batches, given.answers
    for number, shape in enumerate(given.shapes):
        for batch in batches if number == 0 else batches[-2:-1] or batches:
            for method in given.methods:
                key = {"shape": shape, "kept": method, "batch": batch, "logical": 2 * given.budget}
                yield shape, method, key, bounded_row, no_fit if method == "forecast" else ""
            for answer in answers:
                for kind in ("dynamic", "static"):
                    key = {"shape": shape, "kept": f"full, {kind}", "batch": batch, "logical": answer}
                    yield shape, kind, key, full_row, ""
    for times in LOGICAL:  # time per token against the logical length
        key = {"shape": given.shapes[0], "kept": "random", "batch": batches[0], "logical": times * given.budget}
        yield given.shapes[0], "random", key, bounded_row, ""
    found = importlib.util.find_spec("vllm")
    missing = "" if found and found.origin else "vllm is not installed"  # a folder of that name has no origin
    for method in ("", "random", "vase-dkv"):
        key = {"shape": given.shapes[0], "kept": f"vllm, {method or 'stock'}", "batch": given.requests}
        yield given.shapes[0], method, key, serving_row, missing


@script
def main(given: argparse.Namespace) -> Found:
    began, models = time.perf_counter(), dict[str, PreTrainedModel]()
    file = Path(given.rows) if given.rows else (given.out or RESULTS / "gpu.json").with_suffix(".jsonl")
    done, left = stored(file), list[str]()
    for shape, name, key, work, reason in cells(given):
        key |= {"device": given.device, "budget": given.budget}
        words = ", ".join(f"{one}" for one in list(key.values())[:4])
        if any(key.items() <= row.items() for row in done):
            continue
        reason = "there is no GPU" if given.device == "cuda" and not torch.cuda.is_available() else reason
        if not reason and time.perf_counter() - began > 60 * given.minutes:
            reason = "no time left; run the command again"
        if reason:
            left.append(f"{words}: {reason}")
            continue
        try:
            with torch.no_grad():
                if work is serving_row:
                    models.clear()  # vLLM wants the memory
                    torch.cuda.empty_cache()
                    row = serving_row(given, shape, name)
                else:
                    if shape not in models:
                        models = {shape: random_model(shape, device=given.device, **layers_of(given))}
                    row = partial(work, given, models[shape], name, key["batch"])(key["logical"])
        except torch.OutOfMemoryError:
            row = {"tokens/s": 0.0, "note": "out of memory"}
        except Exception as error:  # one row that fails must not cost the others
            left.append(f"{words}: {type(error).__name__}: {str(error)[:200]}")
            continue
        torch.cuda.empty_cache()
        done.append(store(file, key | row))
        print(f"{words}: {row['tokens/s']:,.0f} tokens/s", flush=True)
    names = dict.fromkeys(name for row in done for name in row if name not in ("device", "budget"))
    rows = [{name: row.get(name, "") for name in names} for row in done]
    title = f"Decoding in bfloat16 on {given.device}, random weights, budget {given.budget}"
    yield {"title": title, "rows": rows, "not_run": left}
    print("\n".join(["Not run:", *left]) if left else "Everything was run.")
