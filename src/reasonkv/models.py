"""`--model`: the bundled testbed, a folder, or a name on the Hugging Face hub; and what identifies its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from reasonkv.errors import ReasonKVError
from reasonkv.identity import TESTBED, device_words, model_hash

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
_SMALL = 20_000_000  # parameters; smaller models gain nothing from bfloat16 or from a second thread on a CPU


class ModelError(ReasonKVError, ValueError):
    """A model that cannot be loaded; the message says what was wrong with it and what to give instead."""


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for inference.

    Args:
        name: as the user gave it.
        model: in evaluation mode, on its device.
        tokenizer: its tokenizer.
        hash: of configuration, tensor names and shapes, and a sample of the query weights; not of the folder's name.
        calibration_file: statistics of its queries, where they are not looked up beside it.

    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    hash: str
    calibration_file: Path | None = None

    @property
    def dtype(self) -> str:
        """The parameters' dtype, as `--dtype` writes it."""
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def device_name(self) -> str:
        """The device in words."""
        return device_words(self.model.device)


def cpu_has_bfloat16() -> bool:
    """Return whether this CPU multiplies in bfloat16 by itself (AMX or AVX-512); False where torch does not tell."""
    found: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(found.get("amx_bf16") or found.get("avx512_bf16"))


def load_model(
    name: str,
    dtype: str = "auto",
    device: str = "auto",
    calibration: Path | None = None,
    *,
    has_bfloat16: Callable[[], bool] = cpu_has_bfloat16,
) -> LoadedModel:
    """Load a model and its tokenizer.

    Args:
        name: "testbed", a folder, or a hub name.
        dtype: "auto" or one of `DTYPES`. "auto" is the checkpoint's own on an accelerator. On a CPU it is bfloat16 for
            a bfloat16 checkpoint of 20M parameters or more, if the CPU multiplies in it, and otherwise float32.
        device: "auto" (an accelerator if there is one) or a torch device.
        calibration: statistics of its queries, where they are not looked up beside it.
        has_bfloat16: says whether the CPU multiplies in bfloat16.

    Raises:
        ModelError: one sentence.

    """
    place = _device(device)
    if dtype not in {"auto", *DTYPES}:
        raise ModelError(f"Unknown dtype {dtype!r}; choose one of auto, {', '.join(DTYPES)}.")
    source = _source(name)
    try:
        wanted: Any = DTYPES[dtype] if dtype != "auto" else _auto_dtype(source, place, has_bfloat16)
        model, report = AutoModelForCausalLM.from_pretrained(
            source, dtype=wanted, output_loading_info=True, ignore_mismatched_sizes=True
        )
        tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception as error:  # a damaged folder raises anything from KeyError to SafetensorError
        raise ModelError(_sentence(name, error)) from None
    misfits = sorted([*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])])
    if misfits:  # transformers would fill them with random numbers
        raise ModelError(
            f"The weights of {name} do not fit its configuration: {len(misfits)} tensors are missing or of another "
            f"shape ({misfits[0]} first); give a folder whose config.json and weights belong together."
        )
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what transformers makes of a folder without one
        raise ModelError(f"{name} has no tokenizer; add its tokenizer files to the model folder.")
    try:
        model = model.to(place).eval()
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"{name} cannot be moved to {place} ({_first_line(error)}).") from None
    return LoadedModel(name, model, tokenizer, model_hash(model), calibration)


def load_config(name: str) -> PreTrainedConfig:
    """A model's configuration alone.

    Raises:
        ModelError: one sentence.

    """
    source = _source(name)
    try:
        return AutoConfig.from_pretrained(source)
    except Exception as error:
        raise ModelError(_sentence(name, error)) from None


@contextmanager
def one_thread_if_small(model: PreTrainedModel) -> Iterator[None]:
    """Run a small model on a CPU with one thread, and restore the number of threads afterwards.

    Its operations are too short to be worth splitting, and where another job holds a core, every split waits for the
    scheduler: the bundled model's traces took 360 s on two threads of a busy two-core machine and 12 s on one. Results
    then do not depend on the number of cores either.
    """
    threads = torch.get_num_threads()
    small = model.device.type == "cpu" and model.num_parameters() < _SMALL
    if small:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if small:
            torch.set_num_threads(threads)


def _auto_dtype(source: str, place: torch.device, has_bfloat16: Callable[[], bool]) -> torch.dtype | str:
    if place.type != "cpu":
        return "auto"
    config = AutoConfig.from_pretrained(source)
    if config.get_text_config().dtype != torch.bfloat16 or not has_bfloat16():
        return torch.float32
    with torch.device("meta"):  # counts parameters without making them
        parameters = AutoModelForCausalLM.from_config(config).num_parameters()
    return torch.bfloat16 if parameters >= _SMALL else torch.float32


def _device(name: str) -> torch.device:
    if name == "auto":
        found = torch.accelerator.current_accelerator()
        return found if found is not None else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ModelError(f"The device {name!r} is not available here; use --device cpu or auto.") from None
    return device


def _source(name: str) -> str:
    """The folder or hub name behind `name`, with what is plainly wrong about a folder already said."""
    folder = Path(name).expanduser()
    if name == TESTBED:
        from reasonkv.testbed import testbed_path

        folder = testbed_path()
        if not (folder / "config.json").is_file():
            raise ModelError(f"The bundled model is missing from {folder}; reinstall reasonkv.")
        return str(folder)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"{name} is not a model folder: it has no config.json.")
        if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
            raise ModelError(f"{name} is not a whole model folder: it has a config.json but no weights.")
        return str(folder)
    if folder.exists():
        raise ModelError(f"{name} is a file; --model takes a model folder, a hub name, or {TESTBED!r}.")
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise ModelError(f"There is no folder {name}; --model takes a model folder, a hub name, or {TESTBED!r}.")
    return name


def _sentence(name: str, error: Exception) -> str:
    if name != TESTBED and not Path(name).expanduser().is_dir():
        return (
            f"There is no folder {name}, and it could not be had from the Hugging Face hub either; "
            f"check the name and the network, or give a local folder or {TESTBED!r}."
        )
    return f"The model folder {name} cannot be loaded ({_first_line(error)}); give a whole and undamaged one."


def _first_line(error: Exception) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    text = text.rstrip(".") if len(text) <= 200 else text[:197] + "..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
