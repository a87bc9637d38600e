"""Replay a pretrained model's own answers through a few methods: `python tools/first_look.py MODEL`.

Full KV answers each chat prompt once, greedily. Each method is then fed the same tokens, in chunks that end at its
compactions, and every token of the answer is scored: is it still the most likely one, and how likely is it?
The records are few on purpose. They show how to measure a model of your own; they do not rank methods.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from reasonkv import Budget, CompressedCache
from reasonkv.identity import device_words, package_versions

QUESTIONS = (
    "Write a Python class for an LRU cache with get and put in O(1), then explain each method and test it.",
    "A train leaves at 9:40 and travels 312 km at 78 km/h with two stops of 12 minutes. When does it arrive?",
    "Implement binary search over a rotated sorted list in Python. Walk through three examples step by step.",
    "Explain how a hash map handles collisions, then implement one with open addressing in Python.",
    "Write a SQL schema for a small library (books, members, loans) and five queries, and explain each query.",
    "Find all prime numbers below 60 with the sieve of Eratosthenes and write down every step you take.",
)
METHODS = ("random", "streaming", "keydiff", "snapkv:window=16", "rkv:window=16")
TOKENS = (64, 128)
ANSWER = 448


@torch.no_grad()
def main(name: str, target: Path) -> None:
    """Write one JSON line for each (method, budget, question) to `target`."""
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(name)
    lines = [json.dumps({"device": device_words(model.device), "versions": package_versions()})]
    for number, question in enumerate(QUESTIONS):
        chat = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        prompt = inputs["input_ids"].shape[1]
        ids_1T = model.generate(**inputs, max_new_tokens=ANSWER, do_sample=False, repetition_penalty=1.0)
        specs = [("full", None), *((method, tokens) for method in METHODS for tokens in TOKENS)]
        for method, tokens in specs:
            budget = None if tokens is None else Budget(tokens=tokens, interval=32, sinks=4, recent=16, prompt="on_top")
            agree, nll = replay(model, method, budget, ids_1T, prompt)
            record = {
                "model": Path(name).name, "method": method, "tokens": tokens, "question": number, "prompt": prompt,
                "answer": len(agree), "top1": sum(agree) / len(agree), "nll": sum(nll) / len(nll),
            }  # fmt: skip
            print(json.dumps(record), flush=True)
            lines.append(json.dumps(record))
        target.write_text("\n".join(lines) + "\n")


def replay(
    model: torch.nn.Module, method: str, budget: Budget | None, ids_1T: torch.Tensor, prompt: int
) -> tuple[list[bool], list[float]]:
    """Return, for each answer token, whether it is the most likely one and its negative log-likelihood in nats."""
    agree: list[bool] = []
    nll: list[float] = []
    with CompressedCache(model, method, budget, prompt_lengths=[prompt]) as cache:
        start, size = 0, prompt
        while start < ids_1T.shape[1] - 1:
            end = min(start + size, ids_1T.shape[1] - 1)
            logits = model(ids_1T[:, start:end], past_key_values=cache).logits[0, max(0, prompt - 1 - start) :].float()
            targets = ids_1T[0, max(prompt, start + 1) : end + 1]
            agree += (logits.argmax(-1) == targets).tolist()
            nll += torch.nn.functional.cross_entropy(logits, targets, reduction="none").tolist()
            start, size = end, min([32, *filter(None, cache.tokens_to_next_event())])
    return agree, nll


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2] if len(sys.argv) > 2 else "docs/data/first_look.jsonl"))
