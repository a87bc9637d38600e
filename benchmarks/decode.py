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
from calibrated import calibration_of
from decoding import (
    Bounded,
    Floor,
    Steady,
    Subject,
    load,
    plain,
    ragged_mask,
    random_model,
    run_seconds,
    step_ms,
    text_ids,
)  # fmt: skip
from timing import Found, Row, by_turns, interval, median, ratio, script
from transformers import DynamicCache

from reasonkv import Budget, CompressedCache, get_method
from reasonkv.methods import method_classes

STACK = "Qwen3-8B's shape, 2 layers"
PROMPT = 128
"""Tokens of the prompt of the runs that are summed up."""
EQUAL = (512, 2048)
"""Lengths at which nothing was dropped and ours is compared with stock."""
RAGGED = STATIC = 8
"""Largest batch at which rows of different lengths, and a static cache, are measured, too: both take minutes beyond."""
Windows = Mapping[str, Mapping[str, Sequence[Any]]]
"""What was measured by arm, one value a round."""


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
) -> dict[str, list[Row]]:
    """Measure a model at a batch size: rows of the tables "rows", "lengths" and "equal"."""
    answers, lengths, longest = given.answers, given.lengths, max(given.answers) + PROMPT
    static = answers if batch <= STATIC else []
    ragged = [(f"{kind}-ragged", EQUAL[1:]) for kind in ("stock", "full") if 1 < batch <= RAGGED]
    arms: dict[str, Any] = {
        f"{kind} {tokens}": partial(length_ms, subject, kind, batch, tokens, given.steps)
        for kind, at in (("stock", lengths), ("full", lengths[:3]), ("static", static), *ragged)
        for tokens in at
    }
    arms |= {method: partial(steady, one, batch) for method, one in bounded.items()}
    found = by_turns(arms, given.rounds, seconds=given.seconds)
    floor, per_token = Floor(subject), subject.token_bytes * batch
    where = {"model": f"{subject.name} {subject.dtype}", "batch": batch, "budget": budget.tokens}
    by_length = list(zip(*(found[f"stock {one}"]["ms"] for one in lengths), strict=False))
    runs = {  # seconds of a whole answer in every round, by cache and tokens
        "stock": {n: [run_seconds(lengths, ms, PROMPT, n) for ms in by_length] for n in answers},
        "static": {n: [ms * n / 1e3 for ms in found[f"static {n}"]["ms"]] for n in static},
    }
    rows = []
    for arm in ("stock", *(["static"] if static else []), *bounded):
        if arm in bounded:
            every: list[Steady] = list(found[arm]["steady"])
            one = sum(every[1:], every[0])
            runs[arm] = {n: [bounded_seconds(found, lengths, each, budget, n) for each in every] for n in answers}
            step, over = one.percentile(50), one.mean_ms / floor.bounded_ms(batch, budget)
            more = (one.percentile(99), median(one.compaction_ms), one.share, one.kv_bytes / 1e6)
        else:
            step = median(found[f"stock {lengths[-1]}" if arm == "stock" else f"static {answers[-1]}"]["ms"])
            over, more = step / floor.step_ms(batch, lengths[-1]), (None, None, None, per_token * longest / 1e6)
        names = ("step p99 ms", "ms per compaction", "compactions, % of decoding", "KV MB")
        row = {**where, "cache": arm, "step p50 ms": step, "of the floor": over, **dict(zip(names, more, strict=True))}
        for n in answers:
            row[f"tokens/s, answers of {n}"] = batch * n / median(runs[arm][n])
            rounds = min(len(runs["stock"][n]), len(runs[arm][n]))
            names = (f"over stock, answers of {n}", f"{n}, low", f"{n}, high")
            row |= zip(names, ratio(runs["stock"][n][:rounds], runs[arm][n][:rounds]), strict=True)
        rows.append(row)
        print(f"{where['model']}, batch {batch}, {arm}: {step:.0f} ms a step", flush=True)
    timed = {arm: median(own["ms"]) for arm, own in found.items() if "ms" in own}
    return {
        "rows": rows,
        "lengths": [
            {**where, "cache": kind, "tokens held": int(tokens), "ms per step": ms,
             "of the floor": ms / floor.step_ms(batch, int(tokens))}
            for (kind, tokens), ms in ((arm.split(), ms) for arm, ms in timed.items())
        ],
        "equal": [
            {**where, "tokens held": tokens, "rows": "of different lengths" if more else "equally long",
             "stock ms": timed[stock], "ours ms": timed[full],
             **interval(ratio(found[stock]["ms"], found[full]["ms"]), "ours over stock")}
            for more in ("", "-ragged") for tokens in EQUAL
            for stock, full in [(f"stock{more} {tokens}", f"full{more} {tokens}")] if full in found
        ],
    }  # fmt: skip


