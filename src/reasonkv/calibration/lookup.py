"""Where a model's calibration is found: given, beside its weights, in the user's cache, or bundled."""

from __future__ import annotations

import os
from pathlib import Path

from transformers import PreTrainedModel

from reasonkv.calibration.files import load_calibration
from reasonkv.calibration.statistics import Calibration, CalibrationError
from reasonkv.identity import TESTBED_FOLDER, model_hash, shown_name

FILE = "reasonkv_calibration.safetensors"
"""Name of a calibration file inside a model folder."""


def find_calibration(model: PreTrainedModel, explicit: Path | str | None = None) -> Calibration:
    """The calibration of a model, checked against its configuration and its hash.

    Looked for in this order: `explicit`; `reasonkv_calibration.safetensors` in the model's folder; the user's cache,
    under the model's hash; the bundled model's own, which also serves copies of that model elsewhere.

    Args:
        model: a causal language model.
        explicit: a calibration file; then no other place is looked at.

    Raises:
        CalibrationError: there is none (the message is the command that makes one), or what was found is damaged or
            another model's.
    """
    digest = model_hash(model)
    if explicit is not None:
        return _checked(Path(explicit), model, digest)
    folder = Path(model.name_or_path).expanduser()
    for path in (folder / FILE, cached_calibration(digest)):
        if path.is_file():
            return _checked(path, model, digest)
    bundled = TESTBED_FOLDER / FILE
    if bundled.is_file() and load_calibration(bundled).model == digest:
        return _checked(bundled, model, digest)
    raise CalibrationError(
        f"There is no calibration for this model; make one with "
        f"`reasonkv calibrate --model {shown_name(model)} --text FILE`, where FILE is any long plain text."
    )


def cached_calibration(digest: str) -> Path:
    """Where the user's cache keeps the calibration of the model with this hash, whether or not it exists.

    The cache is `REASONKV_CACHE` if set, otherwise `reasonkv` in `XDG_CACHE_HOME` or `~/.cache`.
    """
    own = os.environ.get("REASONKV_CACHE")
    shared = os.environ.get("XDG_CACHE_HOME")
    root = Path(own).expanduser() if own else (Path(shared) if shared else Path.home() / ".cache") / "reasonkv"
    return root / "calibration" / f"{digest}.safetensors"


def _checked(path: Path, model: PreTrainedModel, digest: str) -> Calibration:
    found = load_calibration(path)
    try:
        found.check(model.config, digest)
    except CalibrationError as error:
        raise CalibrationError(f"{path} does not fit this model: {_lower(str(error))}") from None
    return found


def _lower(sentence: str) -> str:
    return sentence[0].lower() + sentence[1:]
