"""Calibration files: safetensors with metadata, and the `.pt` files of the public reference code.

A calibration file holds `mean_real`, `mean_imag`, `modulus` and, where known, `square`, each float32
[layers, query heads, rotary pairs], and, where fitted, `horizon` [layers, query heads, distances]; everything else is
text in the header.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from reasonkv.calibration.statistics import Calibration, CalibrationError

FORMAT = "reasonkv-calibration"
VERSION = 1
_TEXTS = ("model", "rope_type", "date", "name", "source")
_HEAD = re.compile(r"layer(\d+)_head(\d+)")
_HORIZON = "oracle_pi"  # what .pt files call the weights of the future distances
_SQUARES_SINCE = 3  # `stats_version` of .pt files whose entries have the mean square


def save_calibration(path: Path | str, calibration: Calibration) -> None:
    """Write a calibration file, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    tensors = {
        "mean_real": calibration.mean_LHqF.real.contiguous().cpu(),
        "mean_imag": calibration.mean_LHqF.imag.contiguous().cpu(),
        "modulus": calibration.modulus_LHqF.contiguous().cpu(),
    }
    if calibration.square_LHqF is not None:
        tensors["square"] = calibration.square_LHqF.contiguous().cpu()
    if calibration.horizon_LHqJ is not None:
        tensors["horizon"] = calibration.horizon_LHqJ.contiguous().cpu()
    facts = {
        "format": FORMAT,
        "version": VERSION,
        "layers": calibration.layers,
        "query_heads": calibration.query_heads,
        "head_dim": calibration.head_dim,
        "verified": str(calibration.verified).lower(),
        "tokens": calibration.tokens,
        **{name: getattr(calibration, name) for name in _TEXTS},
    }
    header = {name: str(value) for name, value in facts.items() if value is not None}
    _write(Path(path), save(tensors, metadata=header))


def load_calibration(path: Path | str) -> Calibration:
    """Read a calibration file.

    Raises:
        CalibrationError: it is missing, damaged, something else, or of a later version.
    """
    path = Path(path)
    _check_exists(path)
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in list(file.keys())}
    except (OSError, SafetensorError):
        hint = f"; import it with `reasonkv calibrate --import {path}`" if path.suffix == ".pt" else ""
        raise CalibrationError(f"{path} cannot be read as a calibration file{hint}.") from None
    if header.get("format") != FORMAT:
        raise CalibrationError(f"{path} is a safetensors file, but not a calibration of reasonkv.")
    try:
        version = int(header["version"])
        if version > VERSION:
            raise CalibrationError(
                f"{path} has format version {version}, but this reasonkv reads versions up to {VERSION}."
            )
        return Calibration(
            torch.complex(tensors["mean_real"], tensors["mean_imag"]),
            tensors["modulus"],
            tensors.get("square"),
            horizon_LHqJ=tensors.get("horizon"),
            head_dim=int(header["head_dim"]),
            tokens=int(header["tokens"]) if "tokens" in header else None,
            verified=header["verified"] == "true",
            **{name: header.get(name) for name in _TEXTS},
        )
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
    _check_exists(path)
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
    heads = _heads(path, entries)
    layers, query_heads = (1 + max(key[axis] for key in heads) for axis in (0, 1))
    missing = [(i, h) for i in range(layers) for h in range(query_heads) if (i, h) not in heads]
    if missing:
        raise CalibrationError(
            f"{path} lacks {len(missing)} of {layers} x {query_heads} heads (layer {missing[0][0]}, head "
            f"{missing[0][1]} first)."
        )
    ordered = [heads[i, h] for i in range(layers) for h in range(query_heads)]
    real, imaginary, modulus = (_stack(path, ordered, f"q_{one}", layers) for one in _PARTS[:3])
    square = _stack(path, ordered, f"q_{_PARTS[3]}", layers) if f"q_{_PARTS[3]}" in ordered[0] else None
    horizon = _stack(path, ordered, _HORIZON, layers) if _HORIZON in ordered[0] else None
    rope_type, name = metadata.get("rope_type"), metadata.get("model_name")
    return Calibration(
        torch.complex(real, imaginary),
        modulus,
        square,
        horizon_LHqJ=horizon,
        head_dim=int(metadata.get("head_dim", 2 * real.shape[2])),
        rope_type=None if rope_type is None else str(rope_type),
        name=None if name is None else str(name),
        source=f"imported from {path.name}",
    )


def export_pt(calibration: Calibration, path: Path | str) -> None:
    """Write a `.pt` file that the public TriAttention and CASK loaders read, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    metadata: dict[str, Any] = {
        "head_dim": calibration.head_dim,
        "rope_style": "half",
        "sampled_heads": [[i, h] for i in range(calibration.layers) for h in range(calibration.query_heads)],
    }
    if calibration.rope_type is not None:
        metadata["rope_type"] = calibration.rope_type
    if calibration.name is not None:
        metadata["model_name"] = calibration.name
    if calibration.square_LHqF is not None:
        metadata["stats_version"] = _SQUARES_SINCE
    if calibration.horizon_LHqJ is not None:
        metadata |= {
            "build_variational_horizon": True,
            "oracle_offsets": [2**j for j in range(calibration.horizon_LHqJ.shape[-1])],
        }
    tensors = {
        "q_mean_real": calibration.mean_LHqF.real,
        "q_mean_imag": calibration.mean_LHqF.imag,
        "q_abs_mean": calibration.modulus_LHqF,
        "q_sq_abs_mean": calibration.square_LHqF,
        _HORIZON: calibration.horizon_LHqJ,
    }
    # each head a tensor of its own: a view would take the whole storage into the file with it
    entries = {
        f"layer{i:02d}_head{h:02d}": {
            part: tensor[i, h].detach().cpu().clone(memory_format=torch.contiguous_format)
            for part, tensor in tensors.items()
            if tensor is not None
        }
        for i, h in metadata["sampled_heads"]
    }
    buffer = io.BytesIO()
    torch.save({"metadata": metadata, "stats": entries}, buffer)
    _write(Path(path), buffer.getvalue())


_PARTS = ("mean_real", "mean_imag", "abs_mean", "sq_abs_mean")


def _heads(path: Path, entries: Mapping[str, Any]) -> dict[tuple[int, int], Mapping[str, Any]]:
    found: dict[tuple[int, int], Mapping[str, Any]] = {}
    for key, entry in entries.items():
        match = _HEAD.fullmatch(str(key))
        if match is None or not isinstance(entry, Mapping):
            raise CalibrationError(f"{path} has an entry {key!r}; entries are named layer00_head00 and so on.")
        found[int(match[1]), int(match[2])] = entry
    if not found:
        raise CalibrationError(f"{path} holds no head's statistics.")
    return found


def _stack(path: Path, entries: list[Mapping[str, Any]], name: str, layers: int) -> Tensor:
    """One statistic of all heads, float32 [layers, query heads, F]."""
    try:
        stacked = torch.stack([entry[name].float() for entry in entries])
    except (KeyError, AttributeError, RuntimeError, TypeError):
        raise CalibrationError(f"{path} is damaged: {name} is missing, no tensor, or unequally long.") from None
    return stacked.view(layers, -1, stacked.shape[-1])


def _check_exists(path: Path) -> None:
    if not path.is_file():
        raise CalibrationError(f"There is no calibration file {path}.")


def _write(path: Path, data: bytes) -> None:
    # imported here because the evaluation imports the runtimes, which import this package
    from reasonkv.files import write_atomically

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, data)
