"""What does evicting in a single layer cost? And what share of all slots should each layer have?

`reasonkv calibrate --layer-shares` measures the same; this takes any method and budget, and writes every layer's loss.

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
from reasonkv.evaluate.settings import TraceSettings
from reasonkv.evaluate.sharing import alone, losses, shares_of
from reasonkv.evaluate.traces import load_or_make_traces
from reasonkv.files import write_atomically
from reasonkv.layers import bounded_layers
from reasonkv.models import load_model
from reasonkv.tasks import get_task


def measure(given: argparse.Namespace, found: dict[str, Any]) -> None:
    """Fill in the KL of every trace: of full KV, with all layers evicting, and with each of them alone."""
    loaded = load_model(given.model, dtype="bfloat16")
    model, statistics = loaded.model, find_calibration(loaded.model)
    with tempfile.TemporaryDirectory() as folder:
        traces = load_or_make_traces(
            model, loaded.tokenizer, get_task(given.task), task_spec=given.task, examples=given.examples, seed=0,
            settings=TraceSettings(max_new_tokens=given.most), folder=Path(folder), batch_size=len(given.examples),
        )  # fmt: skip
    method, budget = get_method(given.method), Budget(given.budget, interval=given.interval, recent=given.recent)
    layers, longest = len(bounded_layers(model.config)), max(trace.row.fed for trace in traces)
    arms = {"full": RunConfig(get_method("full"), None), "all": RunConfig(method, budget)}
    arms |= {str(layer): RunConfig(method, alone(layer, layers, budget, longest, method.needs.recent))
             for layer in range(layers)}  # fmt: skip
    for name, config in arms.items():
        if name not in found["kl"]:
            found["kl"][name] = [round(one, 6) for one in losses(model, traces, config, statistics)]
            print(name, found["kl"][name], flush=True)
            write_atomically(given.out, (json.dumps(found) + "\n").encode())
    means = {name: sum(values) / len(values) for name, values in found["kl"].items()}
    found["shares"] = shares_of(means["full"], [means[str(layer)] for layer in range(layers)])


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
    print(f"--layer-shares {found['shares']}")


if __name__ == "__main__":
    main()
