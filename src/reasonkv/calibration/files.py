"""Calibration files, and where a model's file is found.

A calibration file is safetensors. It holds `mean_real`, `mean_imag`, `modulus` and, where known, `square`, each float32
[layers, query heads, rotary pairs]; where fitted, `horizon` [layers, query heads, distances]; a `reasonkv.network`
in float16, `forecast.hidden` and so on; and `norms`, by which a model is known. All else is text in the header.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel

from reasonkv.calibration.statistics import Calibration, CalibrationError
from reasonkv.errors import ReasonKVError
from reasonkv.files import write_atomically
from reasonkv.identity import TESTBED_FOLDER, model_hash, norm_weights, shown_name
from reasonkv.inputs import Count
from reasonkv.network import Network

FILE = "reasonkv_calibration.safetensors"
"""Name of a calibration file inside a model folder."""
SHIPPED = Path(__file__).parent / "shipped"
"""Where the calibrations stand that come with the package."""
_VERSION = 1
_FORECAST = "forecast."


class _Header(BaseModel):
    """The facts of a calibration in the header, all written as texts; each is a field of `Calibration`, too."""

    head_dim: Annotated[int, Field(ge=1, le=65536)]
    verified: bool = False
    tokens: Count | None = None
    model: str | None = None
    rope_type: str | None = None
    frequencies: str | None = None
    date: str | None = None
    layer_shares: str | None = None
    name: str | None = None
    source: str | None = None


def save_calibration(path: Path | str, calibration: Calibration) -> None:
    """Write a calibration file, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    facts = {
        "layers": calibration.layers, "query_heads": calibration.query_heads,
        **{name: getattr(calibration, name) for name in _Header.model_fields},
        "verified": str(calibration.verified).lower(),
    }  # fmt: skip
    write_tensors(path, "calibration", parts_of(calibration), facts)


def load_calibration(path: Path | str) -> Calibration:
    """Read a calibration file.

    Raises:
        CalibrationError: it is missing, damaged, something else, or of a later version.
    """
    hint = f"; import it with `reasonkv calibrate --import {path}`" if Path(path).suffix == ".pt" else ""
    header, parts = read_tensors(path, "calibration", CalibrationError, hint)
    try:
        facts = _Header.model_validate(header).model_dump()
        return assembled(parts, facts.pop("head_dim"), **facts)
    except CalibrationError as error:
        raise CalibrationError(f"{path} is damaged: {error}") from None
    except (KeyError, ValueError, RuntimeError):  # a tensor or a fact is missing, or of the wrong kind
        raise CalibrationError(f"{path} is damaged: its header and its tensors do not fit together.") from None


def find_calibration(model: PreTrainedModel, explicit: Path | str | None = None) -> Calibration:
    """Return a model's calibration, checked against its shapes and rotary frequencies.

    Looked for in this order: `explicit`; `reasonkv_calibration.safetensors` in the model's folder; the user's cache,
    under the model's hash; the bundled model's own, which also serves copies of that model elsewhere; the newest of the
    user's cache that fits, such as that of the model before it was quantised; those that come with the package. Warns
    where it was made with other weights.

    Raises:
        CalibrationError: there is none (the message is the command that makes one), or what was found is damaged or
            another model's.
    """
    digest, norms = model_hash(model), norm_weights(model)
    path = find_file(model, digest, FILE, load_calibration, explicit, cached_calibration(digest))
    path = path or _alike(model, norms)
    if path is None:
        raise CalibrationError(
            f"There is no calibration for this model; make one with "
            f"`reasonkv calibrate --model {shown_name(model)} --text FILE`, where FILE is any long plain text."
        )
    found = load_calibration(path)
    try:
        found.check(model.config, digest)
    except CalibrationError as error:
        sentence = str(error)
        raise CalibrationError(f"{path} does not fit this model: {sentence[0].lower()}{sentence[1:]}") from None
    if found.model not in (None, digest) and not found.is_of(norms):
        message = (
            f"{path} was made with other weights of the same shapes{f' ({found.name})' if found.name else ''}; "
            "`reasonkv calibrate` makes statistics of these."
        )
        warnings.warn(message, stacklevel=2)
    return found


