"""What may be compared: the records of one folder and one budget rule."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from reasonkv.evaluate.manifest import ResultsError
from reasonkv.evaluate.table import read_manifest, read_results, summarize

_POLICIES = {"count": ", prompt compressible", "keep": ", prompt kept", "on_top": ", prompt kept on top", "": ""}


@dataclass(frozen=True)
class Folder:
    """A results folder: its name on the page, manifest and records."""

    path: Path
    name: str
    manifest: dict[str, Any]
    frame: pd.DataFrame


@dataclass(frozen=True)
class Cohort:
    """Records that may be compared with each other, full KV's among them."""

    folder: Folder
    name: str  # the job and the prompt policy in words
    frame: pd.DataFrame  # records of one budget rule
    summary: pd.DataFrame  # with regimes apart

    @property
    def kind(self) -> str:
        """`replay` or `evaluate`."""
        return str(self.frame["kind"].iloc[0])

    @property
    def prompt(self) -> str:
        """The budget's prompt policy; "" where only full KV ran."""
        return str(max(self.frame["prompt"]))


def read_folders(folders: Sequence[Path]) -> list[Folder]:
    """Read results folders.

    Raises:
        ResultsError: a folder holds no results, or is named twice.
        RecordError: a record is damaged.
    """
    real = [Path(os.path.realpath(one)) for one in folders]  # which, unlike `resolve`, takes links in a circle
    if len(set(real)) < len(folders):
        raise ResultsError("A results folder is named twice; name each once.")
    names = [one.name for one in real]
    return [
        Folder(one, name if names.count(name) == 1 else str(one), read_manifest(one), read_results([one]))
        for one, name in zip(folders, names, strict=True)
    ]


def model_name(manifest: Mapping[str, Any]) -> str:
    """Return the model's name; of one in a folder the folder's last part."""
    name = str(manifest.get("model", {}).get("name", "an unnamed model"))
    return Path(name).name if name.startswith(("/", "~", ".")) else name


def job_words(kind: str, prompt: str) -> str:
    """Return the job and how the prompt is treated, in a few words."""
    return ("Answers" if kind == "evaluate" else "Replay") + _POLICIES[prompt]


def cohorts(folders: Sequence[Folder]) -> list[Cohort]:
    """Return one cohort per folder and budget rule; answers first, for what stands for them comes after."""
    found = []
    for folder in folders:
        frame = folder.frame
        for rule in [one for one in frame["rule"].unique() if one] or [""]:
            # full KV stands in every cohort, so that differences to it pair the very problems of a regime
            own = frame[(frame["rule"] == rule) | (frame["tokens"] == 0)]
            name = job_words(own["kind"].iloc[0], max(own["prompt"]))
            found.append(Cohort(folder, name, own, summarize(own, regimes=True)))
    names = [one.name for one in found]
    named = [
        one if names.count(one.name) == 1 else replace(one, name=f"{one.name} ({one.folder.name})") for one in found
    ]
    return sorted(named, key=lambda one: one.kind != "evaluate")


def same_problems(one: Cohort, other: Cohort) -> bool:
    """Return whether both ran the same kind of job on the same model and problems, so that rows may be shared."""
    mine, theirs = one.folder.manifest, other.folder.manifest
    names = ("seed", "limit", "traces", "samples", "sampling")
    arguments = [[each.get("arguments", {}).get(name) for name in names] for each in (mine, theirs)]
    model = [each.get("model", {}).get("hash") for each in (mine, theirs)]
    return one.kind == other.kind and arguments[0] == arguments[1] and model[0] == model[1]
