"""Decode rates of pretrained models on this machine: every method beside the stock caches of transformers.

Whole runs of thousands of tokens take too long, so windows of a few steps are timed, all arms by turns. Caches that
hold every token are filled directly with random keys and values of several lengths. A bounded cache is prefilled by the
model and timed just after a compaction and up to the next one; all its steps from then on are like these. The seconds
of a whole run are the sum of its steps, a step's time being linear between measured lengths. `check` compares that sum
with a real run of a smaller size.

    python benchmarks/decode.py --methods all --large ""      # every bounded method on the smaller model
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from decoding import (
    LARGE,
    SMALL,
    Bounded,
    Floor,
    Steady,
    Subject,
    calibration_of,
    load,
    plain,
    ragged_mask,
    run_seconds,
    step_ms,
    text_ids,
)  # fmt: skip
from timing import by_turns, interval, median, publish, random_model, ratio, script
from transformers import DynamicCache, PreTrainedModel

from reasonkv import Budget, CompressedCache, get_method
from reasonkv.methods import method_classes

DOZEN = (
    "random", "streaming", "knorm", "keydiff", "snapkv", "rkv", "expected", "triattention", "cask", "vase-dkv",
    "vase-attnv", "kara", "curdkv", "h2o", "forecast",
)  # fmt: skip
FEW = ("random", "expected", "rkv")
STACK = "Qwen3-8B's shape, 2 layers"
PROMPT = 128
"""Tokens of the prompt of the runs that are summed up."""
EQUAL = (512, 2048)
"""Lengths at which nothing was dropped and ours is compared with stock."""
RAGGED = 8
"""Largest batch at which rows of different lengths are measured, too."""
Found = Mapping[str, Mapping[str, Sequence[Any]]]


def bounded_methods() -> list[str]:
    """Return all methods that evict, but for those that look into the future."""
    needs = {cls.name: get_method(cls.name).needs for cls in method_classes() if cls.bounded}
    return [name for name, one in needs.items() if not (one.future or one.selects)]


def length_ms(subject: Subject, kind: str, batch: int, tokens: int, steps: int) -> dict[str, float]:
    """Measure the median milliseconds of a step at a length, with a cache that holds every token.

    Args:
        kind: as of `plain`; "-ragged" behind it: the rows are left-padded, the longest is as long.
    """
    gc.collect()  # a cache of gigabytes may still stand in a cycle
    kind, _, ragged = kind.partition("-")
    mask = ragged_mask(batch, tokens) if ragged else None
    cache = plain(subject.model, kind, batch, tokens, mask)
    return {"ms": median(step_ms(subject.model, cache, batch, steps, warm_up=1, most_ms=1000, mask_BL=mask))}


def cell(
    subject: Subject, batch: int, budget: Budget, bounded: Mapping[str, Bounded], given: argparse.Namespace
) -> dict[str, list[dict[str, Any]]]:
    """Measure a model at a batch size: rows of the tables "methods", "lengths" and "equal"."""
    answers, lengths, longest = given.answers, given.lengths, max(given.answers) + PROMPT
    ragged = [(f"{kind}-ragged", EQUAL[1:]) for kind in ("stock", "full") if 1 < batch <= RAGGED]
    arms: dict[str, Any] = {
        f"{kind} {tokens}": partial(length_ms, subject, kind, batch, tokens, given.steps)
        for kind, at in (("stock", lengths), ("full", lengths[:3]), ("static", answers), *ragged)
        for tokens in at
    }
    arms |= {method: partial(steady, one, batch) for method, one in bounded.items()}
    found = by_turns(arms, given.rounds, warm_up=0, seconds=given.seconds)

    def stock_seconds(tokens: int) -> list[float]:
        every = zip(*(found[f"stock {one}"]["ms"] for one in lengths), strict=False)
        return [run_seconds(lengths, ms, PROMPT, tokens) for ms in every]

    floor = Floor(subject)
    where = {"model": f"{subject.name} {subject.dtype}", "batch": batch, "budget": budget.tokens}
    of_stock = {tokens: stock_seconds(tokens) for tokens in answers}
    per_token = subject.token_bytes * batch
    rows = []
    for arm in ("stock", "static", *bounded):
        row: dict[str, Any] = {**where, "cache": arm}
        if arm in ("stock", "static"):
            stock_steps = found[f"stock {lengths[-1]}"]["ms"]
            steps = stock_steps if arm == "stock" else found[f"static {answers[-1]}"]["ms"]
            static = {n: [ms * n / 1e3 for ms in found[f"static {n}"]["ms"]] for n in answers}
            own = of_stock if arm == "stock" else static
            row |= {"step p50 ms": median(steps), "of the floor": median(steps) / floor.step_ms(batch, lengths[-1]),
                    "step p99 ms": None, "ms per compaction": None,
                    "compactions, % of decoding": None, "KV MB": per_token * longest / 1e6}  # fmt: skip
        else:
            every: list[Steady] = list(found[arm]["steady"])
            one = sum(every[1:], every[0])
            own = {n: [bounded_seconds(found, lengths, each, budget, n) for each in every] for n in answers}
            row |= {"step p50 ms": one.percentile(50), "of the floor": one.mean_ms / floor.bounded_ms(batch, budget),
                    "step p99 ms": one.percentile(99),
                    "ms per compaction": median(one.compaction_ms), "compactions, % of decoding": one.share,
                    "KV MB": one.kv_bytes / 1e6}  # fmt: skip
        for n in answers:
            row[f"tokens/s, answers of {n}"] = batch * n / median(own[n])
            beside = zip(of_stock[n], own[n], strict=False)
            names = (f"over stock, answers of {n}", f"{n}, low", f"{n}, high")
            row |= zip(names, ratio(*zip(*beside, strict=True)), strict=True)
        rows.append(row)
        print(f"{where['model']}, batch {batch}, {arm}: {row['step p50 ms']:.0f} ms a step", flush=True)
    return {
        "rows": rows,
        "lengths": [
            {**where, "cache": kind, "tokens held": int(tokens), "ms per step": median(own["ms"]),
             "of the floor": median(own["ms"]) / floor.step_ms(batch, int(tokens))}
            for (kind, tokens), own in ((arm.split(), own) for arm, own in found.items() if "ms" in own)
        ],
        "equal": [
            {**where, "tokens held": tokens, "rows": "of different lengths" if more else "equally long",
             "stock ms": median(found[f"stock{more} {tokens}"]["ms"]),
             "ours ms": median(found[f"full{more} {tokens}"]["ms"]),
             **interval(ratio(found[f"stock{more} {tokens}"]["ms"], found[f"full{more} {tokens}"]["ms"]),
                        "ours over stock")}
            for more in ("", "-ragged") for tokens in EQUAL if f"full{more} {tokens}" in found
        ],
    }  # fmt: skip


def steady(one: Bounded, batch: int) -> dict[str, Steady]:
    """Measure a bounded cache."""
    return {"steady": one.measure(batch)}


def bounded_seconds(found: Found, lengths: Sequence[int], steady: Steady, budget: Budget, tokens: int) -> float:
    """Return the seconds of a run: as full KV of ours until the first compaction, and steady steps from there on."""
    assert budget.tokens is not None
    growing = min(tokens, max(0, budget.tokens + budget.interval - PROMPT))
    ms = [median(found[f"full {one}"]["ms"]) for one in lengths[:3]]
    return run_seconds(lengths[:3], ms, PROMPT, growing) + (tokens - growing) * steady.mean_ms / 1e3


@torch.no_grad()
def whole_run(
    subject: Subject, method: str | None, budget: Budget, batch: int, prompt: int, tokens: int
) -> dict[str, float]:
    """Measure the seconds of decoding `tokens` tokens after a prompt, step by step."""
    assert subject.tokenizer is not None
    model, ids = subject.model, text_ids(subject.tokenizer, prompt).expand(batch, -1)
    cache = DynamicCache(config=model.config) if method is None else CompressedCache(model, method, budget)
    model(ids, past_key_values=cache, logits_to_keep=1)
    return {"s": sum(step_ms(model, cache, batch, tokens, warm_up=0)) / 1e3}


def check(subject: Subject, given: argparse.Namespace) -> list[dict[str, Any]]:
    """Compare sums of windows with real runs of stock and of a bounded cache."""
    batch, tokens = given.check_batch, given.check_tokens
    budget = Budget(tokens // 4, interval=max(12, tokens // 8), prompt="count")
    lengths = (PROMPT, PROMPT + tokens // 2, PROMPT + tokens)
    arms: dict[str, Any] = {
        f"{kind} {one}": partial(length_ms, subject, kind, batch, one, given.steps)
        for kind in ("stock", "full") for one in lengths
    }  # fmt: skip
    arms["random"] = partial(steady, Bounded(subject, "random", budget, steps=given.steps), batch)
    for arm, method in (("stock", None), ("random", "random")):
        arms[f"whole {arm}"] = partial(whole_run, subject, method, budget, batch, PROMPT, tokens)
    found: Found = by_turns(arms, 1, warm_up=0)
    summed = {
        "stock": run_seconds(lengths, [median(found[f"stock {one}"]["ms"]) for one in lengths], PROMPT, tokens),
        "random": bounded_seconds(found, lengths, found["random"]["steady"][0], budget, tokens),
    }
    return [
        {"model": f"{subject.name} {subject.dtype}", "batch": batch, "tokens": tokens, "budget": budget.tokens,
         "cache": arm,
         "summed s": seconds, "whole run s": found[f"whole {arm}"]["s"][0],
         "summed over whole": seconds / found[f"whole {arm}"]["s"][0]}
        for arm, seconds in summed.items()
    ]  # fmt: skip


def stack() -> PreTrainedModel:
    """Return two layers of Qwen3-8B's shape, with a small vocabulary."""
    fields = {"hidden_size": 4096, "intermediate_size": 12288, "vocab_size": 1024, "rope_theta": 1e6}
    return random_model(2, 32, 8, dtype=torch.bfloat16, max_position_embeddings=40960, **fields)


