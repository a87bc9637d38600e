"""How well do scores tell the attention to come? Rank correlation and mass, head by head, at the same compactions.

A cache evicts at random. At every compaction each method scores the slots that may go, and full KV's attention still to
come says how well it did. Also what models differ in: R = |mean of q| / mean of |q|, 1 where all queries before RoPE
point one way; the spread of value norms; and the share of the attention to come that goes to the first four tokens.

python benchmarks/foresight.py --model Qwen/Qwen2.5-Coder-0.5B-Instruct --calibration stats.safetensors
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reasonkv import CompressedCache, get_method
from reasonkv.calibration import load_calibration
from reasonkv.calibration.job import CalibrateJob
from reasonkv.evaluate.chunks import feed
from reasonkv.evaluate.fitting import own_answers
from reasonkv.evaluate.reference import FullAttention
from reasonkv.methods import Method, Requirements
from reasonkv.methods.base import Observed
from reasonkv.methods.ops import top_k_slots
from reasonkv.models import load_model
from reasonkv.plan import Plan
from reasonkv.tasks import get_task
from reasonkv.view import SlotView

RESULTS = Path(__file__).parent / "results" / "foresight.json"
JUDGED = (
    "random", "streaming", "knorm", "keydiff", "curdkv", "vase-dkv:window=32", "snapkv:window=32", "tova",
    "rkv:window=32", "scissorhands", "triattention:mode=per_layer_per_head", "expected", "forecast",
)  # fmt: skip
_SINKS = 4
_RING = 128  # queries, the most that one of them reads


@dataclass(frozen=True)
class Panel(Method):
    """Evicts at random, and notes for every judged method and head how well its scores tell the attention to come."""

    judged: tuple[str, ...] = JUDGED
    found: Any = field(default_factory=lambda: defaultdict(list))

    name = "panel"

    @property
    def needs(self) -> Requirements:
        """What any judged method needs."""
        return Requirements(queries=_RING, rotary=True, calibration=True, observes=True, future=True)

    def new_row_state(self, rows: int, query_heads: int, head_dim: int, device: torch.device) -> dict[str, Tensor]:
        """The moments of `expected`."""
        return get_method("expected").new_row_state(rows, query_heads, head_dim, device)

    def observe(self, state: dict[str, Tensor], seen: Observed) -> None:
        """As `expected` does."""
        get_method("expected").observe(state, seen)

    def plan(self, view: SlotView, keep: int) -> Plan:
        """Judge, and evict at random."""
        coming_BHN = view.future_attention_BHN("sum")
        free = ~view.is_protected_BHN
        chosen = Plan(top_k_slots(view.uniform_BHN(), keep, view.is_protected_BHN))
        if not bool((coming_BHN * free).sum(-1).gt(0).all()):  # the trace is over
            return chosen
        B, H = view.positions_BHN.shape[:2]
        coming_BHn = coming_BHN[free].view(B, H, -1)
        stay = keep - int((~free)[0, 0].sum())
        best_BH = coming_BHn.topk(stay, -1).values.sum(-1)
        norms_BHN, first_BHN = view.values_BHND.float().norm(dim=-1), view.positions_BHN < _SINKS
        facts = {
            "spread of value norms": norms_BHN.std(-1) / norms_BHN.mean(-1),
            "attention to the first four": (coming_BHN * first_BHN).sum(-1) / coming_BHN.sum(-1),
        }
        for name, fact_BH in facts.items():
            self.found[name, view.layer].append(fact_BH.mean(0)[None])
        for spec in self.judged:
            scores_BHn = _scores(spec, view, keep)[free].view(B, H, -1)
            held_BH = coming_BHn.gather(-1, scores_BHn.topk(stay, -1).indices).sum(-1) / best_BH
            self.found[spec, view.layer].append(
                torch.stack([_spearman(scores_BHn, coming_BHn).mean(0), held_BH.mean(0)])
            )
        return chosen


def _scores(spec: str, view: SlotView, keep: int) -> Tensor:
    """Return a method's scores [B, H, N] at a compaction; it sees as many of the newest queries as it asked for."""
    if spec in ("random", "streaming"):
        return view.uniform_BHN() if spec == "random" else view.positions_BHN.float()
    method: Any = get_method(spec)
    newest = method.needs.queries
    assert view.queries_BHqTD is not None and view.query_positions_BT is not None
    queries, positions = view.queries_BHqTD, view.query_positions_BT
    own = replace(view, queries_BHqTD=queries[:, :, -newest:], query_positions_BT=positions[:, -newest:])
    scores: Tensor = method._reduced_scores(own, keep) if spec.startswith("tri") else method.score(own)
    return scores.float()


