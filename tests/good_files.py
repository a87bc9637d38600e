"""Undamaged files of every kind that is read, and what the command line does with a results folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiny import TASK, save_tiny

from reasonkv.calibration import export_pt, load_calibration
from reasonkv.cli.mistakes import explain
from reasonkv.evaluate.frontier import read_comparable
from reasonkv.evaluate.job import BudgetOptions, GenerateJob, ReplayJob, TraceSettings
from reasonkv.evaluate.run import run
from reasonkv.evaluate.target import Target
from reasonkv.models import LoadedModel, load_model
from reasonkv.report.frontier import summarize_frontier
from reasonkv.report.inspector import inspector_page
from reasonkv.report.report import report_html
from reasonkv.report.sources import inspect_folder
from reasonkv.seer.gate import random_gate, save_gate

ROWS = [
    {"question": "What is 2 + 2?", "answer": "4", "wrong": "5"},
    {"question": "And 3?", "answer": ["3", 4], "wrong": "x"},
]
_BUDGET = BudgetOptions(tokens=(24, 32), interval=12, sinks=2, recent=8, prompt="count")
_COMMON: dict[str, Any] = {"task": (TASK,), "methods": ("random",), "limit": 2, "batch_size": 2, "budget": _BUDGET}
JOBS: dict[str, ReplayJob | GenerateJob] = {
    "replay": ReplayJob(**_COMMON, traces=TraceSettings(max_new_tokens=40)),
    "answers": GenerateJob(**_COMMON, max_new_tokens=40),
}


class Good:
    """Undamaged files of every kind, and the model that they belong to."""

    def __init__(self, place: Path) -> None:
        self.place = place
        model = save_tiny(place / "tiny")
        self.loaded: LoadedModel = load_model(str(model), device="cpu")
        for name, job in JOBS.items():
            run(job, self.loaded, place / name)
        inspect_folder(place / "replay", self.loaded, {}).save(place / "replay")
        self.calibration = model / "reasonkv_calibration.safetensors"
        export_pt(load_calibration(self.calibration), place / "a.pt")
        config = self.loaded.model.config
        heads = config.num_key_value_heads
        shape = (heads, config.num_attention_heads // heads, config.head_dim)
        self.gate = place / "gate.safetensors"
        save_gate(self.gate, random_gate([shape] * config.num_hidden_layers, 8, self.loaded.hash))
        (place / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)) + "\n")


def is_one_sentence(action: Callable[[], Any]) -> bool:
    """Return whether something worked; what failed must be an error that the command line puts into one line."""
    try:
        action()
    except Exception as error:  # a defect is raised again by `explain`
        sentence, code = explain(error, [])
        assert "\n" not in sentence and code in {1, 2}
        assert len(sentence) < 2000
        return False
    return True


def read_everything(folder: Path, loaded: LoadedModel) -> None:
    """Do with a results folder what the command line does."""
    is_one_sentence(lambda: report_html([folder]))

    def frontier() -> None:
        frame = read_comparable([folder])
        metric = "accuracy" if frame["kind"].iloc[0] == "evaluate" else "kl"
        found = summarize_frontier(frame, Target.parse("0.5", metric), "tokens")
        json.dumps(found.to_dict(), default=str)
        found.tables(), found.sentences()

    is_one_sentence(frontier)
    is_one_sentence(lambda: inspector_page(inspect_folder(folder, loaded, {}).data))


def write_lines(path: Path, rows: Any) -> None:
    path.write_text("".join(json.dumps(one) + "\n" for one in (rows if isinstance(rows, list) else [rows])))
