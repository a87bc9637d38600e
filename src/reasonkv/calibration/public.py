"""The `.pt` calibration files of the public TriAttention and CASK code."""

from __future__ import annotations

import io
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, Field, ValidationError
from torch import Tensor

from reasonkv.calibration.files import assembled, parts_of
from reasonkv.calibration.statistics import Calibration, CalibrationError
from reasonkv.files import write_atomically
from reasonkv.inputs import reason

_NAMES = {
    "mean_real": "q_mean_real", "mean_imag": "q_mean_imag", "modulus": "q_abs_mean", "square": "q_sq_abs_mean",
    "horizon": "oracle_pi",
}  # fmt: skip
_VERSION_WITH_SQUARES = 3


def _axis(tensor: Any) -> Tensor:
    plain = isinstance(tensor, Tensor) and tensor.layout is torch.strided and tensor.device.type == "cpu"
    if not plain or tensor.ndim != 1 or not tensor.is_floating_point():
        raise ValueError("statistics are lists of real numbers")
    found: Tensor = tensor.float()
    return found


class _Metadata(BaseModel):
    """What is read of a file's metadata."""

    rope_style: str = "half"
    head_dim: Annotated[int, Field(ge=1, le=65536)] | None = None
    rope_type: str | None = None
    model_name: str | None = None


class _Public(BaseModel):
    """A file of the public code: statistics by names such as `layer00_head00`."""

    metadata: _Metadata
    stats: dict[Annotated[str, Field(pattern=r"^layer\d{1,6}_head\d{1,6}$")], dict[str, Any]]


def import_pt(path: Path | str) -> Calibration:
    """Read a `.pt` file of the public TriAttention or CASK code; nothing in it is executed.

    The result is unverified: such a file names no model by its weights.

    Raises:
        CalibrationError: it is missing or damaged, is not in the half-split layout, or lacks heads.
    """
    path = Path(path)
    if not path.is_file():
        raise CalibrationError(f"There is no calibration file {path}.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about layouts of tensors that are then refused
            data = torch.load(path, map_location="cpu", weights_only=True)
        found = _Public.model_validate(data)
        calibration = _assembled(found, f"imported from {path.name}")
    except CalibrationError as error:
        raise CalibrationError(f"{path}: {error}") from None
    except ValidationError as error:
        raise _unreadable(path, reason(error)) from None
    except Exception as error:  # unpickling raises anything, from KeyError to RecursionError
        raise _unreadable(path, " ".join(f"{type(error).__name__}: {error}".split())[:120]) from None
    return calibration


def _unreadable(path: Path, why: str) -> CalibrationError:
    return CalibrationError(
        f"{path} cannot be read as a .pt calibration ({why}); make it again with the code it came from."
    )


def _assembled(found: _Public, source: str) -> Calibration:
    """Return the statistics of a file's heads; raises what tensors raise that do not fit together."""
    metadata, entries = found.metadata, found.stats
    if metadata.rope_style != "half":
        raise CalibrationError(f"it was made for RoPE layout {metadata.rope_style!r}; only 'half' is supported.")
    places = {tuple(map(int, re.findall(r"\d+", name))): head for name, head in entries.items()}
    layers, query_heads = (1 + max(axis) for axis in zip((-1, -1), *places, strict=True))
    if not layers * query_heads == len(places) == len(entries):
        raise ValueError("statistics of a head are missing")
    heads = [places[place] for place in sorted(places)]
    present = [name for name, theirs in _NAMES.items() if name not in ("square", "horizon") or theirs in heads[0]]
    stacked = {name: torch.stack([_axis(head[_NAMES[name]]) for head in heads]) for name in present}
    parts = {name: tensor.view(layers, query_heads, -1) for name, tensor in stacked.items()}
    head_dim = metadata.head_dim or 2 * parts["modulus"].shape[-1]
    return assembled(parts, head_dim, source=source, rope_type=metadata.rope_type, name=metadata.model_name)


def export_pt(calibration: Calibration, path: Path | str) -> None:
    """Write a `.pt` file that the public TriAttention and CASK loaders read, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    heads = [[i, h] for i in range(calibration.layers) for h in range(calibration.query_heads)]
    metadata: dict[str, Any] = {"head_dim": calibration.head_dim, "rope_style": "half", "sampled_heads": heads}
    if calibration.rope_type is not None:
        metadata["rope_type"] = calibration.rope_type
    if calibration.name is not None:
        metadata["model_name"] = calibration.name
    if calibration.square_LHqF is not None:
        metadata["stats_version"] = _VERSION_WITH_SQUARES
    if calibration.horizon_LHqJ is not None:
        offsets = [2**j for j in range(calibration.horizon_LHqJ.shape[-1])]
        metadata |= {"build_variational_horizon": True, "oracle_offsets": offsets}
    parts = parts_of(replace(calibration, forecast=None, norms=None))  # which no public code reads
    # each head a tensor of its own: a view would take the whole storage into the file with it
    entries = {
        f"layer{i:02d}_head{h:02d}": {_NAMES[name]: tensor[i, h].clone() for name, tensor in parts.items()}
        for i, h in heads
    }
    buffer = io.BytesIO()
    torch.save({"metadata": metadata, "stats": entries}, buffer)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(Path(path), buffer.getvalue())
