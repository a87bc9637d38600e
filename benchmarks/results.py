"""Make every table and figure of docs/results again from the records that are kept there.

python benchmarks/results.py                     # all; or some: families league cask claims
python benchmarks/results.py --to elsewhere      # the same, beside the committed ones
python benchmarks/results.py keep league results/league    # first keep what run.py left there
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cask_tables
import claims_tables
import families_tables
import league_tables
from cells import RESULTS, keep

from reasonkv.evaluate.table import KEPT

BUILDERS = {
    "families": families_tables.build,
    "claims": claims_tables.build,
    "cask": cask_tables.build,
    "league": league_tables.build,
    "prompt_share": cask_tables.build_prompt_share,
}


def build(names: list[str], to: Path | None = None) -> None:
    """Write tables and figures of some experiments into their folders, or into folders of the same name elsewhere."""
    for name in names:
        folder = (to or RESULTS) / name
        folder.mkdir(parents=True, exist_ok=True)
        BUILDERS[name](RESULTS / name, folder)


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="experiments, or: keep NAME FOLDER...")
    parser.add_argument("--to", type=Path, help="where to write, instead of docs/results")
    chosen = parser.parse_args()
    if chosen.names[:1] == ["keep"]:
        keep(map(Path, chosen.names[2:]), RESULTS / chosen.names[1])
        return
    unknown = [name for name in chosen.names if name not in BUILDERS]
    if unknown:
        parser.error(f"there is no experiment {unknown[0]}; there are {', '.join(BUILDERS)}")
    build(chosen.names or [name for name in BUILDERS if (RESULTS / name / KEPT).exists()], chosen.to)


if __name__ == "__main__":
    main()
