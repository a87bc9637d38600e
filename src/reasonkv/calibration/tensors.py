"""Files of tensors with facts: safetensors whose header names a format and its version."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from reasonkv.errors import ReasonKVError
from reasonkv.files import write_atomically

VERSION = 1


def write_tensors(path: Path | str, what: str, tensors: dict[str, Tensor], facts: Mapping[str, object]) -> None:
    """Write a file of the format `reasonkv-{what}`, whole or not at all; facts that are None are left out.

    Raises:
        OSError: it cannot be written.
    """
    header = {"format": f"reasonkv-{what}", "version": VERSION, **facts}
    data = save(tensors, metadata={name: str(value) for name, value in header.items() if value is not None})
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(Path(path), data)


def read_tensors(
    path: Path | str, what: str, error: type[ReasonKVError], hint: str = ""
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return header and tensors of a file of the format `reasonkv-{what}`.

    Raises:
        error: it is missing, damaged (the message then ends with `hint`), something else, or of a later version.
    """
    if not Path(path).is_file():
        raise error(f"There is no {what} file {path}.")
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in list(file.keys())}
    except (OSError, SafetensorError):
        raise error(f"{path} cannot be read as a {what} file{hint}.") from None
    if header.get("format") != f"reasonkv-{what}":
        raise error(f"{path} is a safetensors file, but not a {what} of reasonkv.")
    version = header.get("version", "")
    if version.isdigit() and int(version) > VERSION:
        raise error(f"{path} has format version {version}, but this reasonkv reads versions up to {VERSION}.")
    return header, tensors
