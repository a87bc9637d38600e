"""`reasonkv inspect`: one trace's text with the fate of every token, as a page that needs no network."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reasonkv.cli import common
from reasonkv.cli.budgets import make_budget, make_window
from reasonkv.cli.common import UsageError, expected_errors

if TYPE_CHECKING:
    from reasonkv.budget import Budget
    from reasonkv.evaluate.replay import Cell
    from reasonkv.evaluate.results import Results
    from reasonkv.evaluate.traces import Trace
    from reasonkv.models import LoadedModel
    from reasonkv.report.inspector import Inspection


@expected_errors
def inspect(
    folder: Annotated[
        Path | None, typer.Argument(help="A results folder, whose traces and settings are used.", show_default=False)
    ] = None,
    model: Annotated[str | None, typer.Option(help="As elsewhere; default: the folder's, or testbed.")] = None,
    task: Annotated[str | None, typer.Option(help="A task, with dials; default: program.")] = None,
    example: Annotated[int | None, typer.Option(help="Number of the problem.")] = None,
    method: Annotated[str | None, typer.Option(help="Method, with options; default: rkv.")] = None,
    budget: Annotated[int | None, typer.Option(help="Slots per KV head and layer after a compaction.")] = None,
    generate: Annotated[bool, typer.Option("--generate", help="Let the compressed run write its own answer.")] = False,
    out: Annotated[Path, typer.Option(help="The page.")] = Path("reasonkv-inspect.html"),
    save: Annotated[Path | None, typer.Option(help="Also keep the data and the plans in this folder.")] = None,
    seed: common.Seed = 0,
    window: common.WindowSize = None,
    window_buffer: common.WindowBuffer = 64,
    retention: common.Retention = "0.3",
    interval: common.Interval = 128,
    sinks: common.Sinks = 4,
    recent: common.Recent = 64,
    prompt_policy: common.PromptPolicy = "count",
    trigger: common.Trigger = "occupancy",
    trigger_counts: common.TriggerCounts = "all",
    cut_prompt: common.CutPrompt = "prefill",
    prefill_chunk: common.PrefillChunk = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most output tokens of full KV's trace.")] = 2048,
    calibration: common.CalibrationFile = None,
    dtype: common.Dtype = "auto",
    device: common.Device = "auto",
) -> None:
    """See which tokens a method kept while the model reasoned, and what that did to the answer.

    Of a results folder without further choices: the first bounded method and budget, and the example that went wrong
    first.

    Example: [b]reasonkv inspect --task program --example 3 --method rkv --budget 128 --generate[/b]
    """
    if folder is not None:
        from reasonkv.evaluate.results import load_results

        if window is not None:
            raise UsageError("A results folder has its own windows; leave --window out, or leave the folder out.")
        name = model or load_results(folder).manifest["model"]["name"]
        loaded = common.open_model(name, dtype, device, calibration)
        made = folder_inspection(folder, loaded, task, example, method, budget, generate)
    else:
        fields = {
            "interval": interval, "sinks": sinks, "recent": recent, "prompt": prompt_policy, "trigger": trigger,
            "trigger_counts": trigger_counts, "cut_prompt": cut_prompt, "prefill_chunk": prefill_chunk,
        }  # fmt: skip
        limits = None if window is None else make_window(window, window_buffer, retention)
        cell = _new_cell(method or "rkv", budget, fields, limits, generate)
        made = _fresh(
            (model or "testbed", dtype, device, calibration),
            task or "program", example or 0, cell, generate, seed, max_new_tokens,
        )  # fmt: skip
    _write(made, out, save if save is not None else folder)


def _new_cell(method: str, budget: int | None, fields: dict[str, Any], window: Budget | None, generate: bool) -> Cell:
    from reasonkv.evaluate.replay import Cell
    from reasonkv.methods import get_method, refuse_future

    chosen = get_method(method)
    if budget is not None and window is not None:
        raise UsageError("Give either --budget or --window.")
    if chosen.bounded == (budget is None and window is None):
        raise UsageError(
            f"{chosen.name} needs a budget; give --budget TOKENS (or --window SIZE)."
            if chosen.bounded
            else f"{chosen.name} takes no budget; leave --budget out, or choose another --method."
        )
    if generate:
        refuse_future(chosen)
    limits = window if budget is None else make_budget(budget, **fields)
    if limits is not None:
        limits.check_protected(recent=chosen.needs.recent)
    return Cell(chosen, limits)


def _fresh(
    model: common.ModelChoice, task: str, example: int, cell: Cell, generate: bool, seed: int, most: int
) -> Inspection:
    from reasonkv.evaluate.traces import TraceSettings, load_or_make_traces
    from reasonkv.models import one_thread_if_small
    from reasonkv.report.inspector import inspect_generation, inspect_replay
    from reasonkv.tasks import get_task

    family = get_task(task)
    family.problem(example, seed=seed)  # what is wrong with the choice is said before the model loads
    loaded = common.open_model(*model)
    with tempfile.TemporaryDirectory() as place, one_thread_if_small(loaded.model):
        (trace,) = load_or_make_traces(
            loaded.model, loaded.tokenizer, family, task_spec=task, examples=[example], seed=seed,
            settings=TraceSettings(max_new_tokens=most), folder=Path(place), batch_size=1,
        )  # fmt: skip
    run = inspect_generation if generate else inspect_replay
    return run(loaded, trace, cell, task=task, seed=seed)


def folder_inspection(
    folder: Path,
    loaded: LoadedModel,
    task: str | None = None,
    example: int | None = None,
    method: str | None = None,
    budget: int | None = None,
    generate: bool = False,
) -> Inspection:
    """The inspection of one run of a results folder: of the first cell that fits the choices, what went wrong first."""
    from reasonkv.budget import Budget
    from reasonkv.evaluate.generate import Sampling
    from reasonkv.evaluate.replay import Cell
    from reasonkv.evaluate.results import load_results
    from reasonkv.methods import get_method
    from reasonkv.report.inspector import inspect_generation, inspect_replay

    results = load_results(folder)
    record = _record(results, task, example, method, budget)
    options = ",".join(f"{key}={value}" for key, value in record.options.items())
    cell = Cell(get_method(f"{record.method}:{options}"), Budget.from_dict(record.budget))
    if loaded.hash != results.manifest["model"]["hash"]:
        raise UsageError(f"{folder} was made with other weights of {results.manifest['model']['name']}; give --model.")
    trace = _trace(results, loaded, record)
    if results.answers or generate:
        sampling = results.manifest["arguments"].get("sampling")
        return inspect_generation(
            loaded, trace, cell, task=record.task, seed=record.seed, sample=getattr(record, "sample", 0),
            sampling=Sampling(**sampling) if sampling else None,
            max_new_tokens=results.manifest["arguments"].get("max_new_tokens"),
        )  # fmt: skip
    return inspect_replay(loaded, trace, cell, task=record.task, seed=record.seed)


def _record(results: Results, task: str | None, example: int | None, method: str | None, budget: int | None) -> Any:
    """The record to look at: of the first bounded cell that fits the choices, the one that went wrong first."""
    from reasonkv.methods import get_method

    wanted = None if method is None else get_method(method)
    every: list[Any] = [*results.records, *results.answers]
    fitting = [
        record
        for record in every
        if record.budget is not None
        and (task is None or record.task == task)
        and (example is None or record.example == example)
        and (budget is None or record.budget["tokens"] == budget)
        and (wanted is None or (record.method == wanted.name and record.options == wanted.options()))
    ]
    if not fitting:
        raise UsageError(
            f"{results.folder} holds no bounded run with these choices; "
            "leave --method, --budget, --task or --example out."
        )
    first = fitting[0]

    def cell_of(record: Any) -> tuple[Any, ...]:
        return record.method, record.options, record.budget, record.task

    cell = [record for record in fitting if cell_of(record) == cell_of(first)]

    def order(record: Any) -> tuple[bool, bool, int]:
        if results.answers:
            at = record.first_divergence
            return record.correct, at is None, at or 0
        return False, record.first_mismatch is None, record.first_mismatch or 0

    return min(cell, key=order)


def _trace(results: Results, loaded: LoadedModel, record: Any) -> Trace:
    """Full KV's trace of a record, from the folder."""
    import torch

    from reasonkv.evaluate.outputs import Outputs
    from reasonkv.evaluate.traces import (
        Trace,
        TraceSettings,
        encode_prompts,
        load_or_make_traces,
        reference_logprobs,
    )
    from reasonkv.tasks import get_task

    family = get_task(record.task)
    if not results.answers:
        settings = TraceSettings(**results.manifest["arguments"]["traces"])
        (trace,) = load_or_make_traces(
            loaded.model, loaded.tokenizer, family, task_spec=record.task, examples=[record.example],
            seed=record.seed, settings=settings, folder=results.folder, batch_size=1,
        )  # fmt: skip
        return trace
    problem = family.problem(record.example, seed=record.seed)
    (prompt_P,) = encode_prompts(loaded.model, loaded.tokenizer, family, [problem])
    outputs = Outputs(results.folder, record.task)
    if (record.example, record.sample) not in outputs:
        raise UsageError(f"{results.folder} lacks full KV's output of example {record.example}; run its command again.")
    output_T = torch.tensor(outputs[record.example, record.sample].tokens)
    (reference,) = reference_logprobs(loaded.model, [prompt_P], [output_T])
    right = family.check(problem, str(loaded.tokenizer.decode(output_T, skip_special_tokens=True)))
    return Trace(record.example, prompt_P, output_T, reference, right)


def _write(made: Inspection, out: Path, keep: Path | None) -> None:
    from reasonkv.evaluate.fates import save_plans
    from reasonkv.files import write_atomically
    from reasonkv.report.inspector import inspector_page, save_inspection

    write_atomically(out, inspector_page(made.data).encode())
    if keep is not None:
        data = save_inspection(keep, made.data)
        save_plans(data.with_suffix(".plans.safetensors"), made.plans)
        common.note(f"Data and plans: {common.show(data)}")
    typer.echo(common.show(out))
    typer.echo(_summary(made.data))


def _summary(data: dict[str, Any]) -> str:
    """Two lines: what was held, and what it did."""
    from reasonkv.report.wording import size_words

    slots = "full KV" if data["budget"] is None else f"{data['method']} at {size_words(data['budget'])}"
    held = f"{slots} on {data['task']}, example {data['example']}: {len(data['pieces']):,} tokens, "
    held += f"{len(data['events']['length'])} events, {data['stats']['mean']:,.0f} slots on average."
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
    return f"{held}\n{answer}; full KV's answer is {words[data['answer']['full']['correct']]}."
