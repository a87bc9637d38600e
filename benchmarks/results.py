"""Make every table and figure of docs/results again from the records that are kept there.

python benchmarks/results.py                     # all; or some: families league cask claims prompt_share ..
python benchmarks/results.py --to elsewhere      # the same, beside the committed ones
python benchmarks/results.py keep league results/league    # first keep what run.py left there
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import cask
import claims
import families
import leaderboard
import league
import pretrained
import pretrained_league
import settings
from tables import RESULTS, keep

BUILDERS = {
    "families": families.build,
    "claims": claims.build,
    "cask": cask.build,
    "league": league.build,
    "prompt_share": cask.build_prompt_share,
    "pretrained": pretrained.build,
    "pretrained_league": pretrained_league.build,
    "leaderboard": leaderboard.build,
    "equal_bytes": settings.equal_bytes,
    "sensitivity": settings.build,
    "answers": pretrained.build_answers,
    "breadth": partial(pretrained.build, by="docs/results/breadth/README.md"),
    "layers": partial(pretrained.build, over=pretrained.ALIKE, by="docs/results/layers/README.md"),
    "lead": partial(pretrained.build, over="expected", by="docs/results/lead/README.md"),
}


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="experiments, or: keep NAME FOLDER...")
    parser.add_argument("--to", type=Path, default=RESULTS, help="where to write, instead of docs/results")
    chosen = parser.parse_args()
    if chosen.names[:1] == ["keep"]:
        keep(map(Path, chosen.names[2:]), RESULTS / chosen.names[1])
        return
    if unknown := [name for name in chosen.names if name not in BUILDERS]:
        parser.error(f"there is no experiment {unknown[0]}; there are {', '.join(BUILDERS)}")
    for name in chosen.names or BUILDERS:
        (chosen.to / name).mkdir(parents=True, exist_ok=True)
        BUILDERS[name](RESULTS / name, chosen.to / name)


if __name__ == "__main__":
    main()
