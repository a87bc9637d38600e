"""What to calibrate on: frozen dataclasses that Python, a configuration file and the command line fill alike.

Nothing here imports torch before a job runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from reasonkv.calibration.corpus_job import CorpusJob

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from reasonkv.calibration.corpus import ProblemSource
    from reasonkv.calibration.statistics import Calibration

FEW_TOKENS = 2048
"""Averages over fewer tokens are rough."""


@dataclass(frozen=True, kw_only=True)
class CalibrateJob(CorpusJob):
    """Average a model's queries before RoPE, per layer, query head and rotary pair.

    TriAttention and CASK score cached keys with these averages. With `import_`, a file is read and converted instead.

    Args:
        batch_size: Windows at once.
        horizon: Also fit weights of the future distances, for triattention:horizon=variational.
        import_: Read this file (.safetensors, or the public code's .pt) instead of running a model.
        out: File to write (.safetensors). Unless given, the user's cache, where methods find it.
        export: Also write the public code's format (.pt).
        figure: Also draw the concentration of the queries (.png).
    """

    batch_size: int = 1
    horizon: bool = False
    import_: Path | None = None
    out: Path | None = None
    export: Path | None = None
    figure: Path | None = None


def run(
    job: CalibrateJob,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tasks: Sequence[ProblemSource] = (),
    name: str | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Calibration:
    """Calibrate a model as a job says; `write` writes the files.

    Args:
        job: what to average, without `import_`.
        model: a causal language model.
        tokenizer: its tokenizer.
        tasks: the tasks that `job.task` names.
        name: the model's name, for the record.
        progress: called with the tokens done; `job.tokens` are the most there will be.

    Raises:
        CalibrationError, CorpusError, UnsupportedModelError, RotaryError: see `collect` and `text_passages`.
    """
    from reasonkv.calibration.averages import collect
    from reasonkv.calibration.corpus import batches, read_corpus

    passages, source = read_corpus(job, model, tokenizer, tasks, batch_size=job.batch_size)
    rows = batches(passages, job.batch_size)
    return collect(model, rows, horizon=job.horizon, progress=progress, name=name, source=source)


def write(job: CalibrateJob, found: Calibration) -> dict[str, Path]:
    """Write the files that a job asks for, and return them by what they are: calibration, export, figure.

    Raises:
        OSError: a file cannot be written.
        ImportError: the figure needs the packages of `reasonkv[eval]`.
    """
    from reasonkv.calibration.files import export_pt, save_calibration
    from reasonkv.calibration.lookup import cached_calibration

    written = {}
    out = job.out if job.import_ is not None or found.model is None else job.out or cached_calibration(found.model)
    if out is not None:
        written["calibration"] = out
        save_calibration(out, found)
    if job.export is not None:
        written["export"] = job.export
        export_pt(found, job.export)
    if job.figure is not None:
        from reasonkv.calibration.figure import concentration_figure

        written["figure"] = concentration_figure(found, job.figure)
    return written
