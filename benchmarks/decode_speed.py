"""Decode tokens per second of every method against `random`, on the testbed.

Every method decodes the same number of tokens from the same prompts at the same budget, greedily, end tokens ignored.
Runs are interleaved: each round runs every method once, and a method's rate is divided by that of `random` in the same
round. Left out are methods that read the queries of every step (`Requirements(observes=True)`),
selection methods, which drop nothing, full KV, and methods that look into the future.
"""

from __future__ import annotations

import argparse
import os
import time

import torch
from common import median_interval, publish
from transformers import PreTrainedModel

from reasonkv import Budget, CompressedCache, get_method
from reasonkv.methods import method_classes
from reasonkv.methods.sparse_read import SelectionMethod
from reasonkv.testbed import load_testbed

BASE, BOUND = "random", 0.9


def methods() -> list[str]:
    """Names of all methods whose decode steps should cost no more than those of `random`."""
    found = []
    for cls in method_classes():
        needs = get_method(cls.name).needs
        if cls.bounded and not needs.observes and not needs.future and not issubclass(cls, SelectionMethod):
            found.append(cls.name)
    return found


def rate(model: PreTrainedModel, method: str, prompt_BL: torch.Tensor, tokens: int, budget: Budget) -> float:
    """Tokens per second of decoding for the whole batch; prefill is not timed."""
    with torch.no_grad(), CompressedCache(model, method, budget, max_length=prompt_BL.shape[1] + tokens) as cache:
        ids = model(prompt_BL, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
        start = time.perf_counter()
        for _ in range(tokens):
            ids = model(ids, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
        return len(prompt_BL) * tokens / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--interval", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--methods", nargs="*", help="specs beside `random`; all that qualify unless given")
    arguments = parser.parse_args()
    budget = Budget(arguments.budget, interval=arguments.interval, prompt="count")
    specs = [BASE, *(spec for spec in arguments.methods or methods() if spec != BASE)]
    model, load = load_testbed()[0], os.getloadavg()[0]
    prompt = torch.randint(5, 100, (arguments.batch, arguments.prompt), generator=torch.Generator().manual_seed(0))
    rates: dict[str, list[float]] = {spec: [] for spec in specs}
    for spec in specs:  # warms up, over one event
        rate(model, spec, prompt, arguments.budget + arguments.interval, budget)
    for _ in range(arguments.rounds):
        for spec in specs:
            rates[spec].append(rate(model, spec, prompt, arguments.tokens, budget))
    rows = []
    for spec in specs:
        ratio, low, high = median_interval([own / base for own, base in zip(rates[spec], rates[BASE], strict=True)])
        rows.append([spec, median_interval(rates[spec])[0], ratio, low, high, "yes" if ratio >= BOUND else "no"])
    publish(
        "decode_speed",
        f"Decoding {arguments.tokens} tokens, batch {arguments.batch}, budget {arguments.budget}, an event every "
        f"{arguments.interval} tokens, testbed float32",
        ["method", "tokens/s", f"of {BASE}", "95 % low", "95 % high", "within 10 %"],
        rows,
        {"rounds": arguments.rounds, "rates": rates, "load_average_before": load},
    )


if __name__ == "__main__":
    main()