def _spearman(one: Tensor, other: Tensor) -> Tensor:
    """Return Spearman's correlation over the last axis; equal numbers rank in any order."""
    ranks = [x.argsort(-1).argsort(-1).float() for x in (one, other)]
    centred = [x - x.mean(-1, keepdim=True) for x in ranks]
    products: Tensor = (centred[0] * centred[1]).sum(-1) / (centred[0].norm(dim=-1) * centred[1].norm(dim=-1))
    return products


def measure(name: str, calibration: Path, task: str, budget: int, limit: int, most: int) -> dict[str, Any]:
    """Return a row a method: quartiles over heads of both measures; and those of R."""
    loaded, statistics = load_model(name), load_calibration(calibration)
    judged = JUDGED if statistics.forecast is not None else JUDGED[:-1]
    panel = Panel(judged)
    job = CalibrateJob(task=(task,), limit=limit, window=most)
    rows = list(own_answers(job, loaded.model, loaded.tokenizer, [get_task(task)]))
    for first in range(0, len(rows), 8):
        batch = rows[first : first + 8]
        with CompressedCache(
            loaded.model, panel, tokens=budget, interval=budget // 2, calibration=statistics,
            prompt_lengths=[len(row.prompt_P) for row in batch], reference=FullAttention.collect(loaded.model, batch),
        ) as cache:  # fmt: skip
            for _ in feed(loaded.model, cache, batch, distances=cache.tokens_to_next_event, score=False):
                pass
    concentration = statistics.mean_LHqF.abs().sum(-1) / statistics.modulus_LHqF.sum(-1)
    methods = {}
    for name in dict.fromkeys(name for name, _ in panel.found):
        layers = [torch.stack(values).mean(0) for (own, _), values in sorted(panel.found.items()) if own == name]
        parts = [_quartiles(part) for part in torch.stack(layers).unbind(1)]
        methods[name] = dict(zip(("spearman", "held"), parts, strict=True)) if name in judged else parts[0]
    facts = {name: methods.pop(name) for name in [*methods] if name not in judged}
    about = {"model": loaded.name, "task": task, "budget": budget, "traces": len(rows)}
    return about | {"R": _quartiles(concentration)} | facts | {"methods": methods}


def _quartiles(x: Tensor) -> list[float]:
    """Return the quartiles and, last, the mean."""
    values = x.flatten().float()
    assert not math.isnan(float(values.sum()))
    return [round(float(one), 4) for one in (*values.quantile(torch.tensor([0.25, 0.5, 0.75])), values.mean())]


def main() -> None:
    """Parse, measure, and add a model to the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", type=Path, required=True, help="with networks: reasonkv calibrate --forecast")
    parser.add_argument("--task", default="gym:gsm_symbolic")
    parser.add_argument("--budget", type=int, default=64)
    parser.add_argument("--limit", type=int, default=16)
    parser.add_argument("--most", type=int, default=400, help="tokens of an answer")
    chosen = parser.parse_args()
    row = measure(chosen.model, chosen.calibration, chosen.task, chosen.budget, chosen.limit, chosen.most)
    others = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    kept = [one for one in others if (one["model"], one["task"]) != (row["model"], row["task"])]
    RESULTS.write_text(json.dumps([*kept, row], indent=1) + "\n")
    for name, one in (row | row["methods"]).items():
        if name != "methods":
            print(f"{name:40} {one}")


if __name__ == "__main__":
    main()
