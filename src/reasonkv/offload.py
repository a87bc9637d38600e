"""Weights that are elsewhere: models whose layers are on several devices, in memory of the host, or on disk.

A weight that is offloaded is a meta tensor until its module runs. accelerate hangs a hook on such a module, which knows
where it runs and brings the weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def input_device(model: PreTrainedModel) -> torch.device:
    """Return the device that token ids go to, even where the embedding's weight is offloaded."""
    own: torch.device = model.device
    if own.type != "meta":
        return own
    hook = getattr(model.get_input_embeddings(), "_hf_hook", None)
    return torch.device("cpu" if hook is None else hook.execution_device)


@contextmanager
def loaded(module: nn.Module) -> Iterator[None]:
    """Bring a module's own weights where they are offloaded, for as long as the context is open."""
    if not any(parameter.is_meta for parameter in module.parameters(recurse=False)):
        yield
        return
    from accelerate.utils import align_module_device

    with align_module_device(module):
        yield


def plain(weight: Tensor) -> Tensor:
    """Return a weight as numbers; of one that is quantised behind a tensor's face (torchao), what it stands for."""
    return weight if type(weight) in (Tensor, nn.Parameter) else weight.dequantize()
