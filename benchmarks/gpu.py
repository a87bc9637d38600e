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
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timing import RESULTS, publish, script
from transformers import AutoModelForCausalLM, Cache, DynamicCache, PreTrainedModel, Qwen3Config, StaticCache
from transformers.initialization import no_init_weights

from reasonkv import CompressedCache, get_method
from reasonkv.calibration import Calibration
from reasonkv.floor import GPUS, decode_step, shape_of
from reasonkv.testbed import load_testbed

SHAPES = {
    "Qwen3-8B": {"hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "intermediate_size": 12288},
    "Qwen3-14B": {"hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40, "intermediate_size": 17408},
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128},
}
METHODS = ("random", "expected", "rkv", "snapkv", "cask", "vase-dkv", "forecast")
LOGICAL = (4, 16, 64)  # of a bounded row's logical length, in budgets
FULL_STEPS = 24
Row = dict[str, Any]


def model_of(shape: str, device: str, layers: int) -> PreTrainedModel:
    """Return a model of a shape with random weights in bfloat16."""
    fields = SHAPES[shape] | ({"num_hidden_layers": layers} if layers else {})
    kv, vocab = (2, 512) if shape == "tiny" else (8, 151936)
    config = Qwen3Config(
        num_key_value_heads=kv, head_dim=128, vocab_size=vocab, max_position_embeddings=2**18, dtype=torch.bfloat16,
        tie_word_embeddings=False, **fields,
    )  # fmt: skip
    with no_init_weights(), torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    for parameter in model.parameters():
        parameter.normal_(0, 0.02) if parameter.ndim > 1 else parameter.fill_(1.0)
    return model


def stock(kind: str, model: PreTrainedModel, batch: int, length: int) -> Cache:
    """Return a stock cache that holds random keys and values of so many tokens."""
    config = model.config
    cache: Cache = DynamicCache(config=config) if kind == "dynamic" else StaticCache(config, length + 4 * FULL_STEPS)
    for layer in range(config.num_hidden_layers):
        shape = (batch, config.num_key_value_heads, length, config.head_dim)
        keys, values = (torch.randn(shape, dtype=torch.bfloat16, device=model.device) for _ in range(2))
        cache.update(keys, values, layer)
    return cache


def bounded(given: argparse.Namespace, method: str, model: PreTrainedModel, batch: int, logical: int) -> Cache:
    """Return a bounded cache of equal sequences that has seen so many tokens and compacted them, in chunks."""
    needs, config, statistics = get_method(method).needs, model.config, None
    if method == "forecast":
        statistics = given.forecast
    elif needs.calibration:
        mean = torch.randn(
            config.num_hidden_layers, config.num_attention_heads, config.head_dim // 2, dtype=torch.cfloat
        )
        modulus = mean.abs() + 0.5
        statistics = Calibration(mean, modulus, modulus.square() * 1.2, head_dim=config.head_dim)
    cache = CompressedCache(
        model, method, tokens=given.budget, interval=given.interval, prompt="count", prefill_chunk=given.budget,
        prompt_lengths=[logical], max_length=logical + 8 * given.interval, calibration=statistics,
    )  # fmt: skip
    ids = torch.randint(5, 500, (1, logical), device=model.device)
    for chunk in ids.split(given.budget, 1):
        model(chunk, past_key_values=cache, logits_to_keep=1)
    cache.batch_repeat_interleave(batch)
    return cache


def timed(model: PreTrainedModel, cache: Cache, batch: int, steps: int) -> tuple[list[float], int]:
    """Return the seconds of each decode step, and the peak bytes meanwhile."""
    on_gpu, took = model.device.type == "cuda", []
    ids = torch.full((batch, 1), 7, device=model.device)
    for number in range(steps + 3):  # three warm up
        start = time.perf_counter()
        ids = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
        if on_gpu:
            torch.cuda.synchronize()
        took.append(time.perf_counter() - start)
        if number == 2 and on_gpu:
            torch.cuda.reset_peak_memory_stats()
    if on_gpu:
        return took[3:], torch.cuda.max_memory_allocated()
    return took[3:], sum(
        x.nbytes for one in cache.layers for x in (one.keys, one.values) if isinstance(x, torch.Tensor)
    )


def summary(given: argparse.Namespace, model: PreTrainedModel, took: list[float], batch: int, slots: float) -> Row:
    """Return the measures of one window of steps, beside the floor at the GPU's published peaks if it is known."""
    median = float(np.median(took))
    name = torch.cuda.get_device_name() if given.device == "cuda" else ""
    known = next((gpu for key, gpu in sorted(GPUS.items(), reverse=True) if key.split("-")[0] in name.split()), None)
    floor = decode_step(shape_of(model.config), batch, slots, torch.bfloat16)
    return {
        "tokens/s": batch * len(took) / sum(took), "step ms p50": 1e3 * median,
        "step ms p99": 1e3 * float(np.percentile(took, 99)),
        "floor ms": 1e3 * floor.seconds(known.rates) if known else "",
    }  # fmt: skip


def full_row(given: argparse.Namespace, model: PreTrainedModel, kind: str, batch: int, answer: int) -> Row:
    """Return the row of full KV in the middle of an answer."""
    length = given.prompt + answer // 2
    cache = stock(kind, model, batch, length)
    took, peak = timed(model, cache, batch, FULL_STEPS)
    return {
        "slots": length,
        **summary(given, model, took, batch, length),
        "peak GB": peak / 1e9,
        "ms per compaction": 0.0,
    }


def bounded_row(given: argparse.Namespace, model: PreTrainedModel, method: str, batch: int, logical: int) -> Row:
    """Return the row of a bounded cache over one interval."""
    with bounded(given, method, model, batch, logical) as cache:
        before = cache.stats().rows[0].events
        took, peak = timed(model, cache, batch, given.interval)
        events, held = cache.stats().rows[0].events - before, given.budget + given.interval / 2
    longest = sorted(took)[len(took) - events :]  # compactions make the longest steps
    each = 1e3 * (np.mean(longest) - np.median(took)) if events else 0.0
    return {"slots": held, **summary(given, model, took, batch, held), "peak GB": peak / 1e9, "ms per compaction": each}


def serving_row(given: argparse.Namespace, shape: str, method: str) -> Row:
    """Return the row of vLLM with random weights: requests of one load at once, stock ("") or bounded."""
    from vllm import LLM, SamplingParams

    from reasonkv.runtimes.vllm.config import KEY, WORKER

    kept = {"method": method, "tokens": given.budget, "interval": given.interval, "prompt": "count"}
    ours = {"worker_cls": WORKER, "additional_config": {KEY: kept}} if method else {}
    with tempfile.TemporaryDirectory() as folder:
        config = model_of(shape, "meta", given.layers).config
        config.architectures = ["Qwen3ForCausalLM"]
        config.save_pretrained(folder)
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
    batches, answers = ([int(one) for one in some] for some in (given.batches, given.answers))
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


@script(
    small={
        "shapes": ["tiny"], "batches": ["1", "2"], "answers": ["16"], "budget": 64, "interval": 16, "prompt": 8,
        "methods": ["random", "expected", "cask", "forecast"], "requests": 2, "serving_tokens": 8, "device": "cpu",
    },
    shapes=("Qwen3-8B", "Qwen3-14B"), batches=("1", "8", "16", "32"), answers=("1024", "4096", "16384"), prompt=256,
    budget=2048, interval=128, methods=METHODS, device="cuda", minutes=6.5, forecast="", layers=0, requests=128,
    serving_tokens=1024, rows="",
)  # fmt: skip
def main(given: argparse.Namespace) -> None:
    began, models = time.perf_counter(), dict[str, PreTrainedModel]()
    file = Path(given.rows) if given.rows else (given.out or RESULTS / "gpu.json").with_suffix(".jsonl")
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    left: list[str] = []
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
                        models = {shape: model_of(shape, given.device, given.layers)}
                    row = partial(work, given, models[shape], name, key["batch"])(key["logical"])
        except torch.OutOfMemoryError:
            row = {"tokens/s": 0.0, "note": "out of memory"}
        except Exception as error:  # one row that fails must not cost the others
            left.append(f"{words}: {type(error).__name__}: {str(error)[:200]}")
            continue
        torch.cuda.empty_cache()
        done.append(key | row)
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as out:
            out.write(json.dumps(done[-1]) + "\n")
        print(f"{words}: {row['tokens/s']:,.0f} tokens/s", flush=True)
    names = dict.fromkeys(name for row in done for name in row if name not in ("device", "budget"))
    if table := [{name: row.get(name, "") for name in names} for row in done]:
        publish(
            given, f"Decoding in bfloat16 on {given.device}, random weights, budget {given.budget}", table, not_run=left
        )
    print("\n".join(["Not run:", *left]) if left else "Everything was run.")
