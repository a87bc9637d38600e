"""A gate and its file: safetensors with the facts in the header.

Of layer i, `i.query` [H, g, D, E], `i.key` [H, 3 D, E], `i.query_norm` [E] and `i.key_norm` [E]; E = D.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, Field
from torch import Tensor
from transformers import PreTrainedModel

from reasonkv.calibration.files import find_file, read_tensors, write_tensors
from reasonkv.identity import model_hash, shown_name
from reasonkv.methods import MethodError

FILE = "reasonkv_gate.safetensors"
"""Name of a gate's file inside a model folder."""
_NAMES = ("query", "key", "query_norm", "key_norm")


class GateError(MethodError):
    """A gate that is missing, damaged, or another model's; the message says what to do."""


@dataclass(frozen=True, eq=False)
class Gate:
    """The trained part of SeerAttention-R on one model."""

    # `query`, `key`, `query_norm` and `key_norm` of every layer, float32; empty without full attention
    layers: Sequence[Mapping[str, Tensor]]
    page_size: int  # tokens of the pages it was trained for
    model: str  # hash of the model it was trained on
    source: str = ""  # what it was trained on, in words

    def to(self, device: torch.device | str) -> Gate:
        """Return the same gate on a device."""
        return replace(self, layers=[{name: x.to(device) for name, x in layer.items()} for layer in self.layers])

    @property
    def parameters(self) -> int:
        """How many numbers it consists of."""
        return sum(tensor.numel() for layer in self.layers for tensor in layer.values())

    @property
    def shapes(self) -> list[tuple[int, int, int] | None]:
        """KV heads H, query heads of a group g and head_dim D of every layer; None for layers without a gate."""
        return [tuple(layer["query"].shape[:3]) if layer else None for layer in self.layers]  # type: ignore[misc]


def random_gate(
    shapes: Sequence[tuple[int, int, int] | None], page_size: int, model: str, *, seed: int = 0, source: str = "random"
) -> Gate:
    """Return a gate of `Gate.shapes` before training, with normal weights of variance 1 / inputs."""
    generator = torch.Generator().manual_seed(seed)

    def of(shape: tuple[int, int, int] | None) -> dict[str, Tensor]:
        if shape is None:
            return {}
        H, g, D = shape
        return {
            "query": torch.randn(H, g, D, D, generator=generator) * (g * D) ** -0.5,
            "key": torch.randn(H, 3 * D, D, generator=generator) * (3 * D) ** -0.5,
            "query_norm": torch.ones(D),
            "key_norm": torch.ones(D),
        }

    return Gate([of(shape) for shape in shapes], page_size, model, source)


class _Header(BaseModel):
    """The facts in a header, whose values are all texts."""

    layers: Annotated[int, Field(ge=1, le=100_000)]
    page_size: Annotated[int, Field(ge=1, le=2**20)]
    model: str
    source: str = ""


def save_gate(path: Path | str, gate: Gate) -> None:
    """Write a gate's file in bfloat16, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    tensors = {
        f"{number}.{name}": tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for number, layer in enumerate(gate.layers)
        for name, tensor in layer.items()
    }
    facts = {"layers": len(gate.layers), "page_size": gate.page_size, "model": gate.model, "source": gate.source}
    write_tensors(path, "gate", tensors, facts)


def load_gate(path: Path | str) -> Gate:
    """Read a gate's file.

    Raises:
        GateError: it is missing, damaged, something else, or of a later version.
    """
    header, tensors = read_tensors(path, "gate", GateError)
    try:
        facts = _Header.model_validate(header)
        present = sorted({int(name.partition(".")[0]) for name in tensors})
        if present and not 0 <= present[0] <= present[-1] < facts.layers:
            raise ValueError
        layers: list[dict[str, Tensor]] = [{} for _ in range(facts.layers)]
        for number in present:
            layers[number] = {name: tensors[f"{number}.{name}"].float() for name in _NAMES}
            H, g, D, _ = layers[number]["query"].shape
            wanted = {"query": (H, g, D, D), "key": (H, 3 * D, D), "query_norm": (D,), "key_norm": (D,)}
            if any(layers[number][name].shape != shape for name, shape in wanted.items()) or not H * g * D:
                raise ValueError
        if any(not tensor.isfinite().all() for tensor in tensors.values()):
            raise ValueError
    except (KeyError, ValueError, RuntimeError):
        raise GateError(f"{path} is damaged: its header and its tensors do not fit together.") from None
    return Gate(layers, facts.page_size, facts.model, facts.source)


def find_gate(model: PreTrainedModel, explicit: Path | str | None = None) -> Gate:
    """Return a model's gate, checked against its hash.

    Looked for in this order: `explicit`; `reasonkv_gate.safetensors` in the model's folder; the bundled model's own,
    which also serves copies of that model elsewhere.

    Raises:
        GateError: there is none (the message is the command that trains one), or it is damaged or another model's.
    """
    digest = model_hash(model)
    command = f"`reasonkv train-gate --model {shown_name(model)} --text FILE --out {FILE}`"
    path = find_file(model, digest, FILE, load_gate, explicit)
    if path is None:
        raise GateError(f"There is no gate for this model; train one with {command}.")
    found = load_gate(path)
    if found.model != digest:
        raise GateError(f"{path} was trained on another model; train one with {command}.")
    text = model.config.get_text_config()
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    full = {number for number, kind in enumerate(kinds) if kind == "full_attention"}
    given = {number: shape for number, shape in enumerate(found.shapes) if shape is not None}
    heads = text.num_attention_heads
    if len(found.layers) != len(kinds) or not full <= given.keys() or any(H * g != heads for H, g, _ in given.values()):
        raise GateError(f"{path} is damaged: it has other layers or heads than the model; train one with {command}.")
    return found
