"""`reasonkv report`, `frontier` and `demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from reasonkv.cli.console import print_json, show
from reasonkv.cli.flags import GROUPS, Json
from reasonkv.cli.mistakes import UsageError

FILES = Parameter(group=GROUPS["output"])


def report(
    *folders: Path, out: Annotated[Path, FILES] = Path("report.html"), title: str | None = None, json: Json = False
) -> None:
    """Turn results folders into one self-contained HTML page.

    Example: `reasonkv report results answers --out report.html`

    Figures, tables, regimes, trace inspections found in DIR/inspections, environment and commands; the file needs no
    network and no other file.

    Args:
        folders: Results folders.
        out: HTML file to write.
        title: Heading of the page.
    """
    from reasonkv.report.report import TITLE, write_report

    if not folders:
        raise UsageError("Give at least one results folder, as in: reasonkv report results.")
    if out.is_dir():
        raise UsageError(f"{out} is a folder; give --out a file name, as in {out / 'report.html'}.")
    path = write_report(folders, out, title=title or TITLE)
    size = path.stat().st_size
    if json:
        print_json({"report": str(path), "bytes": size})
    else:
        print(f"Report:  {show(path)} ({size / 2**20:.2f} MiB)")


def frontier(*folders: Path) -> None:
    """Say which budget each method needs."""


def demo() -> None:
    """See the main job on the bundled model: what ten methods keep of full KV, and whether the answers stay right."""
