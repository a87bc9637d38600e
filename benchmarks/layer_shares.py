"""What does evicting in a single layer cost? And what share of all slots should each layer have?

Traces of full KV are replayed once for every layer, which alone evicts. A layer's share of the slots that are not
protected is (its KL - full KV's) ** 0.6; of the powers 0.3, 0.6, 0.8 and 1 this lost least on twelve other traces.

python benchmarks/layer_shares.py --model Qwen/Qwen2.5-Coder-0.5B-Instruct --examples 12 13 14 15 --out shares.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from reasonkv import Budget, get_method
from reasonkv.calibration import find_calibration
from reasonkv.evaluate.cells import RunConfig
from reasonkv.evaluate.replay import replay_batch
from reasonkv.evaluate.settings import TraceSettings
from reasonkv.evaluate.traces import load_or_make_traces
from reasonkv.files import write_atomically
from reasonkv.layers import bounded_layers
from reasonkv.models import load_model
from reasonkv.tasks import get_task

POWER, LEAST = 0.6, 0.005
"""Of a layer's KL, and the least that is taken for it, relative to the largest."""
_ALL = 4096  # slots of a layer that evicts nothing


def shares_of(full: float, layers: list[float]) -> str:
    """Return the option `shares` for layers that alone lose so much."""
    lost = [max(one - full, LEAST * (max(layers) - full)) for one in layers]
    sizes = [one**POWER for one in lost]
    return "/".join(f"{size * len(sizes) / sum(sizes):.3g}" for size in sizes)


def alone(layer: int, layers: int, free: int) -> tuple[int, str]:
    """Return mean slots and shares with which one layer has `free` slots and the others are never full."""
    slots = [free if at == layer else _ALL for at in range(layers)]
    return sum(slots) // layers, "/".join(f"{one / 1000:g}" for one in slots)


def measure(given: argparse.Namespace, found: dict[str, Any]) -> None:
    """Fill in the KL of every trace: of full KV, with all layers evicting, and with each of them alone."""
    loaded = load_model(given.model, dtype="bfloat16")
    model, statistics = loaded.model, find_calibration(loaded.model)
    with tempfile.TemporaryDirectory() as folder:
        traces = load_or_make_traces(
            model, loaded.tokenizer, get_task(given.task), task_spec=given.task, examples=given.examples, seed=0,
            settings=TraceSettings(max_new_tokens=given.most), folder=Path(folder), batch_size=len(given.examples),
        )  # fmt: skip

    def kl(spec: str, tokens: int | None) -> list[float]:
        budget = None if tokens is None else Budget(tokens, interval=given.interval, recent=given.recent)
        replayed = replay_batch(model, traces, RunConfig(get_method(spec), budget), calibration=statistics)
        return [round(one.metrics.kl, 6) for one in replayed]

    layers, protected = len(bounded_layers(model.config)), given.recent + Budget(given.budget).sinks
    arms: dict[str, tuple[str, int | None]] = {"full": ("full", None), "all": (given.method, given.budget)}
    for layer in range(layers):
        free, shares = alone(layer, layers, given.budget - protected)
        arms[str(layer)] = (f"{given.method},shares={shares}", protected + free)
    for name, (spec, tokens) in arms.items():
        if name not in found["kl"]:
            found["kl"][name] = kl(spec, tokens)
            print(name, found["kl"][name], flush=True)
            write_atomically(given.out, (json.dumps(found) + "\n").encode())
    means = {name: sum(values) / len(values) for name, values in found["kl"].items()}
    found["shares"] = shares_of(means.pop("full"), [means[str(layer)] for layer in range(layers)])


def main() -> None:
    """Parse, measure, write; a run that was stopped goes on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--method", default="forecast:window=0", help="with options")
    parser.add_argument("--task", default="gym:gsm_symbolic,per_prompt=4")
    parser.add_argument("--examples", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--budget", type=int, default=128)
    parser.add_argument("--interval", type=int, default=64)
    parser.add_argument("--recent", type=int, default=32)
    parser.add_argument("--most", type=int, default=900, help="tokens of an answer")
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    given = parser.parse_args()
    about = {name: value for name, value in vars(given).items() if name != "out"}
    found = json.loads(given.out.read_text()) if given.out.exists() else {}
    if found.get("about") != about:
        found = {"about": about, "kl": {}}
    measure(given, found)
    write_atomically(given.out, (json.dumps(found) + "\n").encode())
    print(f"{given.method},shares={found['shares']}")


if __name__ == "__main__":
    main()
