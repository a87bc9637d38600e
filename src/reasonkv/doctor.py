"""What `reasonkv doctor` finds: versions, devices, and whether a model can be served."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from reasonkv.checkpoints import ModelError, load_config
from reasonkv.footprint import FootprintError, LayerKind, footprint, total_bytes
from reasonkv.identity import TESTBED, device_words, package_versions
from reasonkv.numbers import whole_number
from reasonkv.resolve import TESTED, check_model

LONG = 32 * 1024
"""Tokens that memory is told for."""
_OPTIONAL = {
    "accelerate": "device maps, GGUF files and quantised weights", "gguf": "GGUF files", "peft": "LoRA adapters",
    "vllm": "the vLLM runtime", "flash_attn": "flash attention kernels",
}  # fmt: skip


@dataclass(frozen=True)
class Report:
    """One examination."""

    versions: dict[str, str]  # of Python and packages
    devices: list[str]  # in words, with their memory
    testbed: str  # whether the bundled model is there
    model: dict[str, str]  # facts about the model asked for, in words; empty if none was
    layers: list[LayerKind]  # its kinds of layers and what they keep; empty if that cannot be known without weights
    problems: list[str]  # what needs attention, one sentence each
    advice: str  # one sentence on what to do next


def examine(model: str | None = None, budget: int = 1024) -> Report:
    """Look at this installation, and at a model's configuration if one is named.

    Args:
        model: as `load_model` takes it; only its configuration is read.
        budget: tokens of each bounded layer, to say what a compressed cache saves.

    Raises:
        BudgetError: no such budget.
    """
    budget = whole_number(budget, "budget", 1)
    versions = package_versions()
    for name, what in _OPTIONAL.items():
        versions[name] = "installed" if find_spec(name) else f"not installed (only for {what})"
    try:
        load_config(TESTBED)
        testbed, missing = "bundled model found", []
    except ModelError as error:
        testbed, missing = "missing", [str(error)]
    facts: dict[str, str] = {}
    layers: list[LayerKind] = []
    reasons: list[str] = []
    if model is not None and not (model == TESTBED and missing):
        try:
            facts, layers, reasons = _model_facts(model, budget)
        except ModelError as error:
            reasons = [str(error)]
    return Report(versions, _devices(), testbed, facts, layers, missing + reasons, _advice(model, missing, reasons))


def _model_facts(name: str, budget: int) -> tuple[dict[str, str], list[LayerKind], list[str]]:
    config = load_config(name)
    decoder = config.get_text_config(decoder=True)
    kind = str(decoder.model_type)
    reasons = check_model(config)
    tested = "tested" if kind in TESTED else f"not among the tested types ({', '.join(TESTED)})"
    heads = getattr(decoder, "num_key_value_heads", None) or getattr(decoder, "num_attention_heads", "?")
    facts = {
        "model": name,
        "type": f"{kind}, {tested}",
        "shape": f"{getattr(decoder, 'num_hidden_layers', '?')} layers, {heads} KV heads",
        "supported": "no" if reasons else "yes",
    }
    quantised = getattr(config, "quantization_config", None)
    if quantised:  # a dictionary in a file, an object from a GGUF file
        found = quantised.get("quant_method") if isinstance(quantised, dict) else quantised.quant_method
        facts["weights"] = f"quantised ({getattr(found, 'value', found)})"
    try:
        layers = footprint(config)
    except FootprintError as error:
        return facts | {"cache": str(error)}, [], reasons
    full, kept = total_bytes(layers, LONG), total_bytes(layers, LONG, None if reasons else budget)
    facts[f"cache at {LONG // 1024}k"] = (
        f"{full / 2**20:,.0f} MiB a sequence; {kept / 2**20:,.0f} MiB with {budget:,} tokens in each bounded layer, "
        f"{1 - kept / max(full, 1):.0%} less"
    )
    return facts, layers, reasons


def _devices() -> list[str]:
    found = [f"{device_words(torch.device('cpu'))}, {os.cpu_count()} cores"]
    for index in range(torch.cuda.device_count()):
        memory = torch.cuda.get_device_properties(index).total_memory / 2**30
        found.append(f"cuda:{index} {torch.cuda.get_device_name(index)}, {memory:.0f} GiB")
    if torch.backends.mps.is_available():
        found.append("mps")
    return found


def _advice(model: str | None, missing: list[str], reasons: list[str]) -> str:
    if reasons:
        return "Give another model, or the bundled one: --model testbed."
    if missing:
        return "All else is well; only the bundled model is missing."
    if model is None:
        return "All is well; try `reasonkv demo`, or `reasonkv doctor --model M` for a model of yours."
    return f"All is well; try `reasonkv generate --model {model} --method snapkv --budget 1024 --prompt TEXT`."
