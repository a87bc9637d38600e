"""The `.pt` calibration files of the public TriAttention and CASK code."""

from __future__ import annotations

import io
import pickle
import re
from pathlib import Path
from typing import Any

import torch

from reasonkv.calibration.files import assembled, parts_of
from reasonkv.calibration.statistics import Calibration, CalibrationError
from reasonkv.files import write_atomically

_NAMES = {
    "mean_real": "q_mean_real", "mean_imag": "q_mean_imag", "modulus": "q_abs_mean", "square": "q_sq_abs_mean",
    "horizon": "oracle_pi",
}  # fmt: skip
_OPTIONAL = ("square", "horizon")
_VERSION_WITH_SQUARES = 3
_DAMAGE = (
    OSError, RuntimeError, pickle.UnpicklingError, EOFError, AttributeError, LookupError, TypeError, ValueError,
)  # fmt: skip


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
        data = torch.load(path, map_location="cpu", weights_only=True)
        metadata, entries = dict(data["metadata"]), dict(data["stats"])
        numbers = [[int(number) for number in re.findall(r"\d+", name)] for name in entries]  # of layer00_head00
        layers, query_heads = (1 + max(axis) for axis in zip(*numbers, strict=True))
        heads = [entries[_entry(i, h)] for i in range(layers) for h in range(query_heads)]
        present = [name for name, theirs in _NAMES.items() if name not in _OPTIONAL or theirs in heads[0]]
        parts = {name: torch.stack([head[_NAMES[name]].float() for head in heads]) for name in present}
    except (
        OSError,
        RuntimeError,
        pickle.UnpicklingError,
        EOFError,
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
    ):
        raise CalibrationError(
            f"{path} cannot be read as a .pt calibration: it is damaged, holds more than tensors and plain values, or "
            "lacks statistics of a head; make it again with the code it came from."
        ) from None
    style = metadata.get("rope_style", "half")
    if style != "half":
        raise CalibrationError(f"{path} was made for RoPE layout {style!r}; only 'half' is supported.")
    parts = {name: tensor.view(layers, query_heads, -1) for name, tensor in parts.items()}
    head_dim = int(metadata.get("head_dim", 2 * parts["modulus"].shape[2]))
    rope_type, model_name = (
        None if metadata.get(key) is None else str(metadata[key]) for key in ("rope_type", "model_name")
    )
    return assembled(parts, head_dim, source=f"imported from {path.name}", rope_type=rope_type, name=model_name)


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
    parts = parts_of(calibration)
    # each head a tensor of its own: a view would take the whole storage into the file with it
    entries = {_entry(i, h): {_NAMES[name]: tensor[i, h].clone() for name, tensor in parts.items()} for i, h in heads}
    buffer = io.BytesIO()
    torch.save({"metadata": metadata, "stats": entries}, buffer)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(Path(path), buffer.getvalue())


def _entry(layer: int, head: int) -> str:
    return f"layer{layer:02d}_head{head:02d}"
