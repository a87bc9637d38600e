"""What a result names: the model by its hash, the device in words, and the versions of packages."""

from __future__ import annotations

import hashlib
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from reasonkv.offload import loaded, plain

TESTBED = "testbed"
TESTBED_FOLDER = Path(__file__).parent / "testbed" / "model"
_PACKAGES = ("torch", "transformers", "numpy", "safetensors")
_SAMPLED_VALUES = 64
_NORM_WEIGHTS = 16
_UNIDENTIFIED = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures"}


def model_hash(model: PreTrainedModel) -> str:
    """Sixteen hex digits of the configuration, tensor names and shapes, and a sample of every query projection.

    The sample is taken in bfloat16, so that one checkpoint loaded in several dtypes has one hash.
    """
    config = {k: v for k, v in model.config.to_dict().items() if k not in _UNIDENTIFIED}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{list(tensor.shape)}".encode())
        if "q_proj" in name or "qkv_proj" in name:
            owner, _, own = name.rpartition(".")
            module = model.get_submodule(owner)
            with loaded(module):
                flat = plain(getattr(module, own) if tensor.is_meta else tensor).detach().reshape(-1)
                sample = flat[:: max(1, flat.numel() // _SAMPLED_VALUES)][:_SAMPLED_VALUES]
                digest.update(sample.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def norm_weights(model: PreTrainedModel) -> Tensor | None:
    """Return the first weights of every normalisation, float32 [N]; None where a model has none.

    Neither an adapter nor a quantisation changes them, so they tell whose weights these are at heart.
    """
    found = []
    for name, tensor in model.named_parameters():
        if "norm" in name and tensor.ndim == 1:
            module = model.get_submodule(name.rpartition(".")[0])
            with loaded(module):
                whole = getattr(module, name.rpartition(".")[2]) if tensor.is_meta else tensor
                found.append(whole.detach()[:_NORM_WEIGHTS].to("cpu", torch.float32))
    return torch.cat(found) if found else None


def device_words(device: torch.device) -> str:
    """A device in words: the accelerator's name, or the CPU's architecture and threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
    return str(device)


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide results."""
    found = {"reasonkv": version("reasonkv"), "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def shown_name(model: PreTrainedModel) -> str:
    """Return the model's name as a command line takes it."""
    name = str(model.name_or_path)
    return TESTBED if name and Path(name) == TESTBED_FOLDER else name or "MODEL"
