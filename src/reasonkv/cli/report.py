"""`reasonkv report`: one HTML file of one or more results folders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reasonkv.cli import common
from reasonkv.cli.common import expected_errors


@expected_errors
def report(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Results folders.")],
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("report.html"),
    title: Annotated[str | None, typer.Option(help="Heading of the page.")] = None,
    json: common.Json = False,
) -> None:
    """Turn results folders into one self-contained HTML page.

    Figures, tables, regimes, trace inspections found in DIR/inspections, environment and commands; the file needs no
    network and no other file.

    Example: [b]reasonkv report results --out report.html[/b]
    """
    from reasonkv.report.report import TITLE, write_report

    if out.is_dir():
        raise common.UsageError(f"{out} is a folder; give --out a file name, as in {out / 'report.html'}.")
    path = write_report(folders, out, title=title or TITLE)
    size = path.stat().st_size
    if json:
        common.print_json({"report": str(path), "bytes": size})
        return
    typer.echo(f"Report:  {common.show(path)} ({size / 2**20:.2f} MiB)")
