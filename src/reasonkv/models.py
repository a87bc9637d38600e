"""`--model`: the bundled testbed, a folder, a GGUF file, a LoRA adapter, or a name on the Hugging Face hub."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic_core import from_json
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from reasonkv.checkpoints import Checkpoint, ModelError, find_checkpoint, first_line, need_package, why_not_loaded
from reasonkv.identity import device_words, model_hash
from reasonkv.numbers import KVDtype
from reasonkv.offload import input_device

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
_SMALL = 20_000_000  # parameters; smaller models gain nothing from bfloat16 or from a second thread on a CPU


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for inference.

    Args:
        name: as the user gave it.
        model: in evaluation mode, on its device.
        tokenizer: its tokenizer.
        hash: of configuration, tensor names and shapes, and a sample of the query weights; not of the folder's name.
        calibration_file: statistics of its queries, where they are not looked up beside it.
        kv_dtype: of the slots that bounded methods keep; None for the model's own.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    hash: str
    calibration_file: Path | None = None
    kv_dtype: KVDtype | None = None

    @property
    def dtype(self) -> str:
        """The parameters' dtype, as `--dtype` writes it."""
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def device_name(self) -> str:
        """The device in words."""
        return device_words(input_device(self.model))


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
    revision: str | None = None,
    adapter: str | None = None,
    device_map: str | None = None,
    has_bfloat16: Callable[[], bool] = cpu_has_bfloat16,
) -> LoadedModel:
    """Load a model and its tokenizer.

    Args:
        name: "testbed", a folder, a `.gguf` file (of the disk, or OWNER/NAME/FILE.gguf of the hub), a folder of a LoRA
            adapter, or a hub name.
        dtype: "auto" or one of `DTYPES`. "auto" is the checkpoint's own on an accelerator. On a CPU it is bfloat16 for
            a bfloat16 or GGUF checkpoint of 20M parameters or more, if the CPU multiplies in it, and otherwise float32.
        device: "auto" (an accelerator if there is one) or a torch device.
        calibration: statistics of its queries, where they are not looked up beside it.
        revision: branch, tag or commit on the hub.
        adapter: folder or hub name of a LoRA adapter, which is merged into the weights.
        device_map: as transformers takes it: "auto", "balanced", ..., or a JSON object from modules to devices, "cpu"
            or "disk"; in place of `device`.
        has_bfloat16: says whether the CPU multiplies in bfloat16.

    Raises:
        ModelError: one sentence.
    """
    place = _device(device)
    if dtype not in {"auto", *DTYPES}:
        raise ModelError(f"Unknown dtype {dtype!r}; choose one of auto, {', '.join(DTYPES)}.")
    found = find_checkpoint(name, revision, adapter)
    placed = _parsed_map(device_map)
    try:
        config = found.config()
        quantised = not found.is_gguf and getattr(config, "quantization_config", None) is not None
        wanted: Any = DTYPES[dtype] if dtype != "auto" else _auto_dtype(found, config, place, has_bfloat16)
        model, report = _from_pretrained(found, config, wanted, {"": place} if quantised and placed is None else placed)
        own = found.adapter is not None and (Path(found.adapter) / "tokenizer_config.json").is_file()
        tokenizer = AutoTokenizer.from_pretrained(
            found.adapter if own else found.source, **({} if own else found.options)
        )
        if found.adapter is not None:
            model = _merge_adapter(model, found.adapter)
    except ModelError:
        raise
    except Exception as error:  # a damaged folder raises anything from KeyError to SafetensorError
        raise ModelError(why_not_loaded(found, error)) from None
    misfits = sorted([*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])])
    if misfits:  # transformers would fill them with random numbers
        raise ModelError(
            f"The weights of {name} do not fit its configuration: {len(misfits)} tensors are missing or of another "
            f"shape ({misfits[0]} first); give a folder whose config.json and weights belong together."
        )
    _check_ends(name, model)
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what transformers makes of a folder without one
        raise ModelError(f"{name} has no tokenizer; add its tokenizer files to the model folder.")
    if getattr(model, "hf_device_map", None) is None:
        try:
            model = model.to(place)
        except (RuntimeError, AssertionError) as error:
            raise ModelError(f"{name} cannot be moved to {place} ({first_line(error)}).") from None
        if place.type == "cpu":
            _leave_the_file(model)
    if found.is_gguf or found.adapter is not None:
        model.name_or_path = name  # the folder around the file, or the base model, is something else
    return LoadedModel(name, model.eval(), tokenizer, model_hash(model), calibration)


