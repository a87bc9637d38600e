"""What to calibrate on: frozen dataclasses that Python, a configuration file and the command line fill alike.

Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from reasonkv.errors import ReasonKVError

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
        window: Most tokens of a sequence. Unless given, windows of a text have 4,096 tokens (1,024 with eager
            attention), and traces are as long as the model's context.

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
            is_count = isinstance(value, int) and not isinstance(value, bool) and name not in ("seed", "warmup")
            if is_count and not 1 <= value < 2**31:
                raise CorpusError(f"{name} must be at least 1 and below 2^31, not {value}.")
            if isinstance(value, float) and not 0 < value < float("inf"):
                raise CorpusError(f"{name} must be a number above 0, not {value}.")
            if isinstance(value, Path) and value.suffix != _FILES.get(name, "") != "":
                raise CorpusError(f"{name} writes a {_FILES[name]} file, not {value.name}.")


@dataclass(frozen=True, kw_only=True)
class CalibrateJob(CorpusJob):
    """Average a model's queries before RoPE, per layer, query head and rotary pair.

    TriAttention and CASK score cached keys with these averages. With `import_`, a file is read and converted instead.

    Args:
        batch_size: Windows at once.
        horizon: Also fit weights of the future distances, for triattention:horizon=variational.
        forecast: Also fit the networks of the method forecast. Of a task without reference traces, the model answers
            the problems first.
        without_queries: With forecast, networks that see no queries, for forecast:window=0, which stores none.
        layer_shares: Also measure what each layer loses when it alone evicts, for a budget with
            layer_shares=calibrated. It takes as many replays of the texts (16 of them at most) as the model has
            layers. Networks and shares that are there already are kept.
        import_: Read this file (.safetensors, or the public code's .pt) instead of running a model.
        out: File to write (.safetensors). Unless given, the user's cache, where methods find it.
        export: Also write the public code's format (.pt).
        figure: Also draw the concentration of the queries (.png).
    """

    batch_size: int = 1
    horizon: bool = False
    forecast: bool = False
    without_queries: bool = False
    layer_shares: bool = False
    import_: Path | None = None
    out: Path | None = None
    export: Path | None = None
    figure: Path | None = None
