"""Flags of the command line, derived from the dataclasses of the Python API."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, make_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

from cyclopts import Group, Parameter, Token

from reasonkv.cli.console import note, quiet_libraries, show
from reasonkv.cli.mistakes import UsageError
from reasonkv.evaluate.job import split_specs
from reasonkv.numbers import KVDtype, misfit

if TYPE_CHECKING:
    from reasonkv.models import LoadedModel

GROUPS = {
    name: Group.create_ordered(title)
    for name, title in {
        "": "What to run", "Load": "Load", "TaskOptions": "Questions", "BudgetOptions": "Budget",
        "TraceSettings": "Traces", "Sampling": "Generation", "GateRecipe": "Training", "ModelFlags": "Model",
        "output": "Output",
    }.items()
}  # fmt: skip
"""Headings in `--help`, by the class whose fields stand under them."""
NAMES = {
    "task": ("--task", "--tasks"),
    "methods": ("--methods", "--method"),
    "import_": ("--import",),
    "BudgetOptions.tokens": ("--budgets", "--budget", "--tokens"),
    "BudgetOptions.prompt": ("--prompt-policy",),
    "TraceSettings.source": ("--traces",),
    "preset": ("--sampling",),
}
"""Flags whose names differ from their fields', in all classes or in one."""

Out = Annotated[
    Path, Parameter(group=GROUPS["output"], help="Results folder; the same command continues where it stopped.")
]
Json = Annotated[bool, Parameter(group=GROUPS["output"], help="Print one JSON document on stdout.", show_default=False)]
ConfigFile = Annotated[
    Path | None,
    Parameter(group=GROUPS["output"], help="YAML or JSON file of options, - for stdin; those on the command line win."),
]


class Without(tuple[str, ...]):
    """Names of fields that a command does not offer, in the annotation of its parameter."""


@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """Which model to load, and how.

    Args:
        model: The bundled testbed, a model folder, a .gguf file, a folder of a LoRA adapter, or a name on the Hugging
            Face hub.
        dtype: auto, float32, bfloat16, float16 or float64; of weights and cache.
        kv_dtype: What the slots of bounded methods are stored in; auto is the cache's dtype.
        device: auto, cpu, cuda, cuda:1, ...
        calibration: Query statistics, made by `reasonkv calibrate`. Unless given, looked up for the model.
        revision: Branch, tag or commit of the model on the hub.
        adapter: LoRA adapter, a folder or a name on the hub; it is merged into the weights.
        device_map: Where layers go, in place of --device: auto, balanced, or JSON such as {"model": 0, "lm_head": 1}.
    """

    model: str = "testbed"
    dtype: str = "auto"
    kv_dtype: Literal["auto", KVDtype] = "auto"
    device: str = "auto"
    calibration: Path | None = None
    revision: str | None = None
    adapter: str | None = None
    device_map: str | None = None

    def load(self) -> LoadedModel:
        """Load the model without the noise that its libraries make.

        Raises:
            ModelError: there is no such model, or it is damaged.
        """
        from reasonkv.models import load_model

        quiet_libraries()
        loaded = load_model(
            self.model, self.dtype, self.device, self.calibration,
            revision=self.revision, adapter=self.adapter, device_map=self.device_map,
        )  # fmt: skip
        return loaded if self.kv_dtype == "auto" else replace(loaded, kv_dtype=self.kv_dtype)


def load(model: ModelFlags, out: Path | None = None) -> LoadedModel:
    """Load a model, and note what runs where."""
    loaded = model.load()
    note(f"{loaded.name}: {loaded.dtype} on {loaded.device_name}" + (f"; results in {show(out)}" if out else ""))
    return loaded


