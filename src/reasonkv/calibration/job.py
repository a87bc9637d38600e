"""What to calibrate on: frozen dataclasses that Python, a configuration file and the command line fill alike.

Nothing here imports torch before a job runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from reasonkv.errors import ReasonKVError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from reasonkv.calibration.corpus import ProblemSource
    from reasonkv.calibration.statistics import Calibration

_FILES = {"out": ".safetensors", "import_": "", "export": ".pt", "figure": ".png"}


class CorpusError(ReasonKVError, ValueError):
    """A text that cannot be read, or a job whose fields contradict each other; the message is one sentence."""


@dataclass(frozen=True, kw_only=True)
class CorpusJob:
    """A job that runs a model over a text, or over prompts and reference traces of tasks.

    Args:
        text: Plain text file in UTF-8.
        task: Tasks instead of a text, with dials: program, recall:distance=900. Problems are of the training split.
        limit: Problems per task.
        seed: Seed of the problems.
        tokens: Most tokens in all.
        window: Most tokens of a sequence. Unless given, windows of a text need about 1 GB of work memory for an
            8B model, and traces are as long as the model's context.

    Raises:
        CorpusError: a number below 1, a wrong file ending, or not exactly one source of text.
    """

    text: Path | None = None
    task: Sequence[str] = ()
    limit: int = 16
    seed: int = 0
    tokens: int = 32768
    window: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "task", (self.task,) if isinstance(self.task, str) else tuple(self.task))
        sources = {name: getattr(self, name) for name in ("text", "task", "import_") if hasattr(self, name)}
        if sum(bool(source) for source in sources.values()) != 1:
            names = " and ".join(name.strip("_") for name in sources)
            raise CorpusError(f"Give exactly one of {names}.")
        for name, value in vars(self).items():
            if isinstance(value, int) and value < 1 and name not in ("seed", "horizon", "warmup"):
                raise CorpusError(f"{name} must be at least 1, not {value}.")
            if isinstance(value, Path) and value.suffix != _FILES.get(name, "") != "":
                raise CorpusError(f"{name} writes a {_FILES[name]} file, not {value.name}.")


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
    """Calibrate a model as a job without `import_` says; `write` writes the files.

    Args:
        job: what to average.
        model: a causal language model.
        tokenizer: its tokenizer.
        tasks: the tasks that `job.task` names.
        name: the model's name, for the record.
        progress: called with the tokens done; `job.tokens` are the most there will be.

    Raises:
        CalibrationError, CorpusError, UnsupportedModelError, RotaryError: see `collect` and `text_passages`.
    """
    from reasonkv.calibration.corpus import batches, read_corpus
    from reasonkv.calibration.queries import collect

    passages, source = read_corpus(job, model, tokenizer, tasks)
    rows = batches(passages, job.batch_size)
    return collect(model, rows, horizon=job.horizon, progress=progress, name=name, source=source)


def write(job: CalibrateJob, found: Calibration) -> dict[str, Path]:
    """Write the files that a job asks for, and return them by what they are: calibration, export, figure.

    Raises:
        OSError: a file cannot be written.
        ImportError: the figure needs the packages of `reasonkv[eval]`.
    """
    from reasonkv.calibration.files import cached_calibration, save_calibration

    written = {}
    out = job.out if job.import_ is not None or found.model is None else job.out or cached_calibration(found.model)
    if out is not None:
        save_calibration(out, found)
        written["calibration"] = out
    if job.export is not None:
        from reasonkv.calibration.public import export_pt

        export_pt(found, job.export)
        written["export"] = job.export
    if job.figure is not None:
        from reasonkv.calibration.figure import concentration_figure

        written["figure"] = concentration_figure(found, job.figure)
    return written
