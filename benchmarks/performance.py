"""Make the tables of the pages of performance again from the JSON files of `benchmarks/results`, one folder a machine.

python benchmarks/performance.py            # rewrites the block between the two marks of every page
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from timing import RESULTS

from reasonkv import get_method
from reasonkv.files import write_atomically
from reasonkv.methods import method_names

DOCS = Path(__file__).parents[1] / "docs"
PAGES = {RESULTS: DOCS / "performance.md", RESULTS / "amx": DOCS / "performance-amx.md"}
BEGIN, END = "<!-- made by benchmarks/performance.py -->", "<!-- end of what it made -->"
Row = Mapping[str, Any]
STOCK = ("stock", "static")


def number(value: Any) -> str:
    """Return a cell: three significant digits, no exponent."""
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 99.5 else f"{value:.3g}"


def table(rows: Iterable[Row], *columns: str, brackets: bool = True) -> str:
    """Return a Markdown table of some columns, or of all; an interval stands in brackets behind its column."""
    rows = [with_brackets(row) if brackets else row for row in rows]
    names = columns or tuple(rows[0])
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    lines += [f"| {' | '.join(number(row.get(name)) for name in names)} |" for row in rows]
    return "\n".join(lines) + "\n"


def with_brackets(row: Row) -> Row:
    """Return a row with each interval, which one round does not have, behind the column before it."""
    found, names = dict[str, Any](), list(row)
    for name, low, high in zip(names, [*names[1:], ""], [*names[2:], "", ""], strict=True):
        if low.endswith("low"):
            bounds = f" ({row[low]:.2f} to {row[high]:.2f})" if row[low] != row[high] else ""
            found[name] = f"{row[name]:.2f}{bounds}"
        elif not name.endswith(("low", "high")):
            found[name] = row[name]
    return found


def about(found: Row) -> str:
    """Return where and how something was measured."""
    where = found["environment"]
    versions = f"torch {where['torch']}, transformers {where['transformers']}"
    left = f" Not measured: {', '.join(map(str, found['left_out']))}." if found.get("left_out") else ""
    return f"{where['device']}, {where['threads']} threads, {versions}, commit {where['commit']}.{left}\n"


def by_cell(found: Row) -> list[str]:
    """Return a table a model, batch and budget."""
    parts, cells = [], dict[tuple[Any, ...], list[Row]]()
    for row in found["rows"]:
        short = {name.replace("over stock, answers of", "over stock,"): value
                 for name, value in with_brackets(row).items()}  # fmt: skip
        cells.setdefault((row["model"], row["batch"], row["budget"]), []).append(short)
    for cell, rows in cells.items():
        steps = (
            "step p50 ms",
            "step p99 ms",
            "of the floor",
            "ms per compaction",
            "compactions, % of decoding",
            "KV MB",
        )
        names = [name for name in rows[0] if name.startswith(("tokens/s", "over stock"))]
        columns = ("cache", *sorted(names, key=lambda name: name.startswith("over stock")), *steps)
        parts += ["**{}, batch {}, budget {}**\n".format(*cell), table(rows, *columns)]
    return parts


SECTIONS: dict[str, tuple[str, dict[str, str]]] = {
    "decode": ("Decoding", {
        "rows": "", "equal": "Nothing dropped: a step of ours and of stock at equal length",
        "lengths": "Steps of caches that hold every token", "check": "Seconds summed from windows, and of a whole run",
    }),
    "against_kvpress": ("Beside kvpress", {"rows": ""}),
    "serving_load": ("vLLM under load", {"rows": ""}),
    "scaling": ("Scaling", {
        "slopes": "Slopes with 95 % intervals", "rows": "Points", "flat": "Flat in the logical length",
    }),
    "prefill": ("Long prompts", {"rows": ""}),
    "rates": ("Replay, evaluate, start-up", {"rows": "", "start": ""}),
    "floor": ("Floors and their profiles", {"rows": ""}),
}  # fmt: skip
"""Heading of every script's section, and headings of the tables in its file."""
LOAD = (
    "requests", "cache", "tokens/s", "first token p50 s", "first token p99 s", "inter-token p50 ms",
    "inter-token p99 ms", "preemptions", "blocks in use, mean", "blocks in use, peak", "running, peak", "over stock",
    "of the ceiling",
)  # fmt: skip

