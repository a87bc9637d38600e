"""Records of experiments in either form: results folders as `run` writes them, and the compressed copies in `docs/`.

Kept records are `NAME.jsonl.gz`, without the answers' texts, beside `NAME.manifest.json`; both forms go by the path
FOLDER/NAME. Whatever `summarize` reads, it reads here.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from reasonkv.evaluate.answers import AnswerRecord
from reasonkv.evaluate.manifest import MANIFEST
from reasonkv.evaluate.records import Record
from reasonkv.evaluate.results import Results, load_results
from reasonkv.files import write_atomically

LINES, ABOUT = ".jsonl.gz", ".manifest.json"


def result_paths(roots: Sequence[Path]) -> list[Path]:
    """What some folders hold, in either form: FOLDER/NAME, folders in the order given and names in theirs.

    Raises:
        SystemExit: a folder holds no results.

    """
    found = []
    for root in roots:
        inside = sorted(root.iterdir()) if root.is_dir() else []
        names = {path.name for path in inside if (path / MANIFEST).exists()}
        names |= {path.name.removesuffix(LINES) for path in inside if path.name.endswith(LINES)}
        if not names:
            raise SystemExit(f"{root} holds neither results folders nor kept records (NAME{LINES}).")
        found += [root / name for name in sorted(names)]
    return found


def is_kept(path: Path) -> bool:
    """Whether FOLDER/NAME are kept records; otherwise it is a results folder."""
    return not path.is_dir()


def load(path: Path) -> Results:
    """Read FOLDER/NAME in either form; the texts of kept answers are empty.

    Raises:
        OSError: there is no such file.
        ResultsError: a results folder holds none.
        RecordError: a record in a results folder is damaged.
        ValueError: a kept record is damaged.

    """
    if not is_kept(path):
        return load_results(path)
    manifest = json.loads(_beside(path, ABOUT).read_text())
    lines = gzip.decompress(_beside(path, LINES).read_bytes()).decode().splitlines()
    if manifest["command"] == "replay":
        return Results(path, manifest, records=[Record.from_json(line) for line in lines])
    whole = (json.dumps({**json.loads(line), "output": ""}) for line in lines)
    return Results(path, manifest, answers=[AnswerRecord.from_json(line) for line in whole])


def keep(results: Results, folder: Path) -> None:
    """Write the records without their texts, compressed, and the manifest. What is kept already lies where it lies.

    Raises:
        SystemExit: records of this name are there that these results lack, and would be lost.

    """
    if is_kept(results.folder):
        return
    folder.mkdir(parents=True, exist_ok=True)
    path, ours = folder / results.folder.name, [*results.records, *results.answers]
    if _beside(path, LINES).exists():
        there = load(path)
        lost = {one.key for one in (*there.records, *there.answers)} - {one.key for one in ours}
        if lost:
            raise SystemExit(
                f"{_beside(path, LINES)} holds {len(lost)} records that {results.folder} lacks and would lose them; "
                "name the folder that the results lie in differently, or delete that file."
            )
    lines = []
    for line in ours:
        data = {name: value for name, value in asdict(line).items() if name != "output"}
        lines.append(json.dumps(data) + "\n")
    # no time stamp inside, so that equal records give equal files
    write_atomically(_beside(path, LINES), gzip.compress("".join(lines).encode(), mtime=0))
    write_atomically(_beside(path, ABOUT), (json.dumps(results.manifest, indent=1) + "\n").encode())


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)  # with_suffix would cut a name that holds a point
