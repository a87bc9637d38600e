"""Calibration files: their format, and the `.pt` files of the public code.

A calibration file is safetensors. It holds `mean_real`, `mean_imag`, `modulus` and, where known, `square`, each float32
[layers, query heads, rotary pairs], and, where fitted, `horizon` [layers, query heads, distances]. Everything else is
text in the header.
"""

from __future__ import annotations

import io
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reasonkv.calibration.statistics import Calibration, CalibrationError
from reasonkv.calibration.tensors import read_tensors, write_tensors
from reasonkv.files import write_atomically

_TEXTS = ("model", "rope_type", "date", "name", "source")
_PT_NAMES = {
    "mean_real": "q_mean_real", "mean_imag": "q_mean_imag", "modulus": "q_abs_mean", "square": "q_sq_abs_mean",
    "horizon": "oracle_pi",
}  # fmt: skip
_PT_VERSION_WITH_SQUARES = 3


def save_calibration(path: Path | str, calibration: Calibration) -> None:
    """Write a calibration file, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    facts = {
        "layers": calibration.layers, "query_heads": calibration.query_heads, "head_dim": calibration.head_dim,
        "verified": str(calibration.verified).lower(), "tokens": calibration.tokens,
        **{name: getattr(calibration, name) for name in _TEXTS},
    }  # fmt: skip
    write_tensors(path, "calibration", _parts(calibration), facts)


def load_calibration(path: Path | str) -> Calibration:
    """Read a calibration file.

    Raises:
        CalibrationError: it is missing, damaged, something else, or of a later version.
    """
    hint = f"; import it with `reasonkv calibrate --import {path}`" if Path(path).suffix == ".pt" else ""
    header, parts = read_tensors(path, "calibration", CalibrationError, hint)
    try:
        return _assembled(
            parts, int(header["head_dim"]), verified=header["verified"] == "true",
            tokens=int(header["tokens"]) if "tokens" in header else None,
            **{name: header.get(name) for name in _TEXTS},
        )  # fmt: skip
    except CalibrationError:
        raise
    except (KeyError, ValueError, RuntimeError):  # a tensor or a fact is missing, or of the wrong kind
        raise CalibrationError(f"{path} is damaged: its header and its tensors do not fit together.") from None


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
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError):
        raise CalibrationError(
            f"{path} cannot be read as a .pt calibration: it is damaged, holds more than tensors and plain values, or "
            "lacks its two parts, metadata and stats."
        ) from None
    style = metadata.get("rope_style", "half")
    if style != "half":
        raise CalibrationError(f"{path} was made for RoPE layout {style!r}; only 'half' is supported.")
    heads = {}
    for key, entry in entries.items():
        match = re.fullmatch(r"layer(\d+)_head(\d+)", str(key))
        if match is None or not isinstance(entry, dict):
            raise CalibrationError(f"{path} has an entry {key!r}; entries are named layer00_head00 and so on.")
        heads[int(match[1]), int(match[2])] = entry
    if not heads:
        raise CalibrationError(f"{path} holds no head's statistics.")
    layers, query_heads = (1 + max(key[axis] for key in heads) for axis in (0, 1))
    places = [(i, h) for i in range(layers) for h in range(query_heads)]
    missing = [place for place in places if place not in heads]
    if missing:
        raise CalibrationError(
            f"{path} lacks {len(missing)} of {layers} x {query_heads} heads (layer {missing[0][0]}, head "
            f"{missing[0][1]} first)."
        )
    parts = {}
    for name, theirs in _PT_NAMES.items():
        if name in ("square", "horizon") and theirs not in heads[0, 0]:
            continue
        try:
            stacked = torch.stack([heads[place][theirs].float() for place in places])
        except (KeyError, AttributeError, RuntimeError, TypeError):
            raise CalibrationError(f"{path} is damaged: {theirs} is missing, no tensor, or unequally long.") from None
        parts[name] = stacked.view(layers, query_heads, -1)
    head_dim = int(metadata.get("head_dim", 2 * parts["modulus"].shape[2]))
    texts = {name: metadata.get(theirs) for name, theirs in (("rope_type", "rope_type"), ("name", "model_name"))}
    return _assembled(
        parts, head_dim, source=f"imported from {path.name}",
        **{name: None if value is None else str(value) for name, value in texts.items()},
    )  # fmt: skip


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
        metadata["stats_version"] = _PT_VERSION_WITH_SQUARES
    if calibration.horizon_LHqJ is not None:
        offsets = [2**j for j in range(calibration.horizon_LHqJ.shape[-1])]
        metadata |= {"build_variational_horizon": True, "oracle_offsets": offsets}
    parts = _parts(calibration)
    # each head a tensor of its own: a view would take the whole storage into the file with it
    entries = {
        f"layer{i:02d}_head{h:02d}": {_PT_NAMES[name]: tensor[i, h].clone() for name, tensor in parts.items()}
        for i, h in heads
    }
    buffer = io.BytesIO()
    torch.save({"metadata": metadata, "stats": entries}, buffer)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(Path(path), buffer.getvalue())


def _parts(calibration: Calibration) -> dict[str, Tensor]:
    """The statistics as float32 tensors by name."""
    found = {
        "mean_real": calibration.mean_LHqF.real, "mean_imag": calibration.mean_LHqF.imag,
        "modulus": calibration.modulus_LHqF, "square": calibration.square_LHqF, "horizon": calibration.horizon_LHqJ,
    }  # fmt: skip
    return {name: tensor.detach().cpu().contiguous() for name, tensor in found.items() if tensor is not None}


def _assembled(parts: dict[str, Tensor], head_dim: int, **facts: Any) -> Calibration:
    return Calibration(
        torch.complex(parts["mean_real"], parts["mean_imag"]), parts["modulus"], parts.get("square"),
        horizon_LHqJ=parts.get("horizon"), head_dim=head_dim, **facts,
    )  # fmt: skip
