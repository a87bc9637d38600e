"""`reasonkv inspect`: one trace's text with the fate of every token, as a page that needs no network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from reasonkv.cli.console import note, show
from reasonkv.cli.flags import GROUPS, ConfigFile, ModelFlags, Without, command
from reasonkv.cli.mistakes import UsageError
from reasonkv.evaluate.job import BudgetOptions, TraceSettings
from reasonkv.files import finite
from reasonkv.tasks.options import TaskOptions

FILES = Parameter(group=GROUPS["output"])


@command
def inspect(
    folder: Path | None = None,
    /,
    *,
    task: str | None = None,
    text: Path | None = None,
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
    first. Without a task, `--prompt TEXT` (or @FILE) is a question that full KV answers, `--text FILE` is a text that
    is fed as it stands, and `--traces FILE.jsonl` holds prompts and outputs of any engine (--example counts them).

    Args:
        folder: A results folder, whose traces and settings are used.
        task: A task, with dials; unless given, the folder's first, or program.
        text: A text to feed instead of an answer of full KV; with --prompt, as the answer to it.
        example: Number of the problem, or of the trace in a file.
        method: Method, with options; unless given, the folder's first, or rkv.
        generate: Let the compressed run write its own answer.
        seed: Seed of problems and methods.
        model: Unless given, the folder's, or the bundled testbed.
        out: The page to write.
        save: Also keep the data and the plans in this folder.
    """
    from reasonkv.cli.ready import rule_fields
    from reasonkv.evaluate.cells import make_config
    from reasonkv.evaluate.table import read_manifest
    from reasonkv.files import write_atomically
    from reasonkv.methods import refuse_future
    from reasonkv.report.inspector import Inspector, inspector_page
    from reasonkv.report.sources import inspect_folder, prompt_trace, task_trace, text_trace
    from reasonkv.tasks import get_task

    if text is not None and (folder or task or generate or traces.is_file):
        raise UsageError("--text is a trace of its own; leave the folder, --task, --traces and --generate out.")
    if traces.is_file and (folder or task or options.prompt):
        raise UsageError("A file of --traces has its own prompts; leave the folder, --task and --prompt out.")
    if folder is None:
        cell, at = make_config(method or "rkv", budget), example or 0
        task = f"traces:{traces.source}" if traces.is_file else task
        question = options.prompt if task is None else None
        task = task or "program"
        if question is not None:
            question, options = _file_or_text(question), replace(options, prompt=None)
        elif text is None:  # what is wrong with the choice is reported before the model loads
            get_task(task, options).problem(at, seed=seed)
        if generate:
            refuse_future(cell.method)
        loaded = replace(loading, model=model or "testbed").load()
        if text is not None:
            row, subject = text_trace(loaded, text, question, options)
        elif question is not None:
            row, subject = prompt_trace(loaded, question, seed, traces, options)
        else:
            row, subject = task_trace(loaded, task, at, seed, traces, options)
        inspector = Inspector(loaded, cell)
        made = inspector.generation(row, subject) if generate else inspector.replay(row, subject)
    else:
        if budget.window is not None or budget.keep or len(budget.tokens) > 1 or rule_fields(budget):
            raise UsageError("A results folder has its own budgets; choose one of its sizes by --budget TOKENS alone.")
        loaded = replace(loading, model=model or read_manifest(folder)["model"]["name"]).load()
        choices = {"task": task, "example": example, "method": method, "tokens": next(iter(budget.tokens), None)}
        made = inspect_folder(folder, loaded, choices | {"grade": options.grade}, generate=generate)
    write_atomically(out, inspector_page(made.data).encode())
    if (place := save or folder) is not None:
        note(f"Data and plans: {show(made.save(place))}")
    print(show(out))
    print(_summary(made.data))


def _file_or_text(given: str) -> str:
    if not given.startswith("@"):
        return given
    try:
        return finite(Path(given[1:]).expanduser()).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"The prompt {given[1:]} cannot be read ({error}).") from None


def _summary(data: Mapping[str, Any]) -> str:
    """Return two lines: what was kept, and what it did."""
    from reasonkv.report.inspector import title_of
    from reasonkv.report.wording import plural

    tokens, compactions = plural(len(data["pieces"]), "token"), plural(len(data["events"]["length"]), "compaction")
    kept = f"{title_of(data)}: {tokens}, {compactions}, {data['stats']['mean']:,.0f} slots on average."
    if data["kind"] == "generation":
        at = data["first_divergence"]
        part = "writes what full KV writes" if at is None else f"parts from full KV at output token {at:,}"
        said = f"The compressed run {part}"
    else:
        at = data["first_mismatch"]
        part = "everywhere" if at is None else f"in {data['stats']['agreement']:.1%} of places"
        said = f"Next tokens agree with full KV's {part}"
        said += "" if at is None else f" and first differ at output token {at:,}"
    words = {"full": "full KV's answer", "shown": "its answer"}
    verdicts = [f"{words[name]} is {'right' if one['correct'] else 'wrong'}"
                for name, one in reversed(data["answer"].items()) if one and one["correct"] is not None]  # fmt: skip
    return f"{kept}\n{'; '.join([said, *verdicts])}."
