"""Make the tables of docs/performance.md again from the JSON files of `benchmarks/results`.

python benchmarks/performance.py            # rewrites the block between the two marks of the page
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from timing import RESULTS

from reasonkv import get_method
from reasonkv.files import write_atomically

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
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


def table(rows: Iterable[Row], *columns: str) -> str:
    """Return a Markdown table of some columns, or of all."""
    rows = list(rows)
    names = columns or tuple(rows[0])
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    lines += [f"| {' | '.join(number(row.get(name)) for name in names)} |" for row in rows]
    return "\n".join(lines) + "\n"


def bracketed(row: Row, middle: str, low: str = "95 % low", high: str = "95 % high") -> str:
    """Return a ratio with its interval, which one round does not have."""
    if row[low] == row[high]:
        return f"{row[middle]:.2f}"
    return f"{row[middle]:.2f} ({row[low]:.2f} to {row[high]:.2f})"


def about(found: Row) -> str:
    """Return where and how something was measured."""
    where = found["environment"]
    versions = f"torch {where['torch']}, transformers {where['transformers']}"
    left = f" Not measured: {', '.join(map(str, found['left_out']))}." if found.get("left_out") else ""
    return f"{where['device']}, {where['threads']} threads, {versions}, commit {where['commit']}.{left}\n"


def decode(found: Row) -> list[str]:
    """Return the tables of `decode.py`."""
    parts, answers = [], found["options"]["answers"]
    cells = list(dict.fromkeys((row["model"], row["batch"], row["budget"]) for row in found["rows"]))
    for cell in cells:
        own = [row for row in found["rows"] if (row["model"], row["batch"], row["budget"]) == cell]
        shown = [
            {"cache": row["cache"],
             **{f"tokens/s, answers of {n}": row[f"tokens/s, answers of {n}"] for n in answers},
             **{f"over stock, {n}": bracketed(row, f"over stock, answers of {n}", f"{n}, low", f"{n}, high")
                for n in answers},
             **{name: row[name] for name in ("step p50 ms", "step p99 ms", "of the floor", "ms per compaction",
                                             "compactions, % of decoding", "KV MB")}}
            for row in own
        ]  # fmt: skip
        parts += [f"**{cell[0]}, batch {cell[1]}, budget {cell[2]}**\n", table(shown)]
    equal = [
        {**row, "ours over stock": bracketed(row, "ours over stock")}
        for row in found["equal"]
    ]  # fmt: skip
    names = ("model", "batch", "tokens held", "rows", "stock ms", "ours ms", "ours over stock")
    parts += ["**Nothing dropped: a step of ours and of stock at equal length**\n", table(equal, *names)]
    parts += ["**Steps of caches that hold every token**\n", table(found["lengths"])]
    if found["check"]:
        parts += ["**Seconds summed from windows, and of a whole run**\n", table(found["check"])]
    return parts


def kvpress(found: Row) -> list[str]:
    """Return the table of `against_kvpress.py`."""
    rows = [{**row, "ours over kvpress": bracketed(row, "ours over kvpress")} for row in found["rows"]]
    return [table(rows, *(name for name in found["rows"][0] if not name.startswith("95 %")))]


def rates(found: Row) -> list[str]:
    """Return the tables of `rates.py`."""
    rows = [{**row, "of it": bracketed(row, "of it")} for row in found["rows"]]
    return [table(rows, "what", "cache", "tokens/s", "beside", "of it", "time over the floor's"), table(found["start"])]


def scaling(found: Row) -> list[str]:
    """Return the tables of `scaling.py`."""
    flat = [{**row, "time over": bracketed(row, "time over")} for row in found["flat"]]
    parts = ["**Slopes with 95 % intervals**\n", table(found["slopes"]), "**Points**\n", table(found["rows"])]
    return parts + (["**Flat in the logical length**\n", table(flat, "from", "to", "time over")] if flat else [])


def whole(found: Row) -> list[str]:
    """Return the only table of a file, as it is."""
    return [table(found["rows"])]


SECTIONS = {
    "decode": ("Decoding", decode), "against_kvpress": ("Beside kvpress", kvpress),
    "serving_load": ("vLLM under load", whole), "scaling": ("Scaling", scaling), "prefill": ("Long prompts", whole),
    "rates": ("Replay, evaluate, start-up", rates), "floor": ("Floors and their profiles", whole),
}  # fmt: skip


def is_query_free(method: str) -> bool:
    """Return whether a method reads no queries."""
    needs = get_method(method.partition(",")[0]).needs
    return not (needs.queries or needs.observes)


def judged(goal: str, values: Sequence[tuple[str, float]], bound: float, *, least: bool = True) -> Row:
    """Return a row of the targets: the worst value decides."""
    if not values:
        return {"target": goal, "met": "not measured", "worst": "-", "of": "-"}
    name, worst = min(values, key=lambda one: one[1] if least else -one[1])
    met = sum((value >= bound) if least else (value <= bound) for _, value in values)
    verdict = "yes" if met == len(values) else "no"
    return {"target": goal, "met": verdict, "worst": f"{number(worst)} ({name})", "of": f"{met} of {len(values)}"}


def targets(found: Mapping[str, Row]) -> list[Row]:
    """Return every target of speed with yes, no, or not measured."""

    def rows(name: str, part: str = "rows") -> list[Row]:
        return list(found[name][part]) if name in found else []

    bounded = [row for row in rows("decode") if row["cache"] not in STOCK]
    cell = [row for row in bounded if (row["batch"], row["budget"]) == (32, 512)]
    beside = [row for row in rows("against_kvpress") if (row["batch"], row["budget"]) == (32, 512)]
    longest = f"over stock, answers of {max(found['decode']['options']['answers'])}" if "decode" in found else ""
    shares = [(f"{row['cache']}, batch {row['batch']}", row["compactions, % of decoding"], row["cache"])
              for row in bounded]  # fmt: skip
    load = [row for row in rows("serving_load") if row["requests"] == 256 and row["cache"] != "stock"]
    replayed = [row for row in rows("rates") if row["what"] == "replay" and row["cache"] != row["beside"]]
    return [
        judged("1.5B, batch 32, answers to 4k, budget 512: at least 1.5 x stock",
               [(row["cache"], row[longest]) for row in cell], 1.5),
        judged("the same cell: at least 2 x kvpress",
               [(row["method"], row["ours over kvpress"]) for row in beside], 2.0),
        judged("compactions at most 3 % of decoding, interval 128", [one[:2] for one in shares], 3.0, least=False),
        judged("methods without queries: at most 1.5 %",
               [one[:2] for one in shares if is_query_free(one[2])], 1.5, least=False),
        judged("the 99th percentile of steps within 1.3 x the median, layers in turns",
               [(f"{row['model']}, {row['cache']}, batch {row['batch']}", row["step p99 ms"] / row["step p50 ms"])
                for row in bounded if "turns" in row["cache"]], 1.3, least=False),
        judged("nothing dropped: at least 1.0 x stock",
               [(f"{row['model']}, batch {row['batch']}, {row['tokens held']} tokens", row["ours over stock"])
                for row in rows("decode", "equal")], 1.0),
        judged("time per step flat within 5 % up to 64k",
               [(f"{row['to']} tokens", row["time over"]) for row in rows("scaling", "flat")], 1.05, least=False),
        judged("a long prompt in chunks with compactions: at most 1.2 x its floor",
               [(f"{row['prompt']}, {row['tokens']} tokens", row["of the floor"]) for row in rows("prefill")
                if not row["prompt"].startswith("stock")], 1.2, least=False),
        judged("a decode step within 1.5 x of the floor",
               [(f"{row['model']}, {row['cache']}, batch {row['batch']}", row["of the floor"]) for row in bounded], 1.5,
               least=False),
        judged("vLLM, 256 requests: at least 2.5 x stock", [(row["cache"], row["over stock"]) for row in load], 2.5),
        judged("replay at least 80 % of the prompt rate, methods without queries",
               [(row["cache"], row["of it"]) for row in replayed if is_query_free(row["cache"])], 0.8),
        judged("GPU: at least 5 x dynamic full KV at batch 16, 16k out", [], 5.0),
    ]  # fmt: skip


def block(results: Path = RESULTS) -> str:
    """Return all tables."""
    found = {name: json.loads((results / f"{name}.json").read_text())
             for name in SECTIONS if (results / f"{name}.json").exists()}  # fmt: skip
    parts = ["## Targets\n", table(targets(found))]
    for name, (heading, build) in SECTIONS.items():
        parts.append(f"## {heading}\n")
        if name in found:
            parts += [f"{found[name]['title']}.\n", *build(found[name]), about(found[name])]
        else:
            parts.append(f"Not measured yet; `python benchmarks/{name}.py` does it.\n")
    return "\n".join(parts)


def with_block(page: str, made: str) -> str:
    """Return a page with its marked block replaced."""
    head, _, rest = page.partition(BEGIN)
    return f"{head}{BEGIN}\n\n{made}\n{END}{rest.partition(END)[2]}"


def main(argv: Sequence[str] | None = None) -> None:
    """Parse and rewrite the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(argv)
    write_atomically(PAGE, with_block(PAGE.read_text(), block()).encode())
    print(f"written to {PAGE.relative_to(PAGE.parents[1])}")


if __name__ == "__main__":
    main()