def command(function: Callable[..., int | None]) -> Callable[..., int | None]:
    """Return a command whose parameters that are dataclasses are flags, one for each field.

    A parameter is annotated with the class, or with `Annotated[cls, Without(("field",))]`; the function is called with
    an instance.
    """
    hints = get_type_hints(function, include_extras=True)
    made: dict[str, tuple[type[Any], type[Any]]] = {}
    for name, hint in hints.items():
        cls, *marks = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        if isinstance(cls, type) and is_dataclass(cls):
            made[name] = cls, _flags(cls, next((one for one in marks if isinstance(one, Without)), ()))

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> int | None:
        given = {name: kwargs.get(name) or flags() for name, (_, flags) in made.items()}
        check_values(kwargs | given)
        return function(*args, **kwargs | {name: build(made[name][0], flags) for name, flags in given.items()})

    signature = inspect.signature(function)
    needed = {name for name, (_, flags) in made.items() for one in fields(flags)
              if one.default is MISSING and one.default_factory is MISSING}  # fmt: skip
    optional = {name: flags() for name, (_, flags) in made.items() if name not in needed}
    parameters = [one.replace(default=optional.get(one.name, one.default)) for one in signature.parameters.values()]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    plain = {name: Annotated[hint, Parameter(group=GROUPS[""])] for name, hint in hints.items() if name != "return"}
    plain |= {name: hint for name, hint in hints.items() if get_origin(hint) is Annotated}
    run.__annotations__ = plain | {name: Annotated[given, Parameter(name="*")] for name, (_, given) in made.items()}
    return run


def _flags(cls: type, without: Sequence[str]) -> type[Any]:
    """Return a dataclass with the fields, defaults and help of `cls` that marks each as a flag, and checks nothing."""
    hints, made = get_type_hints(cls), []
    for one in fields(cls):
        if one.name in without:
            continue
        kind: Any = hints[one.name]
        if isinstance(kind, type) and is_dataclass(kind):
            nested = _flags(kind, without)
            made.append((one.name, Annotated[nested, Parameter(name="*")], field(default_factory=nested)))
            continue
        several = get_origin(kind) is Sequence
        if several and get_args(kind)[0] not in {int, float}:
            kind = Sequence[str]  # specs; only Python can give objects
        parameter = Parameter(
            group=GROUPS.get(cls.__name__, GROUPS[""]),
            name=NAMES.get(f"{cls.__name__}.{one.name}", NAMES.get(one.name, ())),
            show_default=False if kind is bool or one.default == () else None,
        )
        parameter = Parameter.combine(parameter, SEVERAL if several else None)
        kept = field(default=one.default, default_factory=one.default_factory)
        made.append((one.name, Annotated[kind, parameter], kept))
    # cyclopts reads the help of each flag from the docstrings of the class and its bases, once help is asked for
    words = [{"__doc__": kind.__doc__, "__module__": __name__} for kind in cls.__mro__[:-1]]
    bases = tuple(type(cls.__name__, (), own) for own in words[1:])
    return make_dataclass(cls.__name__, made, bases=bases, kw_only=True, namespace=words[0])


def build(cls: type, given: Any) -> Any:
    """Return the instance of `cls` that flags stand for; `cls` checks the values."""
    hints, values = get_type_hints(cls), vars(given)
    return cls(**{name: build(hints[name], one) if is_dataclass(one) else one for name, one in values.items()})


def check_values(values: Mapping[str, Any], cls: str = "") -> None:
    """Raise where the value of a flag is a number or text that nothing can use: huge, not finite, no Unicode."""
    for name, value in values.items():
        if is_dataclass(value):
            check_values(vars(value), type(value).__name__)
            continue
        for one in value if isinstance(value, tuple) else (value,):
            if isinstance(one, (int, float, str)) and (wrong := misfit(one)) is not None:
                usual = (f"--{name.replace('_', '-')}",)
                flag = NAMES.get(f"{cls}.{name}", NAMES.get(name, usual))[0]
                raise UsageError(f"{flag} cannot be used: {wrong}.")


def _several(kind: Any, tokens: Sequence[Token]) -> tuple[Any, ...]:
    """Convert values separated by commas."""
    of = get_args(kind)[0]
    try:
        if of in {int, float}:
            values = [of(part) for token in tokens for part in token.value.split(",") if part.strip()]
        else:
            values = list(split_specs([token.value for token in tokens]))
    except ValueError:
        values = []
    if not values:
        what = {int: "whole numbers separated by commas, as in 128,256", float: "numbers separated by commas"}
        text = ",".join(token.value for token in tokens)
        raise UsageError(f"{tokens[0].keyword} takes {what.get(of, 'names separated by commas')}, not {text!r}.")
    return tuple(values)


SEVERAL = Parameter(
    converter=_several, n_tokens=1, show_default=lambda values: ",".join(map(str, values)) if values else "none"
)