# staggered: methods that are also timed with their layers compacted in `stagger` turns;
# seconds: of a cell, after which no further round of it begins; minutes: after which no further cell begins
@script(
    small={"model": "testbed", "large": "", "batches": ["2"], "methods": ["random", "expected", "triattention"],
           "budget": 32, "interval": 16, "lengths": ["64", "512", "2048"], "answers": ["256"], "steps": 2, "rounds": 1,
           "check_batch": 2, "check_tokens": 128, "stack_batch": 0, "stagger": 2},
    model=SMALL, large=LARGE, batches=("1", "8", "32"), methods=DOZEN, budget=256, interval=128,
    lengths=("512", "1024", "2048", "4096"), answers=("1024", "4096"), steps=4, rounds=5, seconds=35.0, minutes=7.0,
    staggered=("expected", "rkv"), stagger=8, large_methods=FEW, large_budget=512, large_batch=32, stack_batch=8,
    check_batch=8, check_tokens=192,
)  # fmt: skip
def main(given: argparse.Namespace) -> None:
    torch.manual_seed(0)
    given.lengths, given.answers = (list(map(int, one)) for one in (given.lengths, given.answers))
    tables: dict[str, list[dict[str, Any]]] = {"rows": [], "lengths": [], "equal": [], "check": []}
    began, methods = time.monotonic(), bounded_methods() if given.methods == ["all"] else given.methods
    plans: list[tuple[str, list[int], Sequence[str], int]] = [
        (given.model, list(map(int, given.batches)), methods, given.budget),
        (given.large, [given.large_batch], given.large_methods, given.large_budget),
        (STACK if given.stack_batch else "", [given.stack_batch], given.large_methods, given.large_budget),
    ]
    left_out = [f"{Path(name).name} at batch {batch}" for name, batches, *_ in plans if name for batch in batches]
    title = f"Decoding after a prompt of {PROMPT} tokens, a compaction every {given.interval} tokens"
    for name, batches, chosen, tokens in plans:
        subject = Subject(STACK, stack()) if name == STACK else load(name) if name else None
        if subject is None:
            continue
        budget = Budget(tokens, interval=given.interval, prompt="count")
        calibration = calibration_of(subject, chosen)
        bounded = {one: Bounded(subject, one, budget, calibration, steps=given.steps) for one in chosen}
        for one in [one for one in given.staggered if one in chosen]:
            turns = replace(budget, stagger=min(given.stagger, subject.model.config.num_hidden_layers))
            label = f"{one}, {turns.stagger} turns"
            bounded[label] = Bounded(subject, one, turns, calibration, steps=given.steps)
        for batch in batches:
            if time.monotonic() - began > 60 * given.minutes:
                continue
            for table, rows in cell(subject, batch, budget, bounded, given).items():
                tables[table] += rows
            left_out.remove(f"{subject.name} at batch {batch}")
            if name == given.model and batch == batches[-1]:
                tables["check"] = check(subject, given)
            # after every cell, so that a run that is stopped leaves what it measured
            publish(given, title, **tables, left_out=left_out, seconds=time.monotonic() - began)
    if not tables["rows"]:
        raise SystemExit("No model was there, so nothing was measured.")
    if left_out:
        print(f"Not measured: {', '.join(left_out)}.")
