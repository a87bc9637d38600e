"""Decode for `against_kvpress.py`, one turn at a time, with kvpress or with reasonkv, whichever is installed.

Reads a JSON object a line: method, batch, budget, interval, prompt (token ids), and the step that compacts; writes
one back: milliseconds of every step, and the slots held at the end. It stands alone, since kvpress lives in a virtual
environment of its own.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
import transformers

AFTER = 3
"""Steps after the compaction."""


def kvpress_press(order: dict[str, Any]) -> Any:
    """Return kvpress's press that decodes with a method of ours."""
    import kvpress

    bases = {
        "random": kvpress.RandomPress, "streaming": kvpress.StreamingLLMPress, "knorm": kvpress.KnormPress,
        "keydiff": kvpress.KeyDiffPress, "snapkv": kvpress.SnapKVPress, "expected": kvpress.ExpectedAttentionPress,
        "lagkv": kvpress.LagKVPress, "tova": kvpress.TOVAPress,
    }  # fmt: skip
    return kvpress.DecodingPress(
        base_press=bases[order["method"]](), compression_interval=order["interval"], target_size=order["budget"]
    )


@torch.no_grad()
def kvpress_turn(model: Any, order: dict[str, Any]) -> dict[str, Any]:
    """Decode with `DecodingPress`, which compacts after so many decode steps as its counters say."""
    cache, press = transformers.DynamicCache(), kvpress_press(order)
    with press(model):
        model(torch.tensor([order["prompt"]]), past_key_values=cache, logits_to_keep=1)
        cache.batch_repeat_interleave(order["batch"])
        for layer in range(len(cache.layers)):
            press.layer_step_counts[layer] = order["interval"] - order["first"]
        taken = steps(model, cache, order, tells_prompt=True)
    return {"ms": taken, "held": cache.layers[0].keys.shape[2]}


@torch.no_grad()
def reasonkv_turn(model: Any, order: dict[str, Any]) -> dict[str, Any]:
    """Decode with a compressed cache; all tokens but one count as answer, so that none are dropped before."""
    from reasonkv import Budget, CompressedCache

    budget = Budget(order["budget"], interval=order["interval"], prompt="count")
    prompt = torch.tensor([order["prompt"]])
    with CompressedCache(model, order["method"], budget, prompt_lengths=1) as cache:
        for ids in (prompt[:, :1], prompt[:, 1:]):
            model(ids, past_key_values=cache, logits_to_keep=1)
        cache.batch_repeat_interleave(order["batch"])
        taken = steps(model, cache, order)
        return {"ms": taken, "held": round(cache.stats().rows[0].physical_terminal)}


def steps(model: Any, cache: Any, order: dict[str, Any], *, tells_prompt: bool = False) -> list[float]:
    """Decode greedily up to the compaction and a little further; return the milliseconds of every step."""
    ids, taken = torch.full((order["batch"], 1), order["prompt"][-1]), []
    for step in range(order["first"] + AFTER):
        start = time.perf_counter()
        position = torch.full((order["batch"], 1), len(order["prompt"]) + step)
        given = {"cache_position": position[0]} if tells_prompt else {}  # kvpress tells prompt from answer by it
        out = model(ids, position_ids=position, past_key_values=cache, use_cache=True, **given)
        ids = out.logits[:, -1].argmax(-1, keepdim=True)
        taken.append(1e3 * (time.perf_counter() - start))
    return taken


def main() -> None:
    """Load a model and answer until the input ends."""
    side, name, dtype, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype)).eval()
    for weight in model.parameters():  # as `load_model` does: weights mapped from a file are read more slowly
        weight.data = weight.data.clone()
    facts = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps(facts), flush=True)
    turn = kvpress_turn if side == "kvpress" else reasonkv_turn
    for line in sys.stdin:
        print(json.dumps(turn(model, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