def shipped_for(name: str) -> Path | None:
    """Return the file that comes with the package for a model of this name on the hub; None without one."""
    path = SHIPPED / f"{name.lower().replace('/', '--')}.safetensors"
    return path if path.is_file() else None


def cached_calibration(digest: str) -> Path:
    """Return where the user's cache keeps the calibration of the model with this hash, whether or not it exists.

    The cache is `REASONKV_CACHE` if set, otherwise `reasonkv` in `XDG_CACHE_HOME` or `~/.cache`.
    """
    own, shared = os.environ.get("REASONKV_CACHE"), os.environ.get("XDG_CACHE_HOME")
    root = Path(own).expanduser() if own else (Path(shared) if shared else Path.home() / ".cache") / "reasonkv"
    return root / "calibration" / f"{digest}.safetensors"


def _alike(model: PreTrainedModel, norms: Tensor | None) -> Path | None:
    """Return the newest calibration of the user's cache, or one that comes with the package, that fits a model.

    Shapes and frequencies must be the model's, and the weights of its norms where both are known.
    """
    own = cached_calibration("").parent.glob("*.safetensors")
    newest = sorted(own, key=lambda one: one.stat().st_mtime, reverse=True)
    for path in (*newest, *sorted(SHIPPED.glob("*.safetensors"))):
        try:
            found = load_calibration(path)
            found.check(model.config, "")  # no hash: a file that names no frequencies does not fit
        except CalibrationError:
            continue
        if found.is_of(norms) or (found.is_of(norms) is None and path.parent != SHIPPED):
            return path
    return None


def find_file(
    model: PreTrainedModel,
    digest: str,
    name: str,
    load: Callable[[Path], Any],
    explicit: Path | str | None = None,
    cached: Path | None = None,
) -> Path | None:
    """Return `explicit`, or else the first file there is: in the model's folder, `cached`, the bundled model's own.

    The bundled one counts if its `model` is the model's hash `digest`. None: there is none.
    """
    if explicit is not None:
        return Path(explicit).expanduser()
    bundled = TESTBED_FOLDER / name
    for path in (Path(str(model.name_or_path)).expanduser() / name, cached, bundled):
        if path is not None and path.is_file() and (path != bundled or load(path).model == digest):
            return path
    return None


def parts_of(calibration: Calibration) -> dict[str, Tensor]:
    """Return the statistics as float32 tensors by their names in files."""
    found = {
        "mean_real": calibration.mean_LHqF.real, "mean_imag": calibration.mean_LHqF.imag,
        "modulus": calibration.modulus_LHqF, "square": calibration.square_LHqF, "horizon": calibration.horizon_LHqJ,
        "norms": calibration.norms,
    }  # fmt: skip
    if calibration.forecast is not None:
        found |= {f"{_FORECAST}{name}": x.half() for name, x in calibration.forecast.tensors().items()}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in found.items() if tensor is not None}


def assembled(parts: Mapping[str, Tensor], head_dim: int, **facts: Any) -> Calibration:
    """Return the statistics that `parts_of` took apart, in any precision; raises KeyError where one is missing."""
    parts = {name: part.float() for name, part in parts.items()}
    facts |= {"horizon_LHqJ": parts.get("horizon"), "norms": parts.get("norms"), "head_dim": head_dim}
    if any(name.startswith(_FORECAST) for name in parts):
        names = (one.name.partition("_")[0] for one in fields(Network))
        facts["forecast"] = Network(*(parts[f"{_FORECAST}{name}"] for name in names))
    mean = torch.complex(parts["mean_real"], parts["mean_imag"])
    return Calibration(mean, parts["modulus"], parts.get("square"), **facts)


# ----------------------------------------------------------------------- safetensors whose header names their format


def write_tensors(path: Path | str, what: str, tensors: dict[str, Tensor], facts: Mapping[str, object]) -> None:
    """Write a file of the format `reasonkv-{what}`, whole or not at all; facts that are None are left out.

    Raises:
        OSError: it cannot be written.
    """
    header = {"format": f"reasonkv-{what}", "version": _VERSION, **facts}
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
    if version.isdecimal() and version != str(_VERSION):
        raise error(f"{path} has format version {version[:20]}, but this reasonkv reads version {_VERSION}.")
    return header, tensors
