"""Tables for the terminal, made from summaries, and the sentences under them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
from rich import box
from rich.table import Table

from reasonkv.evaluate.job import Sampling
from reasonkv.report.metrics import DIAGNOSTICS, KNOWN
from reasonkv.report.wording import PROMPT_WORDS, budget_sentence, difference_text, listed, seeds_sentence, selecting

Row = Mapping[str, Any]


def make_table(
    title: str,
    left: Sequence[str],
    right: Sequence[str],
    rows: Iterable[Sequence[str]],
    last: Sequence[str] = (),
    *,
    grouped: bool = False,
) -> Table:
    """Return a rich table.

    Args:
        right: headings of the columns after them, aligned to the right.
        rows: the cells of each row.
        last: headings of the last columns, aligned to the left.
        grouped: a first cell that is "" goes on with the group above, any other begins one.
    """
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=box.SIMPLE_HEAD,
                  padding=(0, 1, 0, 0))  # fmt: skip
    for at, heading in enumerate(left):
        table.add_column(heading, no_wrap=not at)
    for heading in right:
        table.add_column(heading, justify="right", no_wrap=not grouped, min_width=max(map(len, heading.split())))
    for heading in last:
        table.add_column(heading)
    for at, row in enumerate(rows):
        if grouped and at and row[0]:
            table.add_section()
        table.add_row(*row)
    return table


def _by_task(summary: pd.DataFrame, columns: Mapping[str, Callable[[Row], str]], title: str = "{}") -> list[Table]:
    """One table per task: full KV first, then methods in their order."""
    tables = []
    for task, part in summary.groupby("task", sort=False):
        rows, previous = [], None
        for row in part.sort_values("tokens", key=lambda tokens: tokens > 0, kind="stable").to_dict("records"):
            name = row["method"] if row["method"] != previous else ""
            unit = " %" if '"unit": "percent"' in row["rule"] else ""
            budget = f"{row['tokens']:,}{unit}" if row["tokens"] else "-"
            rows.append([name, budget, *(cell(row) for cell in columns.values())])
            previous = row["method"]
        tables.append(make_table(title.format(task), ["method"], ["budget", *columns], rows, grouped=True))
    return tables


def _mean(metric: str, digits: int = 0, scale: float = 1, missing: str = "-") -> Callable[[Row], str]:
    return lambda row: missing if pd.isna(row[metric]) else f"{row[metric] * scale:,.{digits}f}"


def replay_tables(summary: pd.DataFrame) -> list[Table]:
    """Return one table per task of a replay's summary."""
    shown = [KNOWN[key] for key in ("top1", "nll", "kl", "physical_mean", "physical_peak", "saved_bytes")]
    columns: dict[str, Callable[[Row], str]] = {"n": lambda row: str(row["n"])} | {one.label: one.text for one in shown}
    columns["s/trace"] = _mean("seconds", 2)  # a batch's time divided by its rows: it has no spread of its own
    if "slots_read_mean" in summary:
        read = KNOWN["slots_read_mean"]
        columns[read.label] = lambda row: "all" if pd.isna(row[read.key]) else read.text(row)
    return _by_task(summary, columns)


def diagnostic_tables(summary: pd.DataFrame) -> list[Table]:
    """Return what was lost, one table per task; none where no diagnostics were asked for."""
    known = [one for one in DIAGNOSTICS if one.key in summary]
    measured = summary[summary[[one.key for one in known]].notna().any(axis=1)] if known else summary.iloc[:0]
    return _by_task(measured, {one.label: one.text for one in known}, "{}: what was lost")


def answers_tables(summary: pd.DataFrame) -> list[Table]:
    """Return one table per task of an evaluation's summary."""
    columns: dict[str, Callable[[Row], str]] = {
        "n": lambda row: str(row["n"]) if row["n"] == row["answers"] else f"{row['n']} ({row['answers']})",
        "accuracy %": KNOWN["correct"].text,  # with its Wilson interval
        "vs full": lambda row: difference_text(row["correct_vs_full"], 0, 100),
        "vs random": lambda row: difference_text(row["correct_vs_random"], 0, 100),
        "cut off %": _mean("truncated", 0, 100), "tokens": _mean("output_tokens"),
        "loops %": _mean("repetition", 0, 100),
        "differ %": _mean("diverged", 0, 100), "first at": _mean("median_divergence"),
        "mean slots": _mean("physical_mean"), "peak slots": _mean("physical_peak"),
        "saved bytes %": _mean("saved_bytes", 1, 100),
    }  # fmt: skip
    if "slots_read_mean" in summary:
        columns["slots read"] = _mean("slots_read_mean", missing="all")
    tables = _by_task(summary, columns)
    for table in tables:
        for column in table.columns:
            column.no_wrap = column.header in {"method", "accuracy %", "vs full", "vs random"}
    return tables


def replay_caption(frame: pd.DataFrame) -> str:
    """Return what a replay's numbers are, in sentences: traces, what the budget counts, seeds."""
    lengths = []
    for task, part in frame.groupby("task", sort=False):
        own = part.drop_duplicates("example")
        is_graded = own["trace_correct"].notna().all()
        right = f"{own['trace_correct'].sum()} of {len(own)} traces answer right" if is_graded else "not graded"
        tokens = " + ".join(f"{own[name].mean():,.0f}" for name in ("prompt_tokens", "output_tokens"))
        lengths.append(f"{task} {tokens} tokens, {right}")
    sentences = [f"± is one standard error over traces. Full KV's traces, prompt + output: {'; '.join(lengths)}."]
    if budget := budget_sentence(frame):
        sentences.append(f"{budget} s/trace is replay's time, not decoding's.")
    return " ".join([*sentences, seeds_sentence(frame)])


def answers_caption(frame: pd.DataFrame, sampling: Sampling | None = None) -> str:
    """Return what an evaluation's numbers are, in sentences.

    Args:
        sampling: how answers were sampled, None for greedy.
    """
    counts = frame.groupby("task", sort=False)["example"].nunique()
    how = "greedy"
    if sampling is not None:
        samples = 1 + frame["sample"].max()
        many = f"{samples} samples each" if samples > 1 else "one sample each"
        own = [f"{name.replace('_', '-')} {value}" for name, value in sampling.to_dict().items() if value]
        how = f"{many} at {', '.join(own)}"
    text = (
        f"n: problems ({'; '.join(f'{task} {count}' for task, count in counts.items())}), {how}. "
        "accuracy: with its 95 % Wilson interval over problems. vs: paired difference of accuracy on the same problems "
        "in points, to full KV and to random at the same budget, with its 95 % bootstrap interval. Fewer than 8 "
        "problems have no interval. cut off: stopped at the token limit. loops: share of tokens in an n-gram that "
        "stands three times or more in a row. differ: outputs that are not full KV's; first at: the median token at "
        "which they leave it."
    )
    return " ".join(filter(None, [text, budget_sentence(frame), seeds_sentence(frame)]))


def figure_note(frame: pd.DataFrame) -> str:
    """Return one line for under a replay's figure: what the band is, and how the prompt was treated."""
    policies = [one for one in frame["prompt"].unique() if one]
    words = "; ".join(PROMPT_WORDS[policy] for policy in policies)
    choosing = selecting(frame)
    if choosing and "on_top" in policies:
        words += f"; not drawn, as their budget is what is read in all: {listed(choosing)}"
    return f"Band or bar: one standard error over traces. {words[:1].upper()}{words[1:]}."
