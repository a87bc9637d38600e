"""`reasonkv methods` and `reasonkv doctor`: what there is, and whether it works here."""

from __future__ import annotations

from inspect import cleandoc
from typing import TYPE_CHECKING, Any

from reasonkv.cli.console import note, print_json, print_list, quiet_libraries
from reasonkv.cli.flags import Json
from reasonkv.cli.mistakes import FAILED

if TYPE_CHECKING:
    from reasonkv.footprint import LayerKind
    from reasonkv.methods import Method


def methods(name: str | None = None, /, *, json: Json = False) -> None:
    """List the methods: what each keeps, its paper, whether vLLM runs it; with a name, its formula and options.

    Example: `reasonkv methods snapkv`

    Methods of other packages, found by the entry point group `reasonkv.methods`, come last.

    Args:
        name: One method, for its formula, needs and options.
    """
    from reasonkv.methods import MethodError, method_names

    if name is None and not json:
        _print_list()
        return
    rows = []
    for one in method_names() if name is None else [name]:
        try:
            rows.append(_describe(one))
        except MethodError as error:
            if name is not None:
                raise
            note(str(error))
    if json:
        print_json(rows)
    else:
        _print_one(rows[0])


def tasks(*, json: Json = False) -> None:
    """List the tasks that --task takes: bundled families, data of your own, named benchmarks, generators.

    Example: `reasonkv tasks`
    """
    from reasonkv.tasks import task_catalogue
    from reasonkv.tasks.gym import gym_names

    found, names = task_catalogue(), gym_names()
    if json:
        print_json({"tasks": found, "gym": names})
        return
    print_list(["--task", "what"], found.items())
    print(f"gym: {', '.join(names)}" if names else 'gym:NAME needs pip install "reasonkv[tasks]".')


def _print_list() -> None:
    """Print every method; only those of other packages are imported for it."""
    from reasonkv.methods import CATALOGUE, MethodError, method_names

    rows = []
    for name in method_names():
        if name in CATALOGUE:
            rows.append((name, *CATALOGUE[name][1:]))
            continue
        try:
            row = _describe(name)
        except MethodError as error:
            note(str(error))
        else:
            on_vllm = row["runtimes"][-1].removeprefix("vllm with ").replace("vllm", "yes")
            rows.append((name, row["title"], row["paper"], on_vllm.replace("transformers", "no")))
    print_list(["method", "keeps", "paper", "vllm"], rows, width=100)
    print("All run on transformers; vllm: whether vLLM runs them, too, or with which option.")
    print("reasonkv methods NAME has a method's formula and options; give them as NAME:KEY=VALUE,KEY=VALUE.")


def _describe(name: str) -> dict[str, Any]:
    """Return everything about a method.

    Raises:
        MethodError: unknown, or of another package and not usable.
    """
    from reasonkv.methods import CATALOGUE, MethodError, method_class

    try:
        cls = method_class(name)
        method = cls()
        return {
            "name": cls.name,
            "title": cls.title,
            "paper": cls.paper,
            "bounded": cls.bounded,
            "options": method.options(),
            "needs": _needs(method),
            **_runtimes(method),
            "summary": cleandoc(cls.__doc__ or ""),
        }
    except MethodError:
        raise
    except Exception as error:
        if name in CATALOGUE:
            raise
        words = " ".join(str(error).split()).rstrip(".")  # another package's code must not take the list down
        raise MethodError(
            f"The method {name!r} of another package cannot be used: {type(error).__name__}: {words}."
        ) from None


def _needs(method: Method) -> list[str]:
    needs = method.needs
    words = {
        "summaries of pages": needs.selects,
        f"{needs.queries} newest quer{'y' if needs.queries == 1 else 'ies'}": needs.queries,
        "every query": needs.observes,
        f"{needs.recent} newest slot{'' if needs.recent == 1 else 's'} kept": needs.recent,
        f"one choice per {needs.scope}": needs.scope != "head",
        "merges slots": needs.merges,
        "mass on logits (not on flash)": needs.log_mass,
        f"state per slot ({', '.join(needs.slot_state)})": needs.slot_state,
        "calibration": needs.calibration,
        "rotary embedding": needs.rotary,
        "token ids": needs.token_ids,
        "output projection": needs.output_projection,
        "the future (replay only)": needs.future,
    }
    return [text for text, is_needed in words.items() if is_needed]


def _runtimes(method: Method) -> dict[str, Any]:
    """Return where the method runs, with the option it needs there, and why not where it does not."""
    from reasonkv.runtimes.vllm.config import ServingError, vllm_variant

    try:
        served = vllm_variant(method)
    except ServingError as error:
        return {"runtimes": ["transformers"], "not_on": {"vllm": str(error)}}
    given = served.options()
    changed = [f"{key}={str(given[key]).lower()}" for key, value in method.options().items() if given[key] != value]
    return {"runtimes": ["transformers", f"vllm with {','.join(changed)}" if changed else "vllm"], "not_on": {}}


def _print_one(row: dict[str, Any]) -> None:
    print(f"{row['name']}: {row['title']} ({row['paper']})\n\n{row['summary']}\n")
    print(f"needs     {', '.join(row['needs']) or 'nothing but keys, values and positions'}")
    print(f"runtimes  {', '.join(row['runtimes'])}")
    for runtime, reason in row["not_on"].items():
        print(f"{'not ' + runtime:<10}{reason}")
    options = ",".join(f"{name}={value}" for name, value in row["options"].items())
    print(f"defaults  {row['name']}:{options}" if options else "defaults  it has no options")


def _print_layers(layers: list[LayerKind], budget: int) -> None:
    """Print what every kind of layer keeps, bytes of all layers of the kind."""
    from reasonkv.doctor import LONG

    heads = ["layers", "how many", "bounded", "bytes a token", "fixed KiB", "MiB at 32k", f"with {budget:,} tokens"]
    rows = [
        (
            one.kind + ("" if one.window is None else f", window {one.window:,}"), str(one.layers),
            "yes" if one.bounded else "stock", f"{one.bytes_per_token:,}", f"{one.bytes_fixed / 2**10:,.0f}",
            *(f"{one.bytes_at(LONG, most) / 2**20:,.1f}" for most in (None, budget)),
        )
        for one in layers
    ]  # fmt: skip
    print_list(heads, rows, right=True)


def doctor(*, model: str | None = None, budget: int = 1024, json: Json = False) -> int:
    """Say which versions and devices there are, and whether a model is supported; exit code 1 if something is wrong.

    Example: `reasonkv doctor --model Qwen/Qwen3-8B`

    For a model: a table of its layers, which of them a compressed cache bounds, and the memory that saves at 32k.

    Args:
        model: Also say whether this model is supported; only its configuration is read.
        budget: Tokens in each bounded layer, for the memory saved.
    """
    from reasonkv.doctor import examine

    quiet_libraries()
    report = examine(model, budget)
    if json:
        print_json(report)
    else:
        facts = [*report.versions.items(), *(("device", one) for one in report.devices)]
        for name, value in [*facts, ("testbed", report.testbed), *report.model.items()]:
            print(f"{name:<14}{value}")
        if report.layers:
            _print_layers(report.layers, budget)
        for problem in report.problems:
            print(f"problem: {problem}")
        print(report.advice)
    return FAILED if report.problems else 0
