"""The results folder: which command it belongs to, and that one process writes it at a time."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from typing_extensions import TypedDict

from reasonkv.errors import ReasonKVError
from reasonkv.evaluate.records import Budgeted
from reasonkv.evaluate.settings import Sampling, TraceSettings
from reasonkv.files import NO_LINKS, write_atomically
from reasonkv.identity import package_versions
from reasonkv.inputs import Count, Number, Whole, parse_json, read_json
from reasonkv.tasks.options import TaskOptions

MANIFEST = "manifest.json"
FORMAT = 2
"""Raised when records of a method get other options: a folder is continued only in its own format."""
_LOCK = ".lock"


class ResultsError(ReasonKVError, ValueError):
    """A results folder that this command cannot use; the message says why and what to do."""


class Arguments(BaseModel):
    """Types of the arguments that any command records; each records its own."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)
    dtype: str | None = None
    endpoint: str | None = None
    server_seed: Whole | None = None
    task: list[str] = Field(default_factory=list)
    methods: list[str] = Field(default_factory=list)
    budgets: list[Budgeted] = Field(default_factory=list)
    mean_slots: list[Number] = Field(default_factory=list)
    limit: Count | None = None
    seed: Whole | None = None
    options: TaskOptions = TaskOptions()
    calibration: str | None = None
    samples: Count | None = None
    sampling: Sampling | None = None
    max_new_tokens: Count | None = None
    traces: TraceSettings = TraceSettings()
    diagnostics: bool = False
    given: str | None = None

    @classmethod
    def of(cls, written: Mapping[str, Any]) -> Arguments:
        """Return the arguments that a manifest has written down.

        Raises:
            ValidationError: a type is wrong.
        """
        return parse_json(json.dumps(written), cls)


def _typed(written: dict[str, Any]) -> dict[str, Any]:
    Arguments.of(written)
    return written


class Weights(TypedDict):
    """The name of a model as the user gave it, and its hash."""

    name: str
    hash: str


class Manifest(BaseModel):
    """What wrote a results folder."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    command: str
    # every argument that decides which records there are and what is in them; how they are computed (batch size,
    # device) is left out, so that a run may be continued elsewhere
    arguments: Annotated[dict[str, Any], AfterValidator(_typed)]
    model: Weights  # the model's name and hash
    device: str  # where the run began, in words
    # versions of Python and of the packages that decide results
    versions: dict[str, str] = Field(default_factory=package_versions)
    # when the run began, UTC
    date: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    format: int = FORMAT  # version of the folder's format; folders that name none have 1

    @property
    def run(self) -> str:
        """Twelve hex digits that stand for the command, its arguments and the model's weights."""
        identity = json.dumps([self.command, self.arguments, self.model["hash"]], sort_keys=True)
        return hashlib.sha256(identity.encode()).hexdigest()[:12]

    def to_dict(self) -> dict[str, Any]:
        """Return what `write` writes."""
        return {"run": self.run, **self.model_dump()}

    def write(self, path: Path) -> None:
        """Write to `path`, whole or not at all."""
        write_atomically(path, (json.dumps(self.to_dict(), indent=2) + "\n").encode())

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Return the manifest in a file.

        Raises:
            ResultsError: it cannot be read.
        """
        advice = "run its command again in another --out folder"
        return read_json(path, _Written, "a manifest", ResultsError, advice)

    def difference(self, wanted: Manifest) -> str | None:
        """Return the first thing in which the manifest a command wants differs from this one, in words."""
        if self.command != wanted.command:
            return f"{self.command}, not {wanted.command}"
        if self.model["hash"] != wanted.model["hash"]:
            return f"model {self.model['name']} with other weights"
        for name in sorted({*self.arguments, *wanted.arguments}):
            before, now = self.arguments.get(name), wanted.arguments.get(name)
            if before != now:
                return f"{name} {_text(before)}, not {_text(now)}"
        return None


class _Written(Manifest):
    """A manifest as a file has it: what it does not say is not known."""

    device: str = "?"
    versions: dict[str, str] = Field(default_factory=dict)
    date: str = "?"
    format: int = 1


@contextmanager
def open_results(folder: Path, manifest: Manifest) -> Iterator[Path]:
    """Hold a results folder for one process; a new folder gets the manifest, a known one must have an equal one.

    Yields:
        The folder.

    Raises:
        ResultsError: the folder belongs to another command or other arguments, holds something else, cannot be
            written, or is being written by another process.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | NO_LINKS, 0o644)
    except OSError as error:
        raise ResultsError(f"{folder} cannot be used for results: {error.strerror}; choose another --out.") from None
    try:
        _lock(descriptor, folder)
        _claim(folder, manifest)
        yield folder
    finally:
        os.close(descriptor)  # the lock goes with it, and would go with a killed process too


def _lock(descriptor: int, folder: Path) -> None:
    try:
        import fcntl
    except ImportError:  # no such locks on Windows
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ResultsError(
            f"Another process is writing {folder}; wait for it to end, or choose another --out."
        ) from None


def _claim(folder: Path, manifest: Manifest) -> None:
    path = folder / MANIFEST
    if not path.exists():
        if any(not entry.name.startswith(".") for entry in folder.iterdir()):
            raise ResultsError(f"{folder} holds files that are not results of reasonkv; choose another --out folder.")
        manifest.write(path)
        return
    found = Manifest.read(path)
    if found.format != manifest.format:
        age = "an older" if found.format < manifest.format else "a later"
        raise ResultsError(
            f"{folder} was written by {age} version of reasonkv, which can be read but not continued; choose another "
            f"--out folder."
        )
    if difference := found.difference(manifest):
        raise ResultsError(
            f"{folder} holds results of another command ({difference}); choose another --out folder, or repeat "
            f"that command to continue it."
        )


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(_text(one) for one in value)
    if isinstance(value, dict):
        return ",".join(f"{key}={_text(one)}" for key, one in value.items())
    return str(value)