def steady(one: Bounded, batch: int) -> dict[str, Steady]:
    """Measure a bounded cache."""
    return {"steady": one.measure(batch)}


def bounded_seconds(found: Windows, lengths: Sequence[int], steady: Steady, budget: Budget, tokens: int) -> float:
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


def check(subject: Subject, given: argparse.Namespace) -> list[Row]:
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
    found: Windows = by_turns(arms, 1)
    summed = {
        "stock": run_seconds(lengths, [median(found[f"stock {one}"]["ms"]) for one in lengths], PROMPT, tokens),
        "random": bounded_seconds(found, lengths, found["random"]["steady"][0], budget, tokens),
    }
    where = {"model": f"{subject.name} {subject.dtype}", "batch": batch, "tokens": tokens, "budget": budget.tokens}
    return [
        {**where, "cache": arm, "summed s": seconds, "whole run s": found[f"whole {arm}"]["s"][0],
         "summed over whole": seconds / found[f"whole {arm}"]["s"][0]}
        for arm, seconds in summed.items()
    ]  # fmt: skip


@script
def main(given: argparse.Namespace) -> Found:
    torch.manual_seed(0)
    tables: dict[str, list[Row]] = {"rows": [], "lengths": [], "equal": [], "check": []}
    began, methods = time.monotonic(), bounded_methods() if given.methods == ["all"] else given.methods
    large = (given.large_methods, given.large_budget)
    plans = [(given.model, given.batches, methods, given.budget), (given.large, [given.large_batch], *large),
             (STACK if given.stack_batch else "", [given.stack_batch], *large)]  # fmt: skip
    left_out = [f"{Path(name).name} at batch {batch}" for name, batches, *_ in plans if name for batch in batches]
    for name, batches, chosen, tokens in plans:
        subject = load(name) if name not in ("", STACK) else None
        if name == STACK:  # with a small vocabulary
            subject = Subject(STACK, random_model(num_hidden_layers=2, vocab_size=1024))
        if subject is None:
            continue
        budget = Budget(tokens, interval=given.interval, prompt="count")
        turns = replace(budget, stagger=min(given.stagger, subject.model.config.num_hidden_layers))
        calibration, steps = calibration_of(subject, chosen), given.steps
        bounded = {one: Bounded(subject, one, budget, calibration, steps=steps) for one in chosen} | {
            f"{one}, {turns.stagger} turns": Bounded(subject, one, turns, calibration, steps=steps)
            for one in given.staggered if one in chosen
        }  # fmt: skip
        for batch in batches:
            if time.monotonic() - began > 60 * given.minutes:
                continue
            for table, rows in cell(subject, batch, budget, bounded, given).items():
                tables[table] += rows
            left_out.remove(f"{subject.name} at batch {batch}")
            if name == given.model and batch == batches[-1]:
                tables["check"] = check(subject, given)
            title = f"Decoding after a prompt of {PROMPT} tokens, a compaction every {given.interval} tokens"
            yield {"title": title, **tables, "left_out": left_out}
    if left_out and tables["rows"]:
        print(f"Not measured: {', '.join(left_out)}.")