def _check_ends(name: str, model: PreTrainedModel) -> None:
    """Raise where the tokens that end a text are no numbers."""
    own = getattr(model.generation_config, "eos_token_id", None)
    ends = own if isinstance(own, list) else [] if own is None else [own]
    if not all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in ends):
        raise ModelError(f"The eos_token_id of {name} must be a token id or a list of them, not {own!r:.60}.")


def _leave_the_file(model: PreTrainedModel) -> None:
    """Copy weights that are mapped from a file into memory of their own, where a CPU decodes a tenth faster."""
    for weight in model.parameters():
        if type(weight) is torch.nn.Parameter:
            weight.data = weight.data.clone()


@contextmanager
def one_thread_if_small(model: PreTrainedModel) -> Iterator[None]:
    """Run a small model on a CPU with one thread, and restore the number of threads afterwards.

    Its operations are too short to be worth splitting, and where another job holds a core, every split waits for the
    scheduler: the bundled model's traces took 360 s on two threads of a busy two-core machine and 12 s on one. Results
    then do not depend on the number of cores either.
    """
    threads = torch.get_num_threads()
    small = input_device(model).type == "cpu" and model.num_parameters() < _SMALL
    if small:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if small:
            torch.set_num_threads(threads)


def _from_pretrained(
    found: Checkpoint, config: PreTrainedConfig, dtype: Any, device_map: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    options: dict[str, Any] = dict(found.options)
    if device_map is not None:
        need_package("accelerate", "A device map or a quantised checkpoint")
        options |= {"device_map": device_map, "offload_folder": tempfile.mkdtemp(prefix="reasonkv-offload-")}
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            found.source, config=config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except BaseException:
        shutil.rmtree(options.get("offload_folder", ""), ignore_errors=True)
        raise
    if "offload_folder" in options:  # holds weights that are not in a file of their own, as long as the model lives
        weakref.finalize(model, shutil.rmtree, options["offload_folder"], ignore_errors=True)
    return model, report


def _merge_adapter(model: PreTrainedModel, adapter: str) -> PreTrainedModel:
    """Return the model with a LoRA adapter in its weights, so that methods that read weights see what runs."""
    need_package("peft", "A LoRA adapter")
    from peft import PeftModel

    try:
        merged: PreTrainedModel = PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=True)
    except Exception as error:
        raise ModelError(
            f"The adapter {adapter} cannot be merged into the model ({first_line(error)}); give a LoRA adapter that "
            f"was trained on it."
        ) from None
    return merged


def _parsed_map(given: str | None) -> Any:
    """Return a device map as transformers takes it."""
    if given is None or not given.lstrip().startswith("{"):
        return given
    try:
        return dict(from_json(given))
    except ValueError:
        raise ModelError(
            f'The device map {given!r} is no JSON object such as {{"model": "cpu", "lm_head": 0}}.'
        ) from None


def _auto_dtype(
    found: Checkpoint, config: PreTrainedConfig, place: torch.device, has_bfloat16: Callable[[], bool]
) -> torch.dtype | str:
    if place.type != "cpu":
        return "auto"
    # what rounds a GGUF file's weights to bfloat16 changes them less than their own few bits did
    rounded = found.is_gguf or config.get_text_config().dtype == torch.bfloat16
    if not rounded or not has_bfloat16():
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
    except (RuntimeError, AssertionError, NotImplementedError, ImportError):
        device = torch.device("meta")
    if device.type == "meta":  # it holds no numbers
        raise ModelError(f"The device {name!r} is not available here; use --device cpu or auto.")
    return device