EQUAL = ("model", "batch", "tokens held", "rows", "stock ms", "ours ms", "ours over stock")


def section(name: str, found: Row) -> list[str]:
    """Return the tables of a script's file."""
    parts = []
    for part, heading in SECTIONS[name][1].items():
        parts += [f"**{heading}**\n"] if heading and found[part] else []
        if name == "decode" and part == "rows":
            parts += by_cell(found)
        elif found[part]:
            columns = LOAD if name == "serving_load" else EQUAL if part == "equal" else ()
            parts.append(table(found[part], *columns, brackets=part != "slopes"))
    return parts


def with_ceiling(rows: Sequence[Row]) -> list[Row]:
    """Return rows with what a cache serves of the ceiling: the load's best rate, if compactions took no time."""
    frame = pd.DataFrame(rows)
    free = frame["tokens/s"] / (1 - frame["compactions, share of step time"])
    ceiling = free.groupby(frame["requests"]).transform("max")
    return [{**row, "of the ceiling": share} for row, share in zip(rows, frame["tokens/s"] / ceiling, strict=True)]


def judged(goal: str, values: Sequence[tuple[str, float]], bound: float, *, least: bool = True) -> Row:
    """Return a row of the targets: the worst value decides."""
    if not values:
        return {"target": goal, "met": "not measured", "worst": "-", "of": "-"}
    name, worst = min(values, key=lambda one: one[1] if least else -one[1])
    met = sum((value >= bound) if least else (value <= bound) for _, value in values)
    verdict = "yes" if met == len(values) else "no"
    return {"target": goal, "met": verdict, "worst": f"{number(worst)} ({name})", "of": f"{met} of {len(values)}"}


def values_of(target: Row, found: Mapping[str, Row]) -> list[tuple[str, float]]:
    """Return what a target is judged by: names and numbers; none where its file or its column is not there."""
    frame = pd.DataFrame(found.get(target["file"], {}).get(target.get("part", "rows"), ()))
    if target["column"] not in {*frame.columns, "p99 over p50"} or frame.empty:
        return []
    if "cache" in frame:
        known = {one: get_method(name).needs for one in frame["cache"].unique()
                 if (name := one.partition(",")[0]) in method_names()}  # fmt: skip
        free = {one: not (needs.queries or needs.observes) for one, needs in known.items()}
        frame = frame.assign(bounded=~frame["cache"].isin(STOCK), query_free=frame["cache"].map(free).eq(True))
    if "step p99 ms" in frame:
        frame["p99 over p50"] = frame["step p99 ms"] / frame["step p50 ms"]
    rows = (frame.query(target["where"]) if "where" in target else frame).to_dict("records")
    return [(target["name"].format(**row), row[target["column"]]) for row in rows]


def targets(found: Mapping[str, Row]) -> list[Row]:
    """Return every target of speed with yes, no, or not measured."""
    return [
        judged(one["goal"], values_of(one, found), one.get("least", one.get("most")), least="least" in one)
        for one in yaml.safe_load(Path(__file__).with_name("targets.yaml").read_text())
    ]


def block(results: Path = RESULTS) -> str:
    """Return all tables."""
    found = {name: json.loads((results / f"{name}.json").read_text())
             for name in SECTIONS if (results / f"{name}.json").exists()}  # fmt: skip
    if "serving_load" in found:
        found["serving_load"]["rows"] = with_ceiling(found["serving_load"]["rows"])
    parts = ["## Targets\n", table(targets(found))]
    for name, (heading, _) in SECTIONS.items():
        parts.append(f"## {heading}\n")
        if name in found:
            parts += [f"{found[name]['title']}.\n", *section(name, found[name]), about(found[name])]
        else:
            parts.append(f"Not measured yet; `python benchmarks/{name}.py` does it.\n")
    return "\n".join(parts)


def with_block(page: str, made: str) -> str:
    """Return a page with its marked block replaced."""
    head, _, rest = page.partition(BEGIN)
    return f"{head}{BEGIN}\n\n{made}\n{END}{rest.partition(END)[2]}"


def main(argv: Sequence[str] | None = None) -> None:
    """Parse and rewrite the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(argv)
    for results, page in PAGES.items():
        write_atomically(page, with_block(page.read_text(), block(results)).encode())
        print(f"written to {page.relative_to(DOCS.parent)}")


if __name__ == "__main__":
    main()
