"""`reasonkv methods` and `reasonkv doctor`: what there is, and whether it works here."""

from __future__ import annotations

from inspect import cleandoc
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reasonkv.cli import common
from reasonkv.cli.common import FAILED, expected_errors

if TYPE_CHECKING:
    from reasonkv.methods import Method

_COLUMNS = 100
"""Of the list of methods, where stdout is no terminal."""


@expected_errors
def methods(
    name: Annotated[str | None, typer.Argument(help="One method: its formula, and its options with defaults.")] = None,
    json: common.Json = False,
) -> None:
    """List the methods: what each keeps, what it needs, its paper; with a name, its formula and options.

    Methods of other packages, found by the entry point group [b]reasonkv.methods[/b], come last.

    Example: [b]reasonkv methods[/b]

    Example: [b]reasonkv methods snapkv[/b]
    """
    from reasonkv.methods import MethodError, method_names

    rows, broken = [], {}
    for one in method_names() if name is None else [name]:
        try:
            rows.append(_describe(one))
        except MethodError as error:
            if name is not None:
                raise
            broken[one] = str(error)
    if json:
        common.print_json(rows)
    elif name is not None:
        _print_one(rows[0])
    else:
        _print_all(rows)
    for sentence in broken.values():
        common.note(sentence)


def _describe(name: str) -> dict[str, Any]:
    """Everything about a method, by its name.

    Raises:
        MethodError: unknown, or of another package and not usable; one sentence.
    """
    from reasonkv.methods import CATALOGUE, MethodError, method_class

    if name in CATALOGUE:
        return _describe_class(method_class(name))
    try:
        found = method_class(name)
        facts = _describe_class(found)
    except MethodError:
        raise
    except Exception as error:  # another package's code: whatever it does must not take the list down
        words = " ".join(str(error).split()).rstrip(".")
        raise MethodError(
            f"The method {name!r} of another package cannot be used: {type(error).__name__}: {words}."
        ) from None
    if found.name != name:
        raise MethodError(
            f"The entry point {name!r} gives a method that calls itself {found.name!r}; give both the same name."
        )
    return facts


def _describe_class(cls: type[Method]) -> dict[str, Any]:
    from reasonkv.methods.sparse_read import SelectionMethod

    method = cls()
    needs = method.needs
    wanted = {
        "summaries of pages": issubclass(cls, SelectionMethod),
        f"{needs.queries} newest quer{'y' if needs.queries == 1 else 'ies'}": needs.queries,
        "every query": needs.observes,
        f"{needs.recent} newest slot{'' if needs.recent == 1 else 's'} kept": needs.recent,
        f"one choice per {needs.scope}": needs.scope != "head",
        "merges slots": needs.folds,
        "mass on logits (not on flash)": needs.log_mass,
        f"state per slot ({', '.join(needs.slot_state)})": needs.slot_state,
        "calibration": needs.calibration,
        "rotary embedding": needs.rotary,
        "token ids": needs.token_ids,
        "output projection": needs.output_projection,
        "the future (replay only)": needs.future,
    }
    return {
        "name": cls.name,
        "title": cls.title,
        "paper": cls.paper,
        "bounded": cls.bounded,
        "options": method.options(),
        "needs": [text for text, is_wanted in wanted.items() if is_wanted],
        **_runtimes(method),
        "summary": cleandoc(cls.__doc__ or ""),
    }


def _runtimes(method: Method) -> dict[str, Any]:
    """Where the method runs, with the option it needs there, and why not where it does not."""
    from reasonkv.runtimes.vllm.config import ServingError, vllm_variant

    try:
        served = vllm_variant(method)
    except ServingError as error:
        return {"runtimes": ["transformers"], "not_on": {"vllm": str(error)}}
    given = served.options()
    changed = [f"{key}={str(given[key]).lower()}" for key, value in method.options().items() if given[key] != value]
    return {"runtimes": ["transformers", f"vllm with {','.join(changed)}" if changed else "vllm"], "not_on": {}}


def _print_all(rows: list[dict[str, Any]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(header_style="bold", box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("method", no_wrap=True)
    for heading in ("keeps", "needs", "paper", "vllm"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        on_vllm = [one for one in row["runtimes"] if one.startswith("vllm")]
        said = "no" if not on_vllm else "yes" if on_vllm == ["vllm"] else "option"
        table.add_row(row["name"], row["title"], ", ".join(row["needs"]) or "-", row["paper"], said)
    Console(width=_COLUMNS if common.width() else None).print(table)
    typer.echo("All run on transformers; vllm: whether they run there, too, or with an option that NAME tells.")
    typer.echo("needs: with default options.")
    typer.echo("reasonkv methods NAME has a method's formula and options; give them as NAME:KEY=VALUE,KEY=VALUE.")


def _print_one(row: dict[str, Any]) -> None:
    typer.echo(f"{row['name']}: {row['title']} ({row['paper']})\n\n{row['summary']}\n")
    typer.echo(f"needs     {', '.join(row['needs']) or 'nothing but keys, values and positions'}")
    typer.echo(f"runtimes  {', '.join(row['runtimes'])}")
    for runtime, reason in row["not_on"].items():
        typer.echo(f"{'not ' + runtime:<10}{reason}")
    options = ",".join(f"{name}={value}" for name, value in row["options"].items())
    typer.echo(f"defaults  {row['name']}:{options}" if options else "defaults  it has no options")


@expected_errors
def doctor(
    model: Annotated[str | None, typer.Option(help="Also say whether this model is supported.")] = None,
    json: common.Json = False,
) -> None:
    """Say which versions and devices there are, and whether a model is supported.

    Exit code 1 when something needs attention.

    Example: [b]reasonkv doctor --model Qwen/Qwen3-8B[/b]
    """
    from reasonkv.doctor import examine

    common.quiet_libraries()
    report = examine(model)
    if json:
        common.print_json(report)
    else:
        for name, value in report.versions.items():
            typer.echo(f"{name:<14}{value}")
        for device in report.devices:
            typer.echo(f"{'device':<14}{device}")
        typer.echo(f"{'testbed':<14}{report.testbed}")
        for name, value in report.model.items():
            typer.echo(f"{name:<14}{value}")
        for problem in report.problems:
            typer.echo(f"problem: {problem}")
        typer.echo(report.advice)
    if report.problems:
        raise typer.Exit(FAILED)
