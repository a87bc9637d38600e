"""`reasonkv inspect`: one trace's text with the fate of every token, as a page that needs no network."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from reasonkv.cli.console import note, show
from reasonkv.cli.flags import GROUPS, ConfigFile, ModelFlags, Without, command
from reasonkv.cli.mistakes import UsageError
from reasonkv.evaluate.job import BudgetOptions, TraceSettings
from reasonkv.tasks.options import TaskOptions

if TYPE_CHECKING:
    from reasonkv.report.inspector import Inspection

FILES = Parameter(group=GROUPS["output"])


@command
def inspect(
    folder: Path | None = None,
    /,
    *,
    task: str | None = None,
    example: int | None = None,
    method: str | None = None,
    budget: Annotated[BudgetOptions, Without(("mean_slots",))],
    traces: TraceSettings,
    options: TaskOptions,
    generate: bool = False,
    seed: int = 0,
    model: Annotated[str | None, Parameter(group=GROUPS["ModelFlags"])] = None,
    loading: Annotated[ModelFlags, Without(("model",))],
    out: Annotated[Path, FILES] = Path("reasonkv-inspect.html"),
    save: Annotated[Path | None, FILES] = None,
    config: ConfigFile = None,
) -> None:
    """See which tokens a method kept while the model reasoned, and what that did to the answer.

    Example: `reasonkv inspect --task program --example 3 --method rkv --budget 128 --generate`

    Of a results folder without further choices: the first bounded method and budget, and the example that went wrong
    first.

    Args:
        folder: A results folder, whose traces and settings are used.
        task: A task, with dials; unless given, the folder's first, or program.
        example: Number of the problem.
        method: Method, with options; unless given, the folder's first, or rkv.
        generate: Let the compressed run write its own answer.
        seed: Seed of problems and methods.
        model: Unless given, the folder's, or the bundled testbed.
        out: The page to write.
        save: Also keep the data and the plans in this folder.
    """
    from reasonkv.evaluate.fates import save_plans
    from reasonkv.evaluate.table import read_manifest
    from reasonkv.files import write_atomically
    from reasonkv.report.folder import inspect_folder
    from reasonkv.report.inspector import inspector_page, save_inspection

    if folder is None:
        loading = replace(loading, model=model or "testbed")
        made = _inspect_new(
            loading, task or "program", example or 0, method or "rkv", budget, traces, generate, seed, options
        )
    else:
        if budget.window is not None or budget.keep or len(budget.tokens) > 1:
            raise UsageError("A results folder has its own budgets; choose one of its sizes by --budget TOKENS.")
        loaded = replace(loading, model=model or read_manifest(folder)["model"]["name"]).load()
        choices = {"task": task, "example": example, "method": method, "tokens": next(iter(budget.tokens), None)}
        made = inspect_folder(folder, loaded, choices, generate=generate)
    write_atomically(out, inspector_page(made.data).encode())
    if (place := save or folder) is not None:
        data = save_inspection(place, made.data)
        save_plans(data.with_suffix(".plans.safetensors"), made.plans)
        note(f"Data and plans: {show(data)}")
    print(show(out))
    print(_summary(made.data))


def _inspect_new(
    model: ModelFlags,
    task: str,
    example: int,
    method: str,
    budget: BudgetOptions,
    traces: TraceSettings,
    generate: bool,
    seed: int,
    options: TaskOptions,
) -> Inspection:
    from reasonkv.evaluate.cells import make_config
    from reasonkv.evaluate.traces import load_or_make_traces
    from reasonkv.methods import refuse_future
    from reasonkv.models import one_thread_if_small
    from reasonkv.report.inspector import inspect_generation, inspect_replay
    from reasonkv.tasks import get_task

    cell, family = make_config(method, budget), get_task(task, options)
    family.problem(example, seed=seed)  # what is wrong with the choice is reported before the model loads
    if generate:
        refuse_future(cell.method)
    loaded = model.load()
    with tempfile.TemporaryDirectory() as place, one_thread_if_small(loaded.model):
        (trace,) = load_or_make_traces(
            loaded.model, loaded.tokenizer, family, task_spec=task, examples=[example], seed=seed, settings=traces,
            folder=Path(place), batch_size=1, options=options,
        )  # fmt: skip
    return (inspect_generation if generate else inspect_replay)(
        loaded, trace, cell, task=task, seed=seed, options=options
    )


def _summary(data: Mapping[str, Any]) -> str:
    """Return two lines: what was kept, and what it did."""
    from reasonkv.report.wording import size_words

    what = "full KV" if data["budget"] is None else f"{data['method']} at {size_words(data['budget'])}"
    kept = f"{what} on {data['task']}, example {data['example']}: {len(data['pieces']):,} tokens, "
    kept += f"{len(data['events']['length'])} compactions, {data['stats']['mean']:,.0f} slots on average."
    words = {True: "right", False: "wrong"}
    if data["kind"] == "generation":
        at = data["first_divergence"]
        part = "writes what full KV writes" if at is None else f"parts from full KV at output token {at:,}"
        answer = f"The compressed run {part}; its answer is {words[data['answer']['shown']['correct']]}"
    else:
        at = data["first_mismatch"]
        part = "everywhere" if at is None else f"in {data['stats']['agreement']:.1%} of places"
        answer = f"Next tokens agree with full KV's {part}"
        answer += "" if at is None else f" and first differ at output token {at:,}"
    return f"{kept}\n{answer}; full KV's answer is {words[data['answer']['full']['correct']]}."
