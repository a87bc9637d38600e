"""`reasonkv run plan.yaml`: many models, tasks, methods, budgets and seeds, each cell of them a folder that resumes."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from reasonkv.cli import make_app
from reasonkv.cli.config import parse_options, read_options
from reasonkv.cli.console import note, print_json, print_tables, progress_bars, show
from reasonkv.cli.flags import GROUPS, Json, ModelFlags, build, command
from reasonkv.cli.mistakes import FAILED, UsageError
from reasonkv.evaluate.job import GenerateJob, ReplayJob

if TYPE_CHECKING:
    from reasonkv.evaluate.plan import Cell, Group

JOBS: Mapping[str, type[ReplayJob] | type[GenerateJob]] = {"replay": ReplayJob, "evaluate": GenerateJob}
SETTINGS = ("runs", "command", "name", "models", "seeds", "out")
"""Keys of a plan that are no options of its command."""


@command
def run(
    plan: Path,
    /,
    *,
    out: Annotated[Path | None, Parameter(group=GROUPS["output"])] = None,
    dry_run: bool = False,
    ray: str = "auto",
    cores: int | None = None,
    json: Json = False,
) -> int:
    """Run a plan of replays and evaluations: models x tasks x methods x budgets x seeds.

    Example: `reasonkv run plan.yaml --dry-run`

    Every cell (one method at one budget on one task) is a results folder. The same command continues a plan that was
    stopped. A cell that fails is listed at the end and stops no other. The cells of a job are then merged into one
    folder for `report`, `frontier`, `inspect` and `compare`.

    Args:
        plan: YAML or JSON file; - reads standard input.
        out: Folder of the results. Unless given, the plan's `out`, or its name without the suffix.
        dry_run: Load each model, measure its speed, and print cells, tokens, bytes and hours instead of running.
        ray: auto - on Ray where it is installed and the machine has room for several cells at once; off - one cell
            after the other; or the address of a Ray cluster.
        cores: Cores per cell where there is no GPU. Unless given, 8, or all of a smaller machine.
    """
    own = os.cpu_count() or 1
    if cores is not None and not 1 <= cores <= own:
        raise UsageError(f"--cores must be 1 to {own}, the cores of this machine, not {cores}.")
    cores = cores or min(8, own)
    options = read_options(str(plan), "reasonkv run")
    for key in ("name", "out"):
        if not isinstance(options.get(key, ""), str):
            raise UsageError(f"{key} in {plan} must be a text.")
    place = Path(out or options.get("out") or plan.stem).absolute()  # for workers in other folders
    groups = make_groups(options, place, str(plan))
    cells = list({cell.folder: cell for group in groups for cell in group.cells}.values())
    waiting = [cell for cell in cells if not cell.is_done]
    workers, why = how_many_workers(ray, cores)
    note(f"{len(cells)} cells, {len(cells) - len(waiting)} of them done; results in {show(place)}. {why}")
    if dry_run:
        return _estimate(groups, workers, json)
    failed = _run_cells(waiting, None if why.startswith("One") else ray, cores)
    merged = [group for group in groups if group.merge()]
    if json:
        causes = [{"cell": cell.words, "folder": cell.folder, "cause": cause} for cell, cause in failed]
        folders = [group.folder for group in merged]
        print_json({"out": place, "cells": len(cells), "folders": folders, "failed": causes})
    else:
        _print_results(merged)
        for cell, cause in failed:
            print(f"Failed: {cell.words}: {cause}")
    return FAILED if failed else 0


def make_groups(plan: Mapping[str, Any], out: Path, name: str) -> list[Group]:
    """Return what a plan runs, model by model.

    Args:
        plan: options of `replay` or `evaluate` as in a `--config` file, and the keys in `SETTINGS`; an entry of `runs`
            stands for the plan with its own keys on top.
        out: folder of the results.
        name: of the plan, for errors.

    Raises:
        UsageError: a plan that cannot be read.
        ReasonKVError: an option, method or budget that does not exist.
    """
    from reasonkv.evaluate.plan import make_group

    shared = {key: value for key, value in plan.items() if key != "runs"}
    entries = _listed(plan.get("runs")) or [{}]
    if not all(isinstance(one, dict) for one in entries):
        raise UsageError(f"runs in {name} takes a list of options, as in `- command: replay`.")
    groups = []
    for own in ({**shared, **one} for one in entries):
        kind = own.get("command", "replay")
        if not isinstance(kind, str) or kind not in JOBS:
            raise UsageError(f"command in {name} must be replay or evaluate, not {kind!r}.")
        for model in _listed(own.get("models")) or ["testbed"]:
            flags = model if isinstance(model, dict) else {"model": model}
            options = {key: value for key, value in own.items() if key not in SETTINGS} | flags
            given = parse_options(make_app(), kind, options, name)
            source, job = build(ModelFlags, given["model"]), build(JOBS[kind], given["job"])
            for seed in _listed(own.get("seeds")) or [job.seed]:
                if not isinstance(seed, int) or isinstance(seed, bool):
                    raise UsageError(f"seeds in {name} are whole numbers, not {seed!r}.")
                groups.append(make_group(str(own.get("name", kind)), source, job, seed, out))
    folders = [group.folder for group in groups]
    if len(set(folders)) < len(folders):
        raise UsageError(f"Two runs in {name} would write one folder; give each of them a name of its own.")
    order = list(dict.fromkeys(group.cells[0].source for group in groups))
    return sorted(groups, key=lambda group: order.index(group.cells[0].source))  # a model is loaded once


def _listed(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list) else [value]


def how_many_workers(ray: str, cores: int) -> tuple[int, str]:
    """Return how many cells run at once here, and how in words."""
    import importlib.util

    import torch

    if ray not in {"auto", "off"}:
        return 1, f"On the Ray cluster at {ray}."
    gpus = torch.cuda.device_count()
    room = gpus or (os.cpu_count() or 1) // cores
    if ray == "off" or room < 2:
        return 1, "One cell after the other."
    if importlib.util.find_spec("ray") is None:
        return 1, f'One cell after the other; {room} at once need Ray: pip install "reasonkv[ray]".'
    return room, f"On Ray, {room} cells at once."


def _run_cells(cells: Sequence[Cell], ray: str | None, cores: int) -> list[tuple[Cell, str]]:
    """Run cells and note each as it ends; return those that failed, and why."""
    from reasonkv.evaluate.plan import run_in_turn, run_on_ray

    failed: list[tuple[Cell, str]] = []
    began, ended = time.monotonic(), 0

    def tell(cell: Cell, cause: str | None) -> None:
        nonlocal ended
        ended += 1
        note(f"[{ended}/{len(cells)}] {cell.words}: {cause or 'done'} ({time.monotonic() - began:,.0f} s)")
        if cause is not None:
            failed.append((cell, cause))

    if not cells:
        return failed
    if ray is None:
        with progress_bars(sum(1 + (cell.full is None and isinstance(cell.job, ReplayJob)) for cell in cells)) as bars:
            run_in_turn(cells, tell, bars)
    else:
        run_on_ray(cells, tell, cores=cores, address=None if ray == "auto" else ray)
    return failed


def _print_results(groups: Sequence[Group]) -> None:
    from reasonkv.evaluate.sanity import sanity_warnings
    from reasonkv.evaluate.table import read_results, summarize
    from reasonkv.report.terminal import answers_tables, replay_tables

    for group in groups:
        frame = read_results([group.folder])
        tables, warnings = replay_tables, list[str]()
        if isinstance(group.job, GenerateJob):
            tables, warnings = answers_tables, sanity_warnings(frame)
        print(show(group.folder))
        print_tables(tables(summarize(frame)), warnings=warnings)


def _estimate(groups: Sequence[Group], workers: int, json: bool) -> int:
    """Print what is left of each group."""
    from dataclasses import asdict

    from reasonkv.evaluate.estimate import estimate
    from reasonkv.report.terminal import make_table
    from reasonkv.report.wording import amount

    found = [(group, estimate(group)) for group in groups if not all(cell.is_done for cell in group.cells)]
    hours = sum(one.seconds for _, one in found) / 3600 / workers
    if json:
        rows = [{"folder": group.folder, **asdict(one)} for group, one in found]
        print_json({"groups": rows, "workers": workers, "hours": hours})
        return 0
    table = make_table(
        "What is left", ["folder"],
        ["cells", "tokens fed", "tokens decoded", "KV cache at once", "prompt tok/s", "decode tok/s", "hours"],
        [
            [group.folder.name, str(one.cells), f"{one.prompt_tokens:,}", f"{one.output_tokens:,}",
             amount(one.bytes_peak, "bytes_held"), f"{one.rates.prompt:,.0f}", f"{one.rates.decode:,.0f}",
             f"{one.seconds / 3600:.2f}"]
            for group, one in found
        ],
    )  # fmt: skip
    print_tables(
        [table],
        "At most: answers and traces may end before their limit. Rates are full KV's, measured now on a batch of short "
        "prompts. A full KV shared by several folders is counted in each.",
        f"{hours:.2f} hours on {workers} worker{'s' if workers > 1 else ''}.",
    )
    return 0
