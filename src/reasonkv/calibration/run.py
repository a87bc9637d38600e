"""Calibrate a model as a job says, and write the files that it asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reasonkv.calibration.corpus import batches, read_corpus
from reasonkv.calibration.files import cached_calibration, save_calibration
from reasonkv.calibration.job import CalibrateJob
from reasonkv.calibration.public import export_pt
from reasonkv.calibration.queries import collect
from reasonkv.calibration.statistics import Calibration
from reasonkv.tasks import Task


def run(
    job: CalibrateJob,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tasks: Sequence[Task] = (),
    name: str | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Calibration:
    """Calibrate a model as a job without `import_` says; `write` writes the files.

    Args:
        tasks: those that `job.task` names.
        name: the model's, for the record.
        progress: called with the tokens done; `job.tokens` are the most there will be.

    Raises:
        CalibrationError, CorpusError, UnsupportedModelError, RotaryError: see `collect` and `text_passages`.
    """
    passages, source = read_corpus(job, model, tokenizer, tasks)
    rows = batches(passages, job.batch_size)
    return collect(model, rows, horizon=job.horizon, progress=progress, name=name, source=source)


def write(job: CalibrateJob, found: Calibration) -> dict[str, Path]:
    """Write the files that a job asks for, and return them by what they are: calibration, export, figure.

    Raises:
        OSError: a file cannot be written.
        ImportError: the figure needs the packages of `reasonkv[eval]`.
    """
    written = {}
    out = job.out if job.import_ is not None or found.model is None else job.out or cached_calibration(found.model)
    if out is not None:
        save_calibration(out, found)
        written["calibration"] = out
    if job.export is not None:
        export_pt(found, job.export)
        written["export"] = job.export
    if job.figure is not None:
        from reasonkv.calibration.figure import concentration_figure

        written["figure"] = concentration_figure(found, job.figure)
    return written
