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
    """Return a model's calibration, checked against its configuration and its hash.

    Looked for in this order: `explicit`; `reasonkv_calibration.safetensors` in the model's folder; the user's cache,
    under the model's hash; the bundled model's own, which also serves copies of that model elsewhere.

    Raises:
        CalibrationError: there is none (the message is the command that makes one), or what was found is damaged or
            another model's.
    """
    digest = model_hash(model)
    own, bundled = Path(str(model.name_or_path)).expanduser() / FILE, TESTBED_FOLDER / FILE
    path = Path(explicit) if explicit is not None else own if own.is_file() else cached_calibration(digest)
    if explicit is None and not path.is_file() and bundled.is_file() and load_calibration(bundled).model == digest:
        path = bundled
    if explicit is None and not path.is_file():
        raise CalibrationError(
            f"There is no calibration for this model; make one with "
            f"`reasonkv calibrate --model {shown_name(model)} --text FILE`, where FILE is any long plain text."
        )
    found = load_calibration(path)
    try:
        found.check(model.config, digest)
    except CalibrationError as error:
        sentence = str(error)
        raise CalibrationError(f"{path} does not fit this model: {sentence[0].lower()}{sentence[1:]}") from None
    return found


def cached_calibration(digest: str) -> Path:
    """Return where the user's cache keeps the calibration of the model with this hash, whether or not it exists.

    The cache is `REASONKV_CACHE` if set, otherwise `reasonkv` in `XDG_CACHE_HOME` or `~/.cache`.
    """
    own, shared = os.environ.get("REASONKV_CACHE"), os.environ.get("XDG_CACHE_HOME")
    root = Path(own).expanduser() if own else (Path(shared) if shared else Path.home() / ".cache") / "reasonkv"
    return root / "calibration" / f"{digest}.safetensors"
